"""Is a dense checkpoint better trained on as it is, or upcycled? At equal tokens and at equal FLOPs, on three seeds.

    python benchmarks/papers/upcycled_or_dense.py

A dense parent reads 0.4 M tokens of the four built-in domains, then each arm 0.26 M more: the parent itself, MoEs made
of it, and an MoE that begins with nothing. `dense, longer` reads as many more tokens as the top-2 MoE costs more FLOPs.
Rows go to benchmarks/results/upcycling.csv, the picture to docs/images/upcycling.png.
"""

import dataclasses
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from lab import BATCH, DENSE, Lab, curve, mixed
from matplotlib.figure import Figure
from rich.console import Console
from study import IMAGES, RESULTS, append_rows, current_commit, show

from moe.checkpoint import read_model_config
from moe.counts import flops_per_token
from moe.upcycle import UpcycleConfig
from moe.upcycle.run import plan, upcycle

STEPS = 250
TOP2 = {"num_experts": 8, "top_k": 2}
ARMS: dict[str, UpcycleConfig | None] = {
    "dense": None,
    "dense, longer": None,
    "copy": UpcycleConfig(**TOP2),
    "drop": UpcycleConfig(**TOP2, method="drop"),
    "fine-grained": UpcycleConfig(method="fine_grained", granularity=4, num_experts=32, top_k=4),
    "from nothing": UpcycleConfig(**TOP2),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    seeds: tuple[int, ...] = (0, 1, 2)
    home: Path = Path("runs/studies")
    learning_rate: float = 1e-3
    record: bool = True


@dataclass(frozen=True, kw_only=True)
class Row:
    """The end of one arm."""

    commit: str
    torch: str
    variant: str
    seed: int
    learning_rate: float
    steps: int
    mtokens: float  # millions, after the parent
    tflops: float  # of training after the parent
    start: float  # loss before the first step, nats, mean over domains
    loss: float  # at the end


@dataclass(frozen=True, kw_only=True)
class Point:
    """A loss along the way."""

    variant: str
    seed: int
    learning_rate: float
    tflops: float
    mtokens: float
    loss: float


def run_arm(lab: Lab, arm: str, parent: Path, seed: int, options: Options) -> tuple[Row, list[Point]]:
    """Train one arm on from a parent; return its end and its curve."""
    config, model, start, steps = ARMS[arm], DENSE, parent, STEPS
    if config is not None:
        folder = lab.home / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}-model"
        if not folder.exists():
            upcycle(plan(parent, replace(config, seed=seed)), folder)
        model, start = read_model_config(folder), folder
    if arm == "dense, longer":
        moe = plan(parent, UpcycleConfig(**TOP2)).target
        steps = round(
            STEPS * flops_per_token(moe, BATCH.sequence_length) / flops_per_token(DENSE, BATCH.sequence_length)
        )
    recipe = lab.recipe(
        f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}-{options.learning_rate:g}",
        seed=1000 + seed,  # text that the parent has not read in this order
        steps=steps,
        model=model,
        init_from=None if arm == "from nothing" else start,
        learning_rate=options.learning_rate,
    )
    run = lab.trained(recipe)
    per_step = BATCH.global_sequences * BATCH.sequence_length
    flops = 3 * flops_per_token(model, BATCH.sequence_length) * per_step
    points = [
        Point(
            variant=arm,
            seed=seed,
            learning_rate=options.learning_rate,
            tflops=round(step * flops / 1e12, 4),
            mtokens=round(step * per_step / 1e6, 4),
            loss=round(statistics.mean(losses.values()), 4),
        )
        for step, losses in curve(run).items()
    ]
    first, last = points[0], points[-1]
    return Row(
        commit=current_commit(),
        torch=torch.__version__,
        variant=arm,
        seed=seed,
        learning_rate=options.learning_rate,
        steps=steps,
        mtokens=last.mtokens,
        tflops=last.tflops,
        start=first.loss,
        loss=last.loss,
    ), points


def draw(points: list[Point], path: Path) -> None:
    """Draw mean losses over seeds, over tokens and over FLOPs."""
    figure = Figure(figsize=(10, 3.8), dpi=100, layout="constrained")
    for axes, (field, label) in zip(
        figure.subplots(1, 2), (("mtokens", "million tokens after the parent"), ("tflops", "TFLOPs after the parent")),
        strict=True,
    ):  # fmt: skip
        for number, arm in enumerate(ARMS):
            mine = [point for point in points if point.variant == arm]
            places = sorted({getattr(point, field) for point in mine})
            means = [statistics.mean(p.loss for p in mine if getattr(p, field) == place) for place in places]
            axes.plot(places, means, color=f"C{number}", label=arm, linewidth=1.3)
        axes.set_ylim(top=max(point.loss for point in points if point.variant == "dense") + 0.25)
        axes.set_xlabel(label, fontsize=9)
        axes.tick_params(labelsize=8)
    figure.axes[0].set_ylabel("held-out loss, nats per token", fontsize=9)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, metadata={"Software": None})


def main(options: Options) -> None:
    """Run the study, print its table, keep rows and picture."""
    lab, console, rows, points = Lab(options.home), Console(width=170), [], []
    for seed in options.seeds:
        parent = lab.trained(mixed(lab, seed))
        for arm in ARMS:
            row, more = run_arm(lab, arm, parent, seed, options)
            console.log(f"seed {seed}  {arm:14} {row.start:.3f} -> {row.loss:.3f}")
            rows.append(row)
            points += more
    show(console, f"held-out loss, nats, learning rate {options.learning_rate:g}", rows, "dense")
    if options.record:
        append_rows(RESULTS / "upcycling.csv", rows)
        append_rows(RESULTS / "upcycling_curves.csv", points)
        draw(points, IMAGES / "upcycling.png")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, default=dataclasses.replace(Options())))
