"""Training a part of a model: what is not trained stays to the bit, on every layout, also over a resumption."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe.checkpoint import CheckpointReader, newest_checkpoint
from moe.recipe import RecipeError, launch
from moe.routers.topk import TopKConfig
from moe.train.optimizer import OptimizerConfig, freeze
from runs import curve, small_recipe, stop_after, train
from tiny import tiny_config, tiny_model

TEACHING = {"scope": "exact", "domain_groups": ("maths", "python"), "domain_coefficient": 0.5}


def recipe_of(root: Path, name: str, **parallel):
    recipe = small_recipe(root, name, balance=TEACHING, parallel=parallel)
    optimizer = replace(recipe.optimizer, trainable=("*.router.*",), learning_rate=1e-3)
    return replace(recipe, optimizer=optimizer)


def tensors_of(recipe, step: int | None = None) -> dict[str, torch.Tensor]:
    folder = Path(recipe.runs_dir) / recipe.name / "checkpoints"
    path = folder / f"step_{step:08d}" if step is not None else newest_checkpoint(folder, report=lambda _: None)
    reader = CheckpointReader.open(path)
    return {name: reader.read(name) for name in reader.names}


def test_only_what_is_named_trains_and_moves_and_has_moments():
    model = tiny_model(tiny_config())
    freeze(model, OptimizerConfig(trainable=("*.router.*", "norm.weight")))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"layers.0.moe.router.weight", "layers.2.moe.router.weight", "norm.weight"}
    with pytest.raises(ValueError, match=r"'\*.gate.\*'.* layers\.\*\.moe\.router\.weight"):
        freeze(model, OptimizerConfig(trainable=("*.gate.*",)))


def test_one_process_and_two_with_sharded_state_train_the_same_and_leave_the_rest(pool, run_root):
    one = recipe_of(run_root, "one")
    pool.run(train, one, world_size=1)
    two = recipe_of(run_root, "two", ep_size=2, zero_stage=2)
    pool.run(train, two, world_size=2)
    for row, other in zip(curve(one), curve(two), strict=True):
        for name in ("train/loss", "train/grad_norm", "moe/domain_loss", "moe/domain_accuracy"):
            assert other[name] == pytest.approx(row[name], rel=1e-5), name
    losses = [row["moe/domain_loss"] for row in curve(one)]
    assert losses[-1] < losses[0] - 0.005

    idle = replace(one, name="idle", trainer=replace(one.trainer, steps=1))
    idle = replace(
        idle, optimizer=replace(idle.optimizer, learning_rate=1e-30), schedule=replace(idle.schedule, warmup_steps=0)
    )
    pool.run(train, idle, world_size=1)
    start, ends = tensors_of(idle), (tensors_of(one), tensors_of(two))
    for end in ends:
        assert {name for name in end if name.startswith("exp_avg/")} == {
            name.replace("model/", "exp_avg/") for name in end if name.endswith("router.weight") and name[:5] == "model"
        }
        for name in start:
            if name.startswith("model/"):
                assert torch.equal(start[name], end[name]) != name.endswith("router.weight"), name


def test_an_interrupted_run_goes_on_to_the_bit(pool, run_root):
    whole = recipe_of(run_root, "whole", dtype="bf16", zero_stage=1)
    pool.run(train, whole, world_size=1)
    cut = replace(whole, name="cut", trainer=replace(whole.trainer, save_every=3))
    pool.run(stop_after, cut, 4, world_size=1)
    pool.run(train, cut, True, world_size=1)
    ends = tensors_of(whole), tensors_of(cut)
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"trainable": ("*.gate.*",)}}, "no parameter of the model is called"),
        ({"balance": {"domain_groups": ("latin",), "domain_coefficient": 0.1}}, "names 'latin'"),
        ({"balance": {**TEACHING, "domain_groups": ("maths", "python", "cpp")}}, "3 groups, which do not divide"),
        ({"model": {"num_experts_per_tok": 1, "router": TopKConfig(norm_topk_prob=True)}}, "no gradient"),
    ],
)
def test_what_cannot_be_trained_is_refused_at_once(tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message):
        launch(small_recipe(tmp_path, **changes))


def test_a_router_that_gets_no_gradient_may_stand_still(tmp_path):
    changes = {"num_experts_per_tok": 1, "router": TopKConfig(norm_topk_prob=True)}
    recipe = small_recipe(tmp_path, model=changes, optimizer={"trainable": ("*.experts.*",)})
    recipe.validate(world_size=1)
