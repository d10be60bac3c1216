"""Runs of the debug recipe for tests: small, on data prepared once per session, launched in the process pool."""

import json
import shutil
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import moe.recipe
from debug import debug
from faults import around_steps
from moe.recipe import Recipe, launch


def small_recipe(root: Path, name: str = "run", *, steps: int = 6, **changes: dict[str, Any]) -> Recipe:
    """The debug recipe with a row per step, all folders under `root`; `changes` replace fields of its parts."""
    recipe = debug()
    recipe = replace(
        recipe,
        name=name,
        runs_dir=str(root / "runs"),
        data=replace(recipe.data, cache_dir=str(root / "data"), builtin_bytes=60_000, vocab_size=512),
        model=replace(recipe.model, vocab_size=512),
        schedule=replace(recipe.schedule, warmup_steps=2),
        trainer=replace(recipe.trainer, steps=steps, log_every=1, eval_sequences=3),
    )
    for part, fields in changes.items():
        recipe = replace(recipe, **{part: replace(getattr(recipe, part), **fields)})
    return recipe


def train(recipe: Recipe, resume: bool = False) -> None:
    """Launch on the ranks of the pool; without the pictures and the text at the end, a third of a small run."""
    with without_report():
        launch(recipe, resume=resume)


def without_report() -> AbstractContextManager[Any]:
    """Leave out what a run prints when it is done. Tests of that launch for themselves, or a process."""
    return patch.object(moe.recipe, "_report", lambda *_: None)


def stop_after(recipe: Recipe, step: int) -> None:
    """Train until an error in the middle of `step`: what was saved before it is all there is."""

    def around(_, current, run):
        if current == step + 1:
            raise InterruptedError
        return run()

    with around_steps(around), pytest.raises(InterruptedError):
        launch(recipe)


def rows_of(recipe: Recipe) -> list[dict[str, Any]]:
    """All rows of metrics.jsonl."""
    lines = (Path(recipe.runs_dir) / recipe.name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def curve(recipe: Recipe) -> list[dict[str, Any]]:
    """The training rows without speeds, which no two runs share."""
    return [
        {key: value for key, value in row.items() if not key.startswith("perf/")}
        for row in rows_of(recipe)
        if "train/loss" in row
    ]


def copy_data(prepared: Path, root: Path) -> None:
    """Put data prepared earlier where `small_recipe(root)` looks for it."""
    shutil.copytree(prepared, root / "data")
