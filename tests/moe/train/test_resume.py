"""Killed and resumed, a run goes on exactly: same rows, same weights. And a checkpoint fits every layout."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from faults import ROOT, tensors_of
from moe.checkpoint import list_checkpoints
from moe.recipe import Recipe
from moe.routers.topk import TopKConfig
from runs import curve, rows_of, small_recipe, train


@pytest.mark.parametrize(
    ("dtype", "stage", "scope", "world", "accumulation"),
    [
        ("fp32", 1, "lagged", 1, 1),
        ("fp32", 0, "exact", 1, 3),
        ("fp32", 2, "lagged", 2, 1),
        ("fp32", 0, "exact", 2, 3),
        ("bf16", 2, "exact", 1, 1),
        ("bf16", 1, "lagged", 1, 3),
        ("bf16", 1, "exact", 2, 1),
        ("bf16", 2, "lagged", 2, 3),
    ],
)
def test_twenty_steps_are_ten_and_ten_more(pool, run_root, dtype, stage, scope, world, accumulation):
    """What a kill after step 10 leaves, by taking the later checkpoints away; every row and tensor to the bit."""
    recipe = small_recipe(
        run_root,
        steps=20,
        batch={"global_sequences": 6, "micro_sequences": 6 // world // accumulation, "sequence_length": 32},
        parallel={"dtype": dtype, "zero_stage": stage, "ep_size": world},
        balance={"scope": scope, "smoothing": 0.5 if scope == "lagged" else 0.0},
        trainer={"save_every": 10},
    )
    router = TopKConfig(norm_topk_prob=True, use_selection_bias=True, router_jitter_noise=0.05)
    recipe = replace(recipe, model=replace(recipe.model, router=router))
    pool.run(train, recipe, world_size=world)
    rows, tensors = curve(recipe), tensors_of(recipe)
    assert len({row["moe/load_cv"] for row in rows}) > 1
    assert any(tensor.any() for name, tensor in tensors.items() if name.endswith("selection_bias"))
    assert ("balance/lagged_LE" in tensors) == (scope == "lagged")
    list_checkpoints(recipe.folder.checkpoints_dir)[-1].rename(run_root / "later")

    pool.run(train, recipe, True, world_size=world)
    assert curve(recipe) == rows
    assert [row["step"] for row in rows_of(recipe) if row.get("resume")] == [10]
    again = tensors_of(recipe)
    assert again.keys() == tensors.keys()
    assert [name for name in again if not torch.equal(again[name], tensors[name])] == []


@pytest.mark.parametrize(
    ("kills", "flags"),
    [
        (1, "--steps 6"),
        (1, "--steps 6 --ranks 2 --dtype bf16 --scope lagged --accumulation 1"),
    ],
)
def test_a_run_killed_at_random_moments_comes_through_exactly(prepared_data, kills, flags):
    command = f"benchmarks/random_kills.py --kills {kills} {flags} --cache-dir {prepared_data}"
    result = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, check=False, timeout=200
    )
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads(result.stdout[result.stdout.index("{") :])
    assert figures["kills"] == kills
    assert figures["resumes"], "killed too late to tell"
    assert figures["different_rows"] == figures["different_tensors"] == 0
    assert figures["rows"] == int(flags.split()[1])
    assert figures["most_lost_steps"] <= 2


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
