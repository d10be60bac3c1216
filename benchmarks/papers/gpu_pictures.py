"""The picture of routers_on_gpu.py: every contender a line, over tokens."""

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

PANELS = {
    "training loss, nats": "loss",
    "held-out loss, mean over domains": "held_out",
    "experts a token runs": "experts_per_token",
}


def draw(path: Path, points: list[Any]) -> None:
    """Draw training loss, held-out loss and experts per token over tokens, a line for each contender."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, (title, field) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        _lines(axes, points, field)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("million tokens", fontsize=8)
        axes.tick_params(labelsize=8)
    figure.axes[0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def _lines(axes: Axes, points: list[Any], field: str) -> None:
    for number, name in enumerate(dict.fromkeys(point.contender for point in points)):
        mine = [p for p in points if p.contender == name and not math.isnan(getattr(p, field))]
        xs = [point.tokens / 1e6 for point in mine]
        marker = "o" if field == "held_out" else None
        axes.plot(xs, [getattr(p, field) for p in mine], color=f"C{number}", label=name, linewidth=1, marker=marker)
