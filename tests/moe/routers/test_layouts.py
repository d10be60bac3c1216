"""Every router on one process and on two with expert parallelism, and resumed: the same curve.

The registry is walked. Routers that look at a whole micro-batch depend on how it is split; for them only the resume.
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from moe.recipe import Recipe
from moe.routers import ROUTERS, RouterConfig
from moe.routers.topk import TopKConfig
from moe.routers.zero_experts import ZeroExpertsConfig
from runs import curve, small_recipe, stop_after, train

# a kind whose extras are worth running too
FORMS: dict[str, list[dict[str, Any]]] = {
    "topk": [{"use_selection_bias": True, "scoring_func": "sigmoid", "router_jitter_noise": 0.05}],
    "zero_experts": [
        {"num_identity_experts": 3, "target_experts_per_tok": 1.5, "num_constant_experts": 1},
        {"bias_update_rule": "pid", "proportional_gain": 0.1, "target_experts_per_tok": 1.5, "num_zero_experts": 1},
    ],
    "dynamic_confidence": [{"target_experts_per_tok": 2.5}, {"max_k": 3, "warmup_steps": 4}],
}
CONFIGS = [(kind, form) for kind in ROUTERS for form in FORMS.get(kind, [{}])]
CAUSAL = [(kind, form) for kind, form in CONFIGS if ROUTERS[kind].is_causal]


def config_of(kind: str, form: dict[str, Any]) -> RouterConfig:
    allow = {field.name: True for field in fields(ROUTERS[kind]) if field.name == "allow_noncausal"}
    return ROUTERS[kind](**allow, **form)


def name_of(value: object) -> str:
    return value if isinstance(value, str) else "-".join(value) or "plain"  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(pool, prepared_data, tmp_path_factory):
    """The curve of one process, by model, trained when it is first asked for."""
    curves: dict[str, list[dict[str, Any]]] = {}

    def get(model: dict[str, Any]) -> list[dict[str, Any]]:
        if str(model) not in curves:
            recipe = recipe_of(tmp_path_factory.mktemp("whole"), "whole", model)
            recipe = replace(recipe, data=replace(recipe.data, cache_dir=str(prepared_data)))
            pool.run(train, recipe, world_size=1)
            curves[str(model)] = curve(recipe)
        return curves[str(model)]

    return get


def recipe_of(root: Path, name: str, model: dict[str, Any], **changes: dict[str, Any]) -> Recipe:
    """Six steps with every loss on routing that the router goes with."""
    coefficient = 0.0 if model["router"].balances_itself else 0.008
    balance = {"scope": "exact", "entropy_coefficient": 1e-3, "coefficient": coefficient}
    return small_recipe(root, name, steps=6, model=model, balance=balance, **changes)


@pytest.mark.parametrize(("kind", "form"), CAUSAL, ids=name_of)
def test_two_ranks_with_expert_parallelism_and_recomputation_give_the_curve_of_one(pool, run_root, whole, kind, form):
    assert_two_ranks_give_the_curve_of_one(pool, run_root, whole, {"router": config_of(kind, form)})


def test_two_ranks_give_the_curve_of_one_where_experts_and_routers_have_biases(pool, run_root, whole):
    router = TopKConfig(softmax_after_topk=True, use_router_bias=True)
    model = {"router": router, "expert_bias": True, "expert_activation": "gpt_oss"}
    assert_two_ranks_give_the_curve_of_one(pool, run_root, whole, model)


def test_two_ranks_give_the_curve_of_one_with_latent_attention_and_shortcuts(pool, run_root, whole):
    latents = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 0, "qk_norm": "none"}
    router = ZeroExpertsConfig(num_identity_experts=3, target_experts_per_tok=1.5)
    model = {"router": router, "is_shortcut_connected": True, "intermediate_size": 48, "scale_latents": True}
    assert_two_ranks_give_the_curve_of_one(pool, run_root, whole, {**model, **latents, **heads})


def assert_two_ranks_give_the_curve_of_one(pool, run_root, whole, model):
    two = recipe_of(
        run_root,
        "two",
        model,
        parallel={"ep_size": 2, "zero_stage": 2, "activation_checkpointing": True},
        batch={"micro_sequences": 1},
    )
    pool.run(train, two, world_size=2)
    one = whole(model)
    assert len(one) == len(curve(two)) == 6
    for a, b in zip(one, curve(two), strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=2e-6)
        assert b["train/grad_norm"] == pytest.approx(a["train/grad_norm"], rel=2e-5)
        assert b["moe/experts_per_token"] == a["moe/experts_per_token"]


@pytest.mark.parametrize(("kind", "form"), CONFIGS, ids=name_of)
def test_a_resumed_run_goes_on_to_the_bit(pool, run_root, whole, kind, form):
    model = {"router": config_of(kind, form)}
    parts = recipe_of(run_root, "parts", model, trainer={"save_every": 3})
    pool.run(stop_after, parts, 4, world_size=1)
    pool.run(train, parts, True, world_size=1)
    assert curve(parts) == whole(model)
