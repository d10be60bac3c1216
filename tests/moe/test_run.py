"""The run folder: start, continue, leave alone or refuse; and metrics.jsonl after a kill."""

import json

import pytest
import torch

from moe.checkpoint import Shard, save_checkpoint, write_json_atomic
from moe.recipe import up_to_date
from moe.run import RecipeError, RunFolder, read_rows
from runs import small_recipe


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(path=tmp_path / "run")


@pytest.fixture
def recipe(tmp_path) -> dict:
    return small_recipe(tmp_path, steps=6).to_json()


def save(folder: RunFolder, step: int, recipe: dict) -> None:
    shard = Shard(name="w", tensor=torch.arange(8.0), logical_shape=(8,))
    save_checkpoint(folder.checkpoints_dir, step=step, shards=[shard], state={"step": step, "recipe": recipe})


def log(folder: RunFolder, *steps: int, tail: str = "") -> list[str]:
    """Rows as a tracker writes them, figures with all their digits; the lines without their ends."""
    lines = [json.dumps({"step": step, "train/loss": 1 / (step + 3), "moe/load_cv": None}) for step in steps]
    folder.metrics_file.write_text("".join(line + "\n" for line in lines) + tail, encoding="utf-8")
    return lines


def changed(recipe: dict, name: str, value) -> dict:
    copy = json.loads(json.dumps(recipe))
    part = copy
    *path, last = name.split(".")
    for key in path:
        part = part[key]
    assert part[last] != value
    part[last] = value
    return copy


@pytest.mark.parametrize("resume", [False, True])
def test_an_empty_folder_is_a_new_run(folder, recipe, resume):
    start = folder.open(recipe, resume=resume, steps=6)
    assert (start.action, start.checkpoint) == ("new", None)
    assert json.loads(folder.recipe_file.read_text()) == recipe


def test_a_run_with_checkpoints_continues_only_when_told_to(folder, recipe):
    write_json_atomic(folder.recipe_file, recipe)
    save(folder, 2, recipe)
    save(folder, 4, recipe)
    log(folder, 1, 2, 3, 4, 5)
    before = folder.metrics_file.read_bytes()
    with pytest.raises(RecipeError, match=r"newest checkpoint is step_00000004\); add --resume .* another --name"):
        folder.open(recipe, resume=False, steps=6)
    assert folder.metrics_file.read_bytes() == before
    start = folder.open(recipe, resume=True, steps=6)
    assert start.action == "resume"
    assert start.checkpoint == folder.checkpoints_dir / "step_00000004"


def test_a_run_saved_before_recipes_had_a_field_continues_with_its_default(folder, recipe):
    old = json.loads(json.dumps(recipe))
    del old["optimizer"]["trainable"], old["model"]["rope_scaling"]["rope_type"], old["balance"]["domain_groups"]
    write_json_atomic(folder.recipe_file, old)
    save(folder, 4, old)
    assert folder.open(recipe, resume=True, steps=6, read=up_to_date).action == "resume"
    other = changed(recipe, "optimizer.trainable", ["*.router.*"])
    with pytest.raises(RecipeError, match="optimizer.trainable"):
        folder.open(other, resume=True, steps=6, read=up_to_date)
    save(folder, 5, {**old, "forgotten": 1})
    with pytest.raises(RecipeError, match=r"(?s)cannot be read any more.*forgotten"):
        folder.open(recipe, resume=True, steps=6, read=up_to_date)


@pytest.mark.parametrize("resume", [False, True])
def test_a_finished_run_is_left_as_it_is(folder, recipe, resume):
    write_json_atomic(folder.recipe_file, recipe)
    save(folder, 6, recipe)
    log(folder, 5, 6)
    before = folder.metrics_file.read_bytes()
    start = folder.open(recipe, resume=resume, steps=6)
    assert start.action == "finished"
    assert start.checkpoint == folder.checkpoints_dir / "step_00000006"
    assert folder.metrics_file.read_bytes() == before


