"""What tests do to a run in the middle of it: their code around one step, in the pool or in a process of its own."""

import atexit
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from moe.checkpoint import CheckpointReader, list_checkpoints, write_json_atomic
from moe.recipe import Recipe, main

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def around_steps(around: Callable[[Any, int, Callable[[], Any]], Any]) -> Iterator[None]:
    """Replace each TrainStep.run by `around(train_step, step, run)`; `step` counts from 1, as rows do."""
    from moe.train.step import TrainStep

    plain = TrainStep.run

    def run(self: Any, batches: Any, **arguments: Any) -> Any:
        return around(self, arguments["step"] + 1, lambda: plain(self, batches, **arguments))

    with patch.object(TrainStep, "run", run):
        yield


def plant(around: Callable[[Any, int, Callable[[], Any]], Any]) -> None:
    """`around_steps` for as long as the process lives."""
    from moe.train import prepare_environment

    prepare_environment("cpu")
    manager = around_steps(around)
    manager.__enter__()
    atexit.register(manager.__exit__, None, None, None)  # a context that nobody holds would end at once


def run_main(recipe: Recipe, resume: bool = False) -> int:
    """Run as its script would; return the exit code."""
    try:
        main(recipe, args=["--resume"] if resume else [])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def train_with_signals(recipe: Recipe, signals: dict[int, list[tuple[int, int]]], resume: bool = False) -> int:
    """Return the exit code of a run whose rank r gets signal s after the maths of a step, `{step: [(r, s), ...]}`.

    Raises AssertionError unless the handlers of before are back at the end.
    """

    def around(_: Any, step: int, run: Callable[[], Any]) -> Any:
        record = run()
        for rank, number in signals.get(step, []):
            if rank == dist.get_rank():
                signal.raise_signal(number)
        return record

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    handlers = [signal.getsignal(number) for number in numbers]
    with around_steps(around):
        code = run_main(recipe, resume)
    assert [signal.getsignal(number) for number in numbers] == handlers
    return code


def full_state(train_step: Any) -> dict[str, Tensor]:
    """Return a copy of all a step may change: master weights, moments, buffers, working weights, lagged counts."""
    from moe.train.state import read_state

    engine = train_step._engine
    state = {f"{shard.name}@{shard.offset}": shard.tensor.clone() for shard in read_state(engine)}
    state |= {f"working/{name}": p.detach().clone() for name, p in engine.module.named_parameters()}
    state |= {f"here/{name}": b.clone() for name, b in engine.module.named_buffers()}
    if train_step.load.lagged_LE is not None:
        state["lagged"] = train_step.load.lagged_LE.clone()
    return state


def tensors_of(recipe: Recipe) -> dict[str, Tensor]:
    """Every logical tensor of the newest checkpoint."""
    reader = CheckpointReader.open(list_checkpoints(recipe.folder.checkpoints_dir)[-1])
    return {name: reader.read(name) for name in sorted(reader.names)}


def assert_equal_tensors(recipe: Recipe, other: Recipe) -> None:
    """The newest checkpoints of two runs hold the same tensors, to the bit."""
    tensors, expected = tensors_of(recipe), tensors_of(other)
    assert tensors.keys() == expected.keys()
    different = [name for name, tensor in tensors.items() if not torch.equal(tensor, expected[name])]
    assert not different, different


def start_run(recipe: Recipe, *flags: str, ranks: int = 1, code: str = "") -> subprocess.Popen:
    """Start `moe train recipe.json` in processes of its own, by torchrun for several ranks.

    `code` runs first in each rank: a fault to plant. Output is in `communicate()[0]`; the process leads a group.
    """
    folder = Path(recipe.runs_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{recipe.name}.json"
    write_json_atomic(file, recipe.to_json())
    script = folder / f"{recipe.name}.py"
    script.write_text(f"{code}\nfrom moe.cli import main\nmain()\n", encoding="utf-8")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "recipes", "tests"))
    return subprocess.Popen(
        [sys.executable, *torchrun, str(script), "train", str(file), *flags],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
