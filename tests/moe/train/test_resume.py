"""Killed and resumed, a run goes on exactly: same rows, same weights. And a checkpoint fits every layout."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moe.checkpoint import CheckpointReader, list_checkpoints, write_json_atomic
from moe.recipe import Recipe
from runs import curve, rows_of, small_recipe, train


def final_tensors(recipe: Recipe) -> dict[str, torch.Tensor]:
    reader = CheckpointReader.open(list_checkpoints(recipe.folder.checkpoints_dir)[-1])
    return {name: reader.read(name) for name in sorted(reader.names)}


def launch_script(recipe: Recipe, *flags: str) -> subprocess.Popen:
    """`python -m moe train recipe.json` in a process of its own."""
    file = Path(recipe.runs_dir) / "recipe.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(file, recipe.to_json())
    root = Path(__file__).resolve().parents[3]
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    return subprocess.Popen(
        [sys.executable, "-m", "moe", "train", str(file), *flags],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=root,
    )


def test_a_killed_run_continues_exactly(pool, run_root):
    fields = {"batch": {"micro_sequences": 4}, "trainer": {"save_every": 3}}
    whole = small_recipe(run_root, "whole", steps=10, **fields)
    pool.run(train, whole, world_size=1)
    broken = small_recipe(run_root, "broken", steps=10, **fields)
    process = launch_script(broken)
    deadline = time.monotonic() + 120
    while not (broken.folder.metrics_file.exists() and len(curve(broken)) >= 5):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not list_checkpoints(broken.folder.checkpoints_dir)[-1].name.endswith("10"), "killed too late to tell"

    process = launch_script(broken, "--resume")
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert curve(broken) == curve(whole)
    markers = [row for row in rows_of(broken) if row.get("resume")]
    assert len(markers) == 1
    assert markers[0]["step"] in (3, 6)
    expected = final_tensors(whole)
    for name, tensor in final_tensors(broken).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1, 1, 1), (2, 2, 0)),
        ((2, 2, 2), (1, 1, 1)),
        ((2, 1, 0), (4, 4, 1)),
        ((4, 2, 1), (2, 1, 2)),
    ],
    ids=str,
)
def test_another_layout_continues_the_curve(pool, run_root, before, after):
    """(ranks, expert parallel, ZeRO stage) before and after; without accumulation, so that the balance is the same."""

    def recipe(name: str, layout: tuple[int, int, int], steps: int) -> Recipe:
        world, ep, stage = layout
        return small_recipe(
            run_root,
            name,
            steps=steps,
            schedule={"kind": "wsd", "decay_share": 0.0},
            batch={"micro_sequences": 8 // world},
            parallel={"ep_size": ep, "zero_stage": stage},
            trainer={"save_every": 3},
        )

    whole = recipe("whole", before, 6)
    pool.run(train, whole, world_size=before[0])
    # the first half of the same run, by dropping the last checkpoint
    last = list_checkpoints(whole.folder.checkpoints_dir)[-1]
    expected = curve(whole)
    last.rename(run_root / "last")
    resumed = recipe("whole", after, 6)
    pool.run(train, resumed, True, world_size=after[0])
    rows = curve(resumed)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[:3] == expected[:3]
    for row, old in zip(rows[3:], expected[3:], strict=True):
        assert row["train/loss"] == pytest.approx(old["train/loss"], rel=2e-6)
        assert row["train/grad_norm"] == pytest.approx(old["train/grad_norm"], rel=2e-5)
