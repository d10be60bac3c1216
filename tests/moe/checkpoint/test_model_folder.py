"""Models on disk, whoever made them: a model folder, a run, a checkpoint; what is damaged is not passed over."""

from pathlib import Path

import pytest
import torch

from moe.checkpoint import CheckpointError, Shard, open_any_model, save_checkpoint
from moe.checkpoint.model_folder import write_model
from moe.checkpoint.stream import Entry
from moe.recipe import Recipe
from runs import small_recipe
from tiny import tiny_config


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    return small_recipe(tmp_path)


def save(run: Path, step: int, recipe: Recipe) -> Path:
    shard = Shard(name="model/w", tensor=torch.full((8,), float(step)), logical_shape=(8,))
    state = {"step": step, "recipe": recipe.to_json()}
    return save_checkpoint(run / "checkpoints", step=step, shards=[shard], state=state)


def damage(checkpoint: Path) -> None:
    file = next(checkpoint.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_model_folder_a_run_and_a_checkpoint_are_opened(tmp_path, recipe):
    save(tmp_path / "run", 2, recipe)
    last = save(tmp_path / "run", 4, recipe)
    for path in (tmp_path / "run", last):
        config, reader = open_any_model(path)
        assert config == recipe.model
        assert torch.equal(reader.read("model/w"), torch.full((8,), 4.0))
    entry = Entry(name="model/w", dtype=torch.float32, shape=(3,))
    write_model(tmp_path / "model", tiny_config(), [entry], iter([torch.ones(3)]), origin="a test")
    config, reader = open_any_model(tmp_path / "model")
    assert config == tiny_config() and torch.equal(reader.read("model/w"), torch.ones(3))


def test_a_damaged_newest_checkpoint_is_no_reason_to_take_an_older_one(tmp_path, recipe):
    older = save(tmp_path / "run", 2, recipe)
    damage(save(tmp_path / "run", 4, recipe))
    with pytest.raises(CheckpointError, match=r"step_00000004.* to start from an older checkpoint, name it"):
        open_any_model(tmp_path / "run")
    assert open_any_model(older)[1].step == 2
    damage(older)
    with pytest.raises(CheckpointError, match="sha256"):
        open_any_model(older)


def test_a_folder_that_is_none_of_these_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is no model folder, run or checkpoint"):
        open_any_model(tmp_path)
