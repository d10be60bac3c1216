"""Chains of experts and shared pools: one process and two with expert parallelism give the same curve, and a resumed
run its own.

As test_layouts.py does for kinds of routers.
"""

from dataclasses import replace
from typing import Any

import pytest

from moe.blocks.chain import ChainConfig
from moe.cli import open_model
from moe.data.prepare import prepare
from moe.parallel.groups import ParallelGroups
from moe.recipe import main
from moe.routers.cross_layer import ReuseConfig
from moe.routers.topk import TopKConfig
from moe.run import RecipeError
from moe.train.evaluate import evaluate
from pretrain_chain_of_experts import pretrain_chain_of_experts
from pretrain_cross_layer import pretrain_cross_layer
from runs import curve, rows_of, small_recipe, stop_after, train

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
    "cross_layer": {
        "reuse": ReuseConfig(group_size=2, schedule="linear", start=0.0, end=1.0),
        "shared_expert_intermediate_size": 32,
    },
    # the last pool is smaller
    "cross_layer_as_in_the_paper": {
        "num_hidden_layers": 3,
        "reuse": ReuseConfig(group_size=2, schedule="stepwise", start=0.3, end=0.9, keep="random", mask="zero_score"),
    },
    "chain_in_a_shared_pool": {
        "chain": ChainConfig(rounds=2),
        "reuse": ReuseConfig(group_size=2, schedule="linear", start=0.2, end=0.9),
        "router": TopKConfig(router_jitter_noise=0.05),
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


def test_a_checkpoint_is_evaluated_with_the_experts_that_were_open_at_its_step(run_root):
    reuse = ReuseConfig(group_size=2, schedule="linear", start=0.2, end=0.9)
    recipe = small_recipe(run_root, model={"reuse": reuse}, trainer={"save_every": 3, "eval_every": 3})
    train(recipe)
    for step in (3, 6):
        opened = open_model(recipe.folder.path / "checkpoints" / f"step_{step:08d}")
        model, results = opened.load(), {}
        for name, context in (("at its step", opened.context), ("all open", None)):
            results[name] = evaluate(
                model,
                prepare(recipe.data),
                groups=ParallelGroups.single(),
                sequence_length=recipe.batch.sequence_length,
                batch_sequences=recipe.batch.micro_sequences,
                max_sequences=recipe.trainer.eval_sequences,
                context=context,
            )
        (logged,) = [row for row in rows_of(recipe) if row["step"] == step and "eval/python/loss" in row]
        for domain, result in results["at its step"].items():
            assert result.loss == logged[f"eval/{domain}/loss"]
            assert (result.loss == results["all open"][domain].loss) == (step == 6)


def test_counts_of_earlier_steps_do_not_go_with_a_growing_pool(tmp_path):
    growing = {"reuse": ReuseConfig(group_size=2, schedule="linear")}
    with pytest.raises(RecipeError, match="balance.scope = 'lagged' counts the steps before"):
        small_recipe(tmp_path, model=growing, balance={"scope": "lagged"}).validate(world_size=1)


def test_a_pool_that_does_not_divide_over_the_ranks_is_refused(tmp_path):
    uneven = small_recipe(
        tmp_path, model={"num_hidden_layers": 3, "num_experts": 5, "reuse": ReuseConfig(group_size=2)}
    )
    with pytest.raises(RecipeError, match="ep_size = 2 does not divide the 5 experts"):
        replace(uneven, parallel=replace(uneven.parallel, ep_size=2)).validate(world_size=2)


@pytest.mark.parametrize(
    "recipe", [pretrain_chain_of_experts(), pretrain_cross_layer()], ids=lambda recipe: recipe.name
)
def test_recipes_can_be_planned_on_one_rank_and_on_two(recipe, capsys):
    main(recipe, args=["--dry-run"])
    main(recipe, args=["--dry-run", "--world-size", "2", "--parallel.ep-size", "2", "--parallel.zero-stage", "1"])
    assert capsys.readouterr().out.count("GiB on each rank") == 2
