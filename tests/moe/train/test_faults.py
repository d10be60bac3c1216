"""A rank that fails ends all ranks, soon, with its error and a code that is not 0; and a failed save ends nothing."""

import re
import signal
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from faults import around_steps, start_run
from moe.checkpoint import CheckpointError, CheckpointReader, RunLock, list_checkpoints
from moe.recipe import launch
from runs import curve, rows_of, small_recipe, train

FAULT = """
import os, signal, time
import torch.distributed as dist
from faults import plant

def around(_, step, run):
    if step == 1 and dist.get_rank() == 0:
        print(f"survivor is {{os.getpid()}}\\n", end="", flush=True)
    if step == 2 and dist.get_rank() == 1:
        print(f"fault at {{time.time()}}\\n", end="", flush=True)
        {fault}
    return run()

plant(around)
"""


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise RuntimeError('planted on one rank')", "RuntimeError: planted on one rank"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
    ],
    ids=["raises", "killed"],
)
def test_a_rank_that_fails_ends_all_within_a_minute(run_root, fault, words):
    recipe = small_recipe(run_root, trainer={"save_every": 1})
    process = start_run(recipe, ranks=2, code=FAULT.format(fault=fault))
    output, _ = process.communicate(timeout=200)
    ended = time.time()
    assert process.returncode != 0
    assert words in output
    took = ended - float(printed("fault at", output))
    assert took < 60, took
    print(f"all ranks ended {took:.1f} s after the fault")
    # nothing is torn, nobody holds the folder
    RunLock.acquire(recipe.folder.path).release()
    assert [path.name for path in list_checkpoints(recipe.folder.checkpoints_dir)] == ["step_00000001"]
    CheckpointReader.open(recipe.folder.checkpoints_dir / "step_00000001")
    # torchrun has taken its workers with it
    assert not Path(f"/proc/{printed('survivor is', output)}").exists()


def printed(words: str, output: str) -> str:
    """Return the number after `words`. Ranks write to one pipe, so the next word may stand right behind it."""
    return re.findall(rf"{words} ([0-9.]+)", output)[0]


def train_on_a_full_disk(recipe, rank: int, failing_saves: list[int]) -> str:
    """The `failing_saves`-th saves fail on one rank while it writes its tensors."""
    import torch.distributed as dist

    from moe.checkpoint import save

    plain, calls = save.save_file, []

    def save_file(tensors, path):
        calls.append(0)
        if len(calls) in failing_saves and dist.get_rank() == rank:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        plain(tensors, path)

    with patch.object(save, "save_file", save_file):
        try:
            launch(recipe)
        except CheckpointError as error:
            return f"{type(error).__name__}: {error}"
    return "trained"


def saved(recipe) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(recipe.folder.checkpoints_dir)]


def test_a_save_that_fails_at_an_interval_is_reported_and_made_up_for(pool, run_root):
    recipe = small_recipe(run_root, trainer={"save_every": 2})
    assert pool.run(train_on_a_full_disk, recipe, 1, [2], world_size=2) == ["trained", "trained"]
    assert saved(recipe) == [2, 6]
    (row,) = [row for row in rows_of(recipe) if "save/failed" in row]
    assert row["step"] == 4
    assert "rank 1: OSError" in row["save/failed"]
    assert "No space left" in row["save/failed"]
    assert [row["step"] for row in curve(recipe)] == [1, 2, 3, 4, 5, 6]
    assert not list(recipe.folder.checkpoints_dir.glob(".tmp*"))


def test_a_last_save_that_fails_ends_the_run_and_the_save_before_continues_it(pool, run_root):
    recipe = small_recipe(run_root, trainer={"save_every": 4})
    outcomes = pool.run(train_on_a_full_disk, recipe, 0, [2], world_size=2)
    assert all(text.startswith("CheckpointError") and "No space left" in text for text in outcomes), outcomes
    assert saved(recipe) == [4]
    rows = curve(recipe)
    pool.run(train, recipe, True, world_size=2)
    assert saved(recipe) == [4, 6]
    assert curve(recipe) == rows


def test_a_save_that_fails_when_asked_to_stop_ends_the_run_with_that_error(pool, run_root):
    recipe = small_recipe(run_root)
    (text,) = pool.run(stop_on_a_full_disk, recipe, world_size=1)
    assert text.startswith("CheckpointError")


def stop_on_a_full_disk(recipe) -> str:
    def around(_, step, run):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return run()

    with around_steps(around):
        return train_on_a_full_disk(recipe, 0, [1])
