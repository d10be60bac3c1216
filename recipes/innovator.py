"""Innovator (arXiv 2507.18671): a dense model learns disciplines and keeps what it knew. Four stages, one command.

    python recipes/innovator.py DENSE_DIR
    python recipes/innovator.py DENSE_DIR --name longer --trainer.steps 400
    torchrun --nproc-per-node 2 recipes/innovator.py DENSE_DIR --parallel.ep-size 2

    runs/NAME/python, maths, cpp   1. an expert for each discipline: the dense model trained on it, feed-forwards only
    runs/NAME/model                2. their feed-forwards cut into slices, beside that of the dense model, which stays
    runs/NAME/warm-up              3. the router alone, taught whose text is whose
    runs/NAME/joint                4. all of it, on the mixture

The same command goes on where it was stopped: a stage that is finished is left alone. Overrides hold for every stage
that trains. For your own text, change GENERAL, DISCIPLINES and the sources.
"""

from dataclasses import replace
from pathlib import Path

from moe.balance.load import BalanceConfig
from moe.checkpoint import open_any_model
from moe.parallel.groups import launched_rank
from moe.recipe import Recipe, main
from moe.run import read_rows
from moe.train.optimizer import OptimizerConfig
from moe.train.schedule import ScheduleConfig
from quickstart import quickstart
from upcycle_dense import arguments, made_once

GENERAL = "prose"
DISCIPLINES = ("python", "maths", "cpp")
GRANULARITY = 4  # slices of a feed-forward, and experts per token: one feed-forward's worth


def stage(home: Path, name: str, start: str, *, trainable: tuple[str, ...] = (), steps: int, rate: float) -> Recipe:
    """Return what all stages share: which folder they train on from, and how long."""
    base, folder = quickstart(), home / start
    model, _ = open_any_model(folder)
    return replace(
        base,
        name=name,
        runs_dir=str(home),
        init_from=str(folder),
        model=model,
        data=replace(base.data, tokenizer=str(home / "dense/tokenizer")),
        batch=replace(base.batch, sequence_length=min(base.batch.sequence_length, model.max_position_embeddings)),
        optimizer=OptimizerConfig(learning_rate=rate, trainable=trainable),
        schedule=ScheduleConfig(warmup_steps=10),
        trainer=replace(base.trainer, steps=steps),
    )


def expert(home: Path, discipline: str) -> Recipe:
    """Stage 1: one discipline, a tenth of general text, and only what will become an expert."""
    recipe = stage(home, discipline, "dense", trainable=("*.feed_forward.*",), steps=100, rate=1e-3)
    sources = {name: f"builtin:{name}" for name in (discipline, GENERAL)}
    return replace(recipe, data=replace(recipe.data, sources=sources, weights={discipline: 0.9, GENERAL: 0.1}))


def warm_up(home: Path) -> Recipe:
    """Stage 3: the router alone, and the gate of the shared expert."""
    trainable = ("*.router.*", "*.sigmoid_gate.*")
    recipe = stage(home, "warm-up", "model", trainable=trainable, steps=100, rate=2e-3)
    return replace(recipe, balance=BalanceConfig(coefficient=1e-3, domain_groups=DISCIPLINES, domain_coefficient=0.1))


def joint(home: Path) -> Recipe:
    """Stage 4: everything, three parts of general text to seven of the disciplines."""
    recipe = stage(home, "joint", "warm-up", steps=200, rate=5e-4)
    weights = {GENERAL: 0.3, **{name: 0.7 / len(DISCIPLINES) for name in DISCIPLINES}}
    return replace(recipe, data=replace(recipe.data, weights=weights))


def run(recipe: Recipe, overrides: list[str]) -> None:
    """Train a stage, or go on with it."""
    has_begun = (recipe.folder.path / "recipe.json").exists()
    main(recipe, args=[*overrides, *(["--resume"] if has_begun else [])])


def losses(home: Path) -> str:
    """Return the held-out loss of each domain along the way."""

    def of(run: str, at: int) -> dict[str, float]:
        rows = [row for row in read_rows(home / run / "metrics.jsonl") if any(name.startswith("eval/") for name in row)]
        return {name.split("/")[1]: value for name, value in rows[at].items() if name.endswith("/loss")}

    experts = {name: of(name, -1) for name in DISCIPLINES}
    columns = {
        "dense": {name: of(name, 0)[name] for name in DISCIPLINES} | {GENERAL: of(DISCIPLINES[0], 0)[GENERAL]},
        "its expert": {name: experts[name][name] for name in DISCIPLINES},
        "upcycled": of("warm-up", 0),
        "warmed up": of("warm-up", -1),
        "joint": of("joint", -1),
    }
    lines = ["", "Loss on held-out text, in nats per token:", f"{'':10}" + "".join(f"{name:>12}" for name in columns)]
    for domain in (GENERAL, *DISCIPLINES):
        cells = (f"{column[domain]:12.3f}" if domain in column else f"{'-':>12}" for column in columns.values())
        lines.append(f"{domain:10}" + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    dense, home, overrides = arguments("innovator")
    made_once(home / "dense", ["import-hf", dense])
    for discipline in DISCIPLINES:
        run(expert(home, discipline), overrides)
    branches = [str(home / discipline) for discipline in DISCIPLINES]
    slices = ["--granularity", str(GRANULARITY), "--top-k", str(GRANULARITY)]
    made_once(
        home / "model",
        ["upcycle", str(home / "dense"), "--method", "innovator", "--branches", *branches, *slices],
    )
    run(warm_up(home), overrides)
    run(joint(home), overrides)
    if launched_rank() == 0:
        print(losses(home))
