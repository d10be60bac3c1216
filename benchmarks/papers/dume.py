"""DUME (arXiv 2603.29765) on three branches of one dense parent: what does a fitted router keep of each expert?

    python benchmarks/papers/dume.py

A parent that has read prose for the most part is trained on Python, maths and C++ apart. Then, without training, on the
held-out text of each domain:

    dense parent, each branch      for comparison; the branch of the domain is what there is to keep
    mean of all weights            one dense model
    oracle                         every token through its domain's expert, under the mean attention: the bound
    ridge                          the fitted router, one expert per token; ridge-2: two, at temperature 0.1
    uniform, random                all experts evenly; one by a random router

Kept is the perplexity of the domain's branch over that of the model, a mean over domains; the paper reports up to
97.6 %. Also: the share of tokens that the router sends to their own domain's expert, and the same after the third
expert was added later. Rows go to benchmarks/results/dume.csv.
"""

import dataclasses
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from lab import BATCH, DENSE, Lab, general, opened
from rich.console import Console
from study import RESULTS, append_rows, current_commit, show

from moe.model import Model
from moe.upcycle import AddExpertConfig, UpcycleConfig
from moe.upcycle.add_expert import add_expert
from moe.upcycle.fit import dense_model, put_feed_forwards
from moe.upcycle.run import Plan, plan, upcycle

DOMAINS = ("python", "maths", "cpp")
TEXTS = tuple(f"builtin:{name}" for name in DOMAINS)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    seeds: tuple[int, ...] = (0, 1, 2)
    home: Path = Path("runs/studies")
    steps: int = 150
    """Of each branch."""
    tokens: int = 50_000
    """Of each domain, for the router."""
    record: bool = True


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model on held-out text, losses in nats per token."""

    commit: str
    torch: str
    variant: str
    seed: int
    python: float
    maths: float
    cpp: float
    loss: float  # mean of the three
    kept: float  # %, of the domain's branch, by perplexity
    routed_right: float  # share of tokens; nan where nothing is routed


def merged(made: Plan, feed_forward: int | None) -> Model:
    """Return a dense model with the plan's attention, and one branch's feed-forwards or the mean of all."""
    model = dense_model(DENSE, made.rest)
    if feed_forward is not None:
        put_feed_forwards(model, made.branches[feed_forward], layers=range(DENSE.num_hidden_layers))
    return model


def routed_right(lab: Lab, model: Model) -> float:
    """Return the share of tokens that go to their domain's expert first, mean over domains and layers."""
    return statistics.mean(
        (probs_TE.argmax(-1) == DOMAINS.index(domain)).float().mean().item()
        for domain, probs_TE in lab.probabilities(model, DOMAINS)
    )


def study(lab: Lab, seed: int, options: Options, work: Path) -> list[Row]:
    """Return the rows of one seed."""
    parent = lab.trained(general(lab, seed))
    branches = [
        lab.trained(
            lab.recipe(
                f"branch-{name}-{seed}",
                seed=1000 + seed,
                steps=options.steps,
                weights={name: 1.0},
                init_from=parent,
                learning_rate=5e-4,
            )
        )
        for name in DOMAINS
    ]
    mixed = UpcycleConfig(method="branch_train_mix", branches=tuple(map(str, branches)), seed=seed, top_k=3)
    fitted = replace(
        mixed,
        method="ridge",
        top_k=1,
        texts=TEXTS,
        text_tokens=options.tokens,
        text_length=BATCH.sequence_length,
        cache_dir=str(lab.home / "data"),
    )
    made = plan(parent, mixed)
    upcycle(made, work / "uniform")
    upcycle(plan(parent, fitted), work / "ridge")
    upcycle(plan(parent, replace(fitted, top_k=2)), work / "ridge-2")
    # the rest stays the parent's, or adding one would change it
    kept = replace(fitted, average_rest=False)
    upcycle(plan(parent, kept), work / "kept")
    upcycle(plan(parent, replace(kept, branches=kept.branches[:2], texts=TEXTS[:2])), work / "two")
    reading = AddExpertConfig(
        text=TEXTS[2], text_tokens=options.tokens, text_length=BATCH.sequence_length, cache_dir=fitted.cache_dir
    )
    add_expert(work / "two", branches[2], work / "added", reading)
    models = {name: opened(work / name) for name in ("uniform", "ridge", "ridge-2", "kept", "added")}
    with torch.no_grad():
        for layer in models["uniform"].layers:
            layer.moe.router.weight.zero_()
    random = opened(work / "ridge")
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in random.layers:
            layer.moe.router.weight.copy_(torch.randn(layer.moe.router.weight.shape, generator=draw))
            layer.moe.router.bias.zero_()
    oracle = {name: lab.losses(merged(made, place))[name] for place, name in enumerate(DOMAINS)}
    losses = {
        "dense parent": lab.losses(opened(parent)),
        **{f"branch {name}": lab.losses(opened(branch)) for name, branch in zip(DOMAINS, branches, strict=True)},
        "mean of weights": lab.losses(merged(made, None)),
        "oracle": oracle,
        "ridge": lab.losses(models["ridge"]),
        "ridge-2": lab.losses(models["ridge-2"]),
        "uniform": lab.losses(models["uniform"]),
        "random": lab.losses(random),
        "parent's rest": lab.losses(models["kept"]),
        "third added": lab.losses(models["added"]),
    }
    routed = {name: models[name] for name in ("ridge", "ridge-2")}
    routed |= {"random": random, "parent's rest": models["kept"], "third added": models["added"]}
    own = {name: losses[f"branch {name}"][name] for name in DOMAINS}
    return [
        Row(
            commit=current_commit(),
            torch=torch.__version__,
            variant=variant,
            seed=seed,
            **{name: round(found[name], 4) for name in DOMAINS},
            loss=round(statistics.mean(found[name] for name in DOMAINS), 4),
            kept=round(100 * statistics.mean(math.exp(own[name] - found[name]) for name in DOMAINS), 2),
            routed_right=round(routed_right(lab, routed[variant]), 4) if variant in routed else math.nan,
        )
        for variant, found in losses.items()
    ]


def main(options: Options) -> None:
    """Run the study, print its table and keep its rows."""
    import tempfile

    lab, rows, console = Lab(options.home), [], Console(width=200)
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as work:
            rows += study(lab, seed, options, Path(work))
        console.log(f"seed {seed} done")
    show(console, "held-out loss, nats; what is kept of each branch, %", rows, "oracle")
    if options.record:
        append_rows(RESULTS / "dume.csv", rows)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, default=dataclasses.replace(Options())))
