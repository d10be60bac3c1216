"""Chains of experts: one process and two with expert parallelism give the same curve, and a resumed run its own.

As test_layouts.py does for kinds of routers.
"""

from typing import Any

import pytest

from moe.blocks.chain import ChainConfig
from moe.recipe import main
from moe.routers.topk import TopKConfig
from pretrain_chain_of_experts import pretrain_chain_of_experts
from runs import curve, small_recipe, stop_after, train

STEPS = 5
FORMS: dict[str, dict[str, Any]] = {
    "chain": {
        "chain": ChainConfig(rounds=2),
        "shared_expert_intermediate_size": 32,
        "router": TopKConfig(use_selection_bias=True, scoring_func="sigmoid", router_jitter_noise=0.05),
    },
    "chain_shared_router": {
        "chain": ChainConfig(rounds=3, residual="preln", has_shared_router=True, shared_expert="once"),
        "shared_expert_intermediate_size": 32,
        "router": TopKConfig(use_selection_bias=True),
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_with_expert_parallelism_and_recomputation_give_the_curve_of_one(pool, run_root, form):
    balance = {"scope": "exact"}
    one = small_recipe(run_root, "one", steps=STEPS, model=FORMS[form], balance=balance)
    two = small_recipe(
        run_root,
        "two",
        steps=STEPS,
        model=FORMS[form],
        balance=balance,
        parallel={"ep_size": 2, "zero_stage": 2, "activation_checkpointing": True},
        batch={"micro_sequences": 1},
    )
    pool.run(train, one, world_size=1)
    pool.run(train, two, world_size=2)
    assert len(curve(one)) == len(curve(two)) == STEPS
    for a, b in zip(curve(one), curve(two), strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=2e-6)
        assert b["train/load_balancing_loss"] == pytest.approx(a["train/load_balancing_loss"], rel=2e-6)
        assert b["train/grad_norm"] == pytest.approx(a["train/grad_norm"], rel=2e-5)
        assert b["moe/load_max_over_mean"] == a["moe/load_max_over_mean"]


@pytest.mark.parametrize("form", FORMS)
def test_a_resumed_run_goes_on_to_the_bit(pool, run_root, form):
    whole = small_recipe(run_root, "whole", model=FORMS[form])
    parts = small_recipe(run_root, "parts", model=FORMS[form], trainer={"save_every": 3})
    pool.run(train, whole, world_size=1)
    pool.run(stop_after, parts, 4, world_size=1)
    pool.run(train, parts, True, world_size=1)
    assert curve(parts) == curve(whole)


@pytest.mark.parametrize("recipe", [pretrain_chain_of_experts()], ids=lambda recipe: recipe.name)
def test_recipes_can_be_planned_on_one_rank_and_on_two(recipe, capsys):
    main(recipe, args=["--dry-run"])
    main(recipe, args=["--dry-run", "--world-size", "2", "--parallel.ep-size", "2", "--parallel.zero-stage", "1"])
    assert capsys.readouterr().out.count("GiB on each rank") == 2