def test_a_run_killed_before_its_first_save_starts_again_when_told_to(folder, recipe):
    write_json_atomic(folder.recipe_file, recipe)
    log(folder, 0, 1, 2)
    with pytest.raises(RecipeError, match="no complete checkpoint"):
        folder.open(recipe, resume=False, steps=6)
    said: list[str] = []
    start = folder.open(recipe, resume=True, steps=6, report=said.append)
    assert (start.action, start.checkpoint) == ("new", None)
    assert "starting from step 0" in said[0]
    assert read_rows(folder.metrics_file) == [{"step": 0, "resume": True, "dropped_rows": 3}]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 5),
        ("model.num_experts_per_tok", 3),
        ("model.router.use_selection_bias", True),
        ("balance.scope", "exact"),
        ("optimizer.learning_rate", 0.5),
        ("batch.global_sequences", 16),
        ("parallel.dtype", "bf16"),
        ("trainer.steps", 7),
        ("schedule.kind", "wsd"),
    ],
)
def test_what_changes_the_run_is_refused_by_name(folder, recipe, name, value):
    write_json_atomic(folder.recipe_file, recipe)
    save(folder, 2, recipe)
    log(folder, 1, 2, 3)
    before = folder.metrics_file.read_bytes()
    other = changed(recipe, name, value)
    with pytest.raises(RecipeError, match=rf"{name} = {value!r} \(the run has ") as caught:
        folder.open(other, resume=True, steps=6)
    assert str(caught.value).count("the run has") == 1
    assert folder.metrics_file.read_bytes() == before
    assert json.loads(folder.recipe_file.read_text()) == recipe


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("parallel.ep_size", 2),
        ("parallel.zero_stage", 2),
        ("parallel.activation_checkpointing", True),
        ("parallel.timeout_s", 60.0),
        ("batch.micro_sequences", 4),
        ("backend", "naive"),
        ("tracker.wandb", "offline"),
        ("trainer.log_every", 3),
        ("trainer.eval_every", 3),
        ("trainer.save_every", 3),
        ("trainer.eval_sequences", 4),
        ("trainer.keep_checkpoints", 9),
        ("trainer.max_skipped_steps", 9),
        ("trainer.debug", True),
        ("data.cache_dir", "elsewhere"),
        ("runs_dir", "elsewhere"),
    ],
)
def test_what_changes_only_where_or_how_often_may_change(folder, recipe, name, value):
    write_json_atomic(folder.recipe_file, recipe)
    save(folder, 2, recipe)
    other = changed(recipe, name, value)
    assert folder.open(other, resume=True, steps=6).action == "resume"
    assert json.loads(folder.recipe_file.read_text()) == other


def test_damaged_checkpoints_are_passed_over_and_named(folder, recipe):
    write_json_atomic(folder.recipe_file, recipe)
    for step in (2, 3, 4):
        save(folder, step, recipe)
    log(folder, 1, 2, 3, 4)
    next((folder.checkpoints_dir / "step_00000004").glob("*.safetensors")).unlink()
    (folder.checkpoints_dir / "step_00000003" / "state.json").write_text("{}")
    (folder.checkpoints_dir / ".tmp-step_00000005").mkdir()
    said: list[str] = []
    start = folder.open(recipe, resume=True, steps=6, report=said.append)
    assert start.checkpoint == folder.checkpoints_dir / "step_00000002"
    assert ["step_00000004" in said[0], "step_00000003" in said[1], len(said)] == [True, True, 2]
    assert [row["step"] for row in read_rows(folder.metrics_file)] == [1, 2, 2]
    left = {path.name for path in folder.checkpoints_dir.iterdir()}
    assert left == {"step_00000002", "step_00000003", "step_00000004"}, "damaged ones stay, leftovers go"


@pytest.mark.parametrize("tail", ["", '{"step": 5, "train/lo', '{"step": 5, "train/loss": 1.0}'])
def test_rows_past_the_checkpoint_go_and_rows_before_stay_to_the_byte(folder, recipe, tail):
    write_json_atomic(folder.recipe_file, recipe)
    save(folder, 3, recipe)
    lines = log(folder, 0, 1, 2, 3, 3, 4, 4, tail=tail)
    folder.metrics_file.write_text(
        folder.metrics_file.read_text().replace(lines[1], '{"step":1, "note": "caf\\u00e9", "x": 1e-05}')
    )
    expected = b"".join(folder.metrics_file.read_bytes().splitlines(keepends=True)[:5])
    folder.open(recipe, resume=True, steps=6)
    written = folder.metrics_file.read_bytes()
    assert written[: len(expected)] == expected
    assert json.loads(written[len(expected) :]) == {"step": 3, "resume": True, "dropped_rows": 2}
    assert written.endswith(b"\n")
    assert not list(folder.path.glob(".tmp*"))

    # once more from an older checkpoint: the marker of the first time goes with the rows that it stood among
    save(folder, 2, recipe)
    next((folder.checkpoints_dir / "step_00000003").glob("*.safetensors")).unlink()
    folder.open(recipe, resume=True, steps=6, report=lambda _: None)
    assert [row["step"] for row in read_rows(folder.metrics_file)] == [0, 1, 2, 2]


def test_reading_rows_leaves_out_a_line_cut_short(folder):
    log(folder, 1, 2, tail='{"step": 3')
    assert [row["step"] for row in read_rows(folder.metrics_file)] == [1, 2]
    assert read_rows(folder.path / "missing.jsonl") == []
