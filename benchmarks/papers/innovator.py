"""Innovator (arXiv 2507.18671) on three disciplines: does a dense model learn them without losing what it knew?

    python benchmarks/papers/innovator.py

A parent that has read prose for the most part; then the four stages of recipes/innovator.py in small, and as controls
the parent trained on, dense, with as many tokens as all stages together: on the disciplines alone, and on the mixture
of the last stage. `upcycled, fitted` and what follows it begin with a router fitted to texts; `warmed up, untaught`
leaves out the loss that says whose text is whose.

Losses are on held-out text; `forgot` is that of prose minus the parent's; `group right` the share of discipline tokens
whose group has the most of the router's probability, mean over layers. Rows go to benchmarks/results/innovator.csv.
"""

import dataclasses
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from lab import BATCH, Lab, general, opened
from rich.console import Console
from study import RESULTS, append_rows, current_commit, show

from moe.balance.load import BalanceConfig
from moe.checkpoint import open_any_model
from moe.model import Model
from moe.upcycle import UpcycleConfig
from moe.upcycle.run import plan, upcycle

GENERAL, DISCIPLINES = "prose", ("python", "maths", "cpp")
GRANULARITY = 4
EXPERT_STEPS, WARMUP_STEPS, JOINT_STEPS = 100, 100, 150
MIXTURE = {GENERAL: 0.3, **dict.fromkeys(DISCIPLINES, 0.7 / 3)}
ROUTER = ("*.router.*", "*.sigmoid_gate.*")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    seeds: tuple[int, ...] = (0, 1, 2)
    home: Path = Path("runs/studies")
    record: bool = True


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model on held-out text, nats per token."""

    commit: str
    torch: str
    variant: str
    seed: int
    prose: float
    python: float
    maths: float
    cpp: float
    loss: float  # mean of the disciplines
    forgot: float  # of prose, to the parent
    group_right: float  # nan for a dense model


def group_right(lab: Lab, model: Model) -> float:
    """Return the share of discipline tokens whose group of experts has the most probability."""
    return statistics.mean(
        (probs_TE.unflatten(1, (len(DISCIPLINES), GRANULARITY)).sum(-1).argmax(-1) == DISCIPLINES.index(domain))
        .float()
        .mean()
        .item()
        for domain, probs_TE in lab.probabilities(model, DISCIPLINES)
    )


def stages(lab: Lab, seed: int) -> dict[str, Path]:
    """Train what is missing and return the folders of all models, by name."""
    parent = lab.trained(general(lab, seed))

    def run(name: str, start: Path, steps: int, learning_rate: float, **options: object) -> Path:
        recipe = lab.recipe(
            f"innovator-{name}-{seed}",
            seed=1000 + seed,
            steps=steps,
            model=open_any_model(start)[0],
            init_from=start,
            learning_rate=learning_rate,
            **options,
        )
        return lab.trained(recipe)

    experts = {
        name: run(
            f"expert-{name}", parent, EXPERT_STEPS, 1e-3,
            weights={name: 0.9, GENERAL: 0.1}, trainable=("*.feed_forward.*",),
        )
        for name in DISCIPLINES
    }  # fmt: skip
    config = UpcycleConfig(
        method="innovator",
        branches=tuple(map(str, experts.values())),
        granularity=GRANULARITY,
        top_k=GRANULARITY,
        seed=seed,
    )
    fitted = replace(
        config,
        router="ridge",
        texts=tuple(f"builtin:{name}" for name in DISCIPLINES),
        text_tokens=50_000,
        text_length=BATCH.sequence_length,
        cache_dir=str(lab.home / "data"),
    )
    made = {"upcycled": config, "upcycled, fitted": fitted}
    models = {"parent": parent, **{f"expert {name}": folder for name, folder in experts.items()}}
    for name, options in made.items():
        models[name] = lab.home / f"innovator-{name.replace(', ', '-')}-{seed}-model"
        if not models[name].exists():
            upcycle(plan(parent, options), models[name])
    plain = BalanceConfig(coefficient=1e-3)
    taught = replace(plain, domain_groups=DISCIPLINES, domain_coefficient=0.1)
    for name, start, balance in (
        ("warmed up", "upcycled", taught),
        ("warmed up, untaught", "upcycled", plain),
    ):
        models[name] = run(
            name.replace(" ", "-").replace(",", ""), models[start], WARMUP_STEPS, 2e-3,
            trainable=ROUTER, balance=balance,
        )  # fmt: skip
    for name, start in (("joint", "warmed up"), ("joint, fitted", "upcycled, fitted")):
        models[name] = run(name.replace(", ", "-"), models[start], JOINT_STEPS, 5e-4, weights=MIXTURE)
    total = len(DISCIPLINES) * EXPERT_STEPS + WARMUP_STEPS + JOINT_STEPS
    alone = dict.fromkeys(DISCIPLINES, 1.0)
    models["dense, disciplines"] = run("dense-alone", parent, total, 1e-3, weights=alone)
    models["dense, mixture"] = run("dense-mixture", parent, total, 1e-3, weights=MIXTURE)
    return models


def main(options: Options) -> None:
    """Run the study, print its table and keep its rows."""
    lab, rows, console = Lab(options.home), [], Console(width=260)
    for seed in options.seeds:
        found = {name: opened(folder) for name, folder in stages(lab, seed).items()}
        losses = {name: lab.losses(model) for name, model in found.items()}
        for name, model in found.items():
            values = {domain: round(losses[name][domain], 4) for domain in (GENERAL, *DISCIPLINES)}
            rows.append(
                Row(
                    commit=current_commit(),
                    torch=torch.__version__,
                    variant=name,
                    seed=seed,
                    **values,
                    loss=round(statistics.mean(losses[name][domain] for domain in DISCIPLINES), 4),
                    forgot=round(losses[name][GENERAL] - losses["parent"][GENERAL], 4),
                    group_right=round(group_right(lab, model), 4) if model.config.num_experts else math.nan,
                )
            )
        console.log(f"seed {seed} done")
    show(console, "held-out loss, nats", rows, "dense, mixture")
    if options.record:
        append_rows(RESULTS / "innovator.csv", rows)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, default=dataclasses.replace(Options())))
