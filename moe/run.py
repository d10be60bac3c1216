"""Run folder: what a name on disk holds, and whether a launch may start, continue or leave it alone.

runs/<name>/  recipe.json   metrics.jsonl   checkpoints/step_00000100/   tokenizer/   run.lock   *.png
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe.checkpoint import (
    CheckpointError,
    CheckpointReader,
    RunLock,
    list_checkpoints,
    newest_checkpoint,
    open_any_model,
    remove_leftovers,
    write_json_atomic,
    write_text_atomic,
)
from moe.config import ModelConfig

# what may change between a run and its continuation: where and how often, not what is computed
_FREE_ON_RESUME = (
    "parallel.ep_size",
    "parallel.zero_stage",
    "parallel.activation_checkpointing",
    "parallel.timeout_s",
    "backend",
    "tracker",
    "runs_dir",
    "batch.micro_sequences",
    "trainer.log_every",
    "trainer.eval_every",
    "trainer.save_every",
    "trainer.eval_sequences",
    "trainer.keep_checkpoints",
    "trainer.max_skipped_steps",
    "trainer.debug",
    "data.cache_dir",
    # the fingerprint of the data holds what they say, wherever it lies
    "data.sources",
    "data.tokenizer",
    "init_from",  # has been read, and may be gone
    "name",  # of the folder, which may be renamed
)


class RecipeError(ValueError):
    """A recipe, a run folder or data that cannot be used; the message says what, why and what to do."""


def open_weights(path: Path, *, check_hashes: bool = True) -> tuple[ModelConfig, CheckpointReader]:
    """Return model and weights that a run may start from: of a model folder, a checkpoint, or a run's newest one.

    Raises RecipeError if there is none, or it is damaged.
    """
    try:
        return open_any_model(path, check_hashes=check_hashes)
    except CheckpointError as error:
        raise RecipeError(f"init_from = {str(path)!r}: {error}") from error


def check_same_model(model: ModelConfig, path: Path) -> None:
    """Raise RecipeError naming the fields in which the model in `path` computes something else than `model`."""
    differences = model.differences(open_weights(path, check_hashes=False)[0])
    if differences:
        text = "; ".join(f"model.{difference}" for difference in differences)
        raise RecipeError(f"init_from = {str(path)!r} holds another model: {text}")


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a launch does with a folder."""

    action: Literal["new", "resume", "finished"]
    checkpoint: Path | None = None


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The folder of one run; rank 0 alone writes to it, checkpoints apart."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tokenizer_dir(self) -> Path:
        return self.path / "tokenizer"

    def lock(self) -> RunLock:
        """Take the folder for this process.

        Raises RunLockedError naming the owner, RecipeError if the folder cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return RunLock.acquire(self.path)
        except OSError as error:
            raise RecipeError(
                f"the run folder {self.path} cannot be written: {error.strerror}; choose another --runs-dir"
            ) from error

    def check_data(self, fingerprint: str) -> None:
        """Raise RecipeError if the newest checkpoint was trained on other data; nothing is written."""
        for checkpoint in reversed(list_checkpoints(self.checkpoints_dir)):
            try:
                saved = CheckpointReader.open(checkpoint, check_hashes=False).state["data_fingerprint"]
            except CheckpointError:
                continue  # `open` reports it by name
            if saved != fingerprint:
                raise RecipeError(
                    f"{checkpoint} was trained on other data (fingerprint {saved}, now {fingerprint}); bring the data "
                    "back, or start a run of another --name"
                )
            return

    def open(
        self,
        recipe: dict[str, Any],
        *,
        resume: bool,
        steps: int,
        read: Callable[[Any], dict[str, Any]] = dict,
        report: Any = print,
    ) -> Start:
        """Return what to do, with recipe.json written and rows past the checkpoint dropped from metrics.jsonl.

        Args:
            read: gives the recipe in a checkpoint the fields that recipes have come to have since, at their defaults.

        Raises:
            RecipeError: the folder holds a run and `resume` is not set, the recipe differs where it must not, or no
                checkpoint is good.
        """
        if not self.recipe_file.exists() and not self.checkpoints_dir.exists():
            write_json_atomic(self.recipe_file, recipe)
            return Start(action="new")
        remove_leftovers(self.checkpoints_dir)
        newest = newest_checkpoint(self.checkpoints_dir, report=report)
        damaged = [] if newest else list_checkpoints(self.checkpoints_dir)
        if damaged:
            raise RecipeError(
                f"{self.path}: none of its {len(damaged)} checkpoints is good, the newest is {damaged[-1].name}; bring "
                "one back, or move the folder away to start again"
            )
        if newest is None and not any("train/loss" in row for row in read_rows(self.metrics_file)):
            # an earlier start got no further than this; nothing is lost by starting again
            self.metrics_file.unlink(missing_ok=True)
            write_json_atomic(self.recipe_file, recipe)
            return Start(action="new")
        saved_step = 0
        if newest is not None:
            reader = CheckpointReader.open(newest, check_hashes=False)
            try:
                saved = read(reader.state["recipe"])
            except ValueError as error:
                raise RecipeError(f"{newest} holds a recipe that cannot be read any more: {error}") from error
            self._check_same(recipe, saved)
            saved_step = reader.state["step"]
            if saved_step >= steps:
                return Start(action="finished", checkpoint=newest)
        if not resume:
            where = f"its newest checkpoint is {newest.name}" if newest else "it has no complete checkpoint"
            raise RecipeError(
                f"{self.path} holds a run already ({where}); add --resume to continue it, choose another --name, "
                "or remove the folder"
            )
        write_json_atomic(self.recipe_file, recipe)
        if newest is None:
            report(f"{self.path} holds no complete checkpoint; starting from step 0")
        self._drop_rows_after(saved_step)
        return Start(action="resume" if newest else "new", checkpoint=newest)

    def _check_same(self, recipe: dict[str, Any], saved: dict[str, Any]) -> None:
        differences = [
            f"{name} = {new!r} (the run has {old!r})"
            for name, new, old in _differences(recipe, saved)
            if not any(name == free or name.startswith(f"{free}.") for free in _FREE_ON_RESUME)
        ]
        if differences:
            raise RecipeError(
                f"{self.path} holds a run of another recipe: {'; '.join(differences)}; "
                "choose another --name, or set these fields back"
                + ("; the schedule depends on trainer.steps" if "trainer.steps" in str(differences) else "")
            )

    def _drop_rows_after(self, step: int) -> None:
        """Rewrite metrics.jsonl without what the continued run will log again, and mark the place."""
        lines = _complete_lines(self.metrics_file)
        # the lines themselves, not rows written anew: what stays, stays to the byte
        kept = [line for line in lines if json.loads(line)["step"] <= step] if step else []
        marker = {"step": step, "resume": True, "dropped_rows": len(lines) - len(kept)}
        write_text_atomic(self.metrics_file, "".join([*kept, json.dumps(marker) + "\n"]))


def read_rows(metrics_file: Path) -> list[dict[str, Any]]:
    """Return the complete rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    return [json.loads(line) for line in _complete_lines(metrics_file)]


def _complete_lines(file: Path) -> list[str]:
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def _differences(new: Any, old: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(new, dict) and isinstance(old, dict):
        keys = list(dict.fromkeys([*new, *old]))
        return [
            difference
            for key in keys
            for difference in _differences(new.get(key), old.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if new == old else [(name, new, old)]
