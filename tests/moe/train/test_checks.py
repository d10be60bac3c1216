"""Debug mode: copies that differ by one bit and parameters that stand still end the run; a healthy run passes."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from faults import run_main
from moe.blocks.feed_forward import FeedForward
from moe.routers.topk import TopKRouter
from moe.train.checks import ReplicaError, UnmovedError
from runs import curve, small_recipe


def debug_recipe(root, name="run", *, ep=1, stage=1, dtype="fp32", **changes):
    recipe = small_recipe(
        root,
        name,
        parallel={"ep_size": ep, "zero_stage": stage, "dtype": dtype},
        trainer={"debug": True, "steps": 3, "log_every": 1, **changes},
        schedule={"warmup_steps": 3},
    )
    # with a shared expert and a dense layer, so that every kind of parameter is looked at
    model = replace(
        recipe.model,
        shared_expert_intermediate_size=16,
        mlp_only_layers=(0,),
        intermediate_size=48,
        num_hidden_layers=3,
    )
    return replace(recipe, model=model, batch=replace(recipe.batch, micro_sequences=2))


def outcome(recipe, plant: Callable[[], Any] = nullcontext) -> str:
    """What became of the run on this rank: the error by name, or its exit code."""
    with plant():
        try:
            return str(run_main(recipe))
        except (ReplicaError, UnmovedError) as error:
            return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("world", "ep", "stage", "dtype"),
    [
        (1, 1, 2, "bf16"),
        (2, 2, 0, "fp32"),
        (2, 1, 1, "bf16"),
        (2, 2, 2, "fp32"),
        (4, 2, 1, "fp32"),
    ],
)
def test_a_healthy_run_passes(pool, run_root, world, ep, stage, dtype):
    recipe = debug_recipe(run_root, ep=ep, stage=stage, dtype=dtype)
    if dtype == "bf16":  # updates far below what bfloat16 can show
        recipe = replace(recipe, optimizer=replace(recipe.optimizer, learning_rate=1e-5))
    assert pool.run(outcome, recipe, world_size=world) == ["0"] * world
    assert len(curve(recipe)) == 3


def tamper(name: str, rank: int):
    """After the second update, move one weight of one rank by one bit."""
    from moe.train.engine import Engine

    plain, calls = Engine.step, []

    def step(self, **arguments):
        result = plain(self, **arguments)
        calls.append(0)
        if len(calls) == 2 and dist.get_rank() == rank:
            weight = dict(self.module.named_parameters())[name].data.view(-1)
            weight[5] = torch.nextafter(weight[5], torch.tensor(9.0, dtype=weight.dtype))
        return result

    return patch.object(Engine, "step", step)


def tampered_outcome(recipe, name: str, rank: int) -> str:
    try:
        return outcome(recipe, lambda: tamper(name, rank))
    except RuntimeError as error:
        return f"cut off: {type(error).__name__}"


@pytest.mark.parametrize(
    ("world", "ep", "stage", "dtype", "name"),
    [
        (2, 1, 0, "fp32", "layers.1.attention.q_proj.weight"),
        (2, 2, 2, "bf16", "layers.0.feed_forward_norm.weight"),
        (2, 1, 2, "fp32", "layers.1.moe.experts.down_proj"),
        (4, 2, 0, "fp32", "layers.2.moe.experts.gate_up_proj"),
    ],
)
def test_a_copy_that_differs_by_one_bit_is_named(pool, run_root, world, ep, stage, dtype, name):
    recipe = debug_recipe(run_root, ep=ep, stage=stage, dtype=dtype)
    outcomes = pool.run(tampered_outcome, recipe, name, world - 1, world_size=world)
    for rank, text in enumerate(outcomes):
        assert text.startswith(f"ReplicaError: {name} differs between the ranks"), (rank, text)
    assert [row["step"] for row in curve(recipe)] == [1, 2]


def cut_off_router():
    plain = TopKRouter.forward

    def forward(self, x_TD, context):
        routing = plain(self, x_TD.detach(), context)
        assignment = replace(routing.assignment, weight_N=routing.assignment.weight_N.detach())
        return replace(
            routing,
            assignment=assignment,
            logits_TE=routing.logits_TE.detach(),
            probs_TE=routing.probs_TE.detach(),
        )

    return patch.object(TopKRouter, "forward", forward)


def cut_off_feed_forward():
    plain = FeedForward.forward
    return patch.object(FeedForward, "forward", lambda self, x: plain(self, x).detach())


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize(
    ("cut_off", "names"),
    [
        (cut_off_router, ["layers.1.moe.router.weight", "layers.2.moe.router.weight"]),
        (cut_off_feed_forward, ["layers.0.feed_forward.gate_proj.weight", "layers.0.feed_forward.down_proj.weight"]),
    ],
)
def test_parameters_without_a_gradient_are_named_although_weight_decay_moves_them(
    pool, run_root, stage, cut_off, names
):
    recipe = debug_recipe(run_root, stage=stage)
    assert recipe.optimizer.weight_decay > 0
    for text in pool.run(outcome, recipe, cut_off, world_size=2):
        assert text.startswith("UnmovedError: ")
        for name in names:
            assert name in text
        assert "embed_tokens" not in text and "experts." not in text
    assert len(curve(recipe)) == 1


def test_debug_mode_off_looks_at_nothing(pool, run_root):
    recipe = debug_recipe(run_root, debug=False)
    assert pool.run(outcome, recipe, cut_off_router, world_size=2) == ["0", "0"]
