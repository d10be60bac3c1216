"""Pictures of the studies, drawn from recorded rows and curves: a row of panels for each text."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from toy import Point, Row

Draw = Callable[[Axes, list[Row], list[Point]], None]


def draw_panels(path: Path, rows: list[Row], points: list[Point], panels: dict[str, Draw], *, width: float) -> None:
    """Write a PNG: texts from top to bottom, panels from left to right, each under its title."""
    texts = list(dict.fromkeys(row.text for row in rows))
    figure = Figure(figsize=(width, 3.1 * len(texts)), dpi=100, layout="constrained")
    for line, text in zip(figure.subplots(len(texts), len(panels), squeeze=False), texts, strict=True):
        for axes, (title, draw) in zip(line, panels.items(), strict=True):
            axes.set_title(f"{text}: {title}", fontsize=9)
            axes.tick_params(labelsize=8)
            draw(axes, [row for row in rows if row.text == text], [point for point in points if point.text == text])
    figure.savefig(path, metadata={"Software": None})


def dots(axes: Axes, rows: list[Any], value: Callable[[Any], float]) -> None:
    """Draw one dot per seed and a bar at the mean, for each variant."""
    variants = list(dict.fromkeys(row.variant for row in rows))
    for x, variant in enumerate(variants):
        values = [value(row) for row in rows if row.variant == variant]
        axes.hlines(statistics.mean(values), x - 0.3, x + 0.3, color="0.4", linewidth=2)
        axes.plot([x] * len(values), values, "o", color=f"C{x}", markersize=4)
    axes.set_xticks(range(len(variants)), variants, rotation=40, ha="right")
    axes.set_xlim(-0.6, len(variants) - 0.4)


def curves(axes: Axes, points: list[Point], value: Callable[[Point], float]) -> None:
    """Draw the mean over seeds, a line for each variant, over optimizer steps."""
    for number, variant in enumerate(dict.fromkeys(point.variant for point in points)):
        mine = [point for point in points if point.variant == variant]
        steps = sorted({point.step for point in mine})
        means = [statistics.mean(value(point) for point in mine if point.step == step) for step in steps]
        axes.plot(steps, means, color=f"C{number}", label=variant, linewidth=1.2)
    axes.set_xlabel("step", fontsize=8)


def differences(axes: Axes, points: list[Point], baseline: str) -> None:
    """Draw training losses minus those of `baseline` at the same step and seed, mean over seeds."""
    known = {(point.seed, point.step): point.loss for point in points if point.variant == baseline}
    curves(axes, points, lambda point: point.loss - known[point.seed, point.step])
    axes.legend(fontsize=7)


def count_panels(targets: dict[str, float]) -> dict[str, Draw]:
    """Return the panels of a study of how many experts a token takes; `targets` are means that variants hold."""

    def over_steps(axes: Axes, rows: list[Row], points: list[Point]) -> None:
        curves(axes, points, lambda point: point.experts)
        for target in targets.values():
            axes.axhline(target, color="0.5", linestyle=":", linewidth=1)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)

    def hard_minus_easy(axes: Axes, rows: list[Row], points: list[Point]) -> None:
        axes.axhline(0, color="0.7", linewidth=0.8)
        dots(axes, rows, lambda row: row.experts_hardest - row.experts_easiest)

    return {
        "mean experts of a token (dotted: target)": over_steps,
        "experts, hardest minus easiest kind": hard_minus_easy,
        "held-out loss, nats": lambda axes, rows, points: dots(axes, rows, lambda row: row.loss),
    }
