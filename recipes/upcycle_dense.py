"""A dense folder of transformers becomes an MoE, trains on, and goes out again: three steps in one command.

    python recipes/upcycle_dense.py DENSE_DIR
    python recipes/upcycle_dense.py DENSE_DIR --name more --trainer.steps 1000 --data.sources mine /path/to/text
    torchrun --nproc-per-node 2 recipes/upcycle_dense.py DENSE_DIR --parallel.ep-size 2

The MoE is runs/NAME/model, four copies of each feed-forward of which a token uses two, its run is runs/NAME/run, the
folder for others runs/NAME/hf. Other experts: `moe upcycle` first, and a recipe of your own with init_from.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

from moe.checkpoint import read_model_config
from moe.cli import main as moe
from moe.parallel.groups import launched_rank
from moe.recipe import Recipe, main
from moe.train.optimizer import OptimizerConfig
from moe.train.schedule import ScheduleConfig
from quickstart import quickstart


def upcycle_dense(folder: Path) -> Recipe:
    """Return the recipe that trains on from a model folder, with the tokenizer in it."""
    base = quickstart()
    model = read_model_config(folder)
    length = min(base.batch.sequence_length, model.max_position_embeddings)
    return replace(
        base,
        name="run",
        runs_dir=str(folder.parent),
        init_from=str(folder),
        model=model,
        data=replace(base.data, tokenizer=str(folder / "tokenizer")),
        batch=replace(base.batch, sequence_length=length),
        # the weights are good already: a lower peak, and a warm-up for the router
        optimizer=OptimizerConfig(learning_rate=5e-4),
        schedule=ScheduleConfig(warmup_steps=40),
        trainer=replace(base.trainer, steps=200),
    )


def made_once(folder: Path, command: list[str]) -> None:
    """Run a `moe` command that makes `folder`, its second path, unless it is there. The other ranks wait for it."""
    if launched_rank() == 0 and not folder.exists():
        moe([*command[:2], str(folder), *command[2:]])
    deadline = time.monotonic() + 1800
    while not folder.exists():
        if time.monotonic() > deadline:
            sys.exit(f"error: {folder} did not appear within 30 minutes")
        time.sleep(0.2)


def arguments(name: str) -> tuple[str, Path, list[str]]:
    """Return the dense folder, the home of what is made, and the overrides of the command line."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(f"usage: python {sys.argv[0]} DENSE_DIR [--name NAME] [overrides of the recipe]")
    overrides = sys.argv[2:]
    if "--name" in overrides[:-1]:
        at = overrides.index("--name")
        name = overrides[at + 1]
        del overrides[at : at + 2]
    return sys.argv[1], Path("runs") / name, overrides


if __name__ == "__main__":
    dense, home, overrides = arguments("upcycled")
    made_once(home / "model", ["upcycle", dense, "--num-experts", "4", "--top-k", "2"])
    main(upcycle_dense(home / "model"), args=overrides)
    made_once(home / "hf", ["export-hf", str(home / "run"), "--verify"])
