"""Parameter and FLOP counts against formulas by hand and against matrices multiplied."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe.blocks.chain import ChainConfig
from moe.counts import count_parameters, flops_per_token, match_compute
from moe.presets import coe
from moe.routers.dynamic_confidence import DynamicConfidenceConfig
from moe.routers.expert_choice import ExpertChoiceConfig
from moe.routers.topk import TopKConfig
from moe.routers.zero_experts import ZeroExpertsConfig
from tiny import tiny_config, tiny_model, tiny_tokens

V, D, L, H, G, d, E, K, F_EXPERT, F_DENSE, F_SHARED = 37, 20, 3, 4, 2, 6, 6, 2, 14, 22, 10


@pytest.mark.parametrize("is_tied", [False, True])
def test_every_part_is_counted_as_by_hand(is_tied):
    config = tiny_config(tie_word_embeddings=is_tied, qk_norm="full", attention_bias=True, use_shared_expert_gate=True)
    count = count_parameters(config)
    assert count.embedding == V * D
    assert count.head == (0 if is_tied else V * D)
    assert count.attention == L * (2 * D * (H + G) * d + (H + 2 * G) * d + (H + G) * d)
    assert count.norm == (2 * L + 1) * D
    assert count.router == 2 * E * D
    assert count.experts == 2 * E * 3 * D * F_EXPERT
    assert count.shared_expert == 2 * (3 * D * F_SHARED + D)
    assert count.feed_forward == 3 * D * F_DENSE
    assert count.total == sum(parameter.numel() for parameter in tiny_model(config).parameters())
    assert count.active == count.total - 2 * (E - K) * 3 * D * F_EXPERT


def test_a_dense_model_is_all_active():
    config = tiny_config(
        num_experts=0,
        num_experts_per_tok=0,
        moe_intermediate_size=0,
        shared_expert_intermediate_size=0,
        mlp_only_layers=(),
    )
    count = count_parameters(config)
    assert count.active == count.total
    assert count.experts == 0


CHAINS = [
    ChainConfig(rounds=3),
    ChainConfig(rounds=3, residual="preln", has_shared_router=True),
    ChainConfig(rounds=2, shared_expert="once"),
]


@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_counts_its_weights_once_and_what_is_active_as_often_as_it_runs(chain):
    config = tiny_config(chain=chain)
    count, plain = count_parameters(config), count_parameters(tiny_config())
    C, shared_runs = chain.rounds, 1 if chain.shared_expert == "once" else chain.rounds
    assert count.experts == plain.experts
    assert count.shared_expert == plain.shared_expert
    assert count.router == plain.router * (1 if chain.has_shared_router else C)
    assert count.total == plain.total + count.router - plain.router
    per_layer = 3 * D * (C * K * F_EXPERT + shared_runs * F_SHARED)
    assert count.active == count.total - count.experts - count.shared_expert + 2 * per_layer


@pytest.mark.parametrize("chain", CHAINS)
def test_flops_of_a_chain_equal_the_matrix_products_that_run(chain):
    config = tiny_config(chain=chain, num_key_value_heads=4, use_shared_expert_gate=True)
    assert_flops_equal_the_products(config)


def test_two_rounds_of_four_cost_a_ninth_more_than_one_of_eight():
    match = match_compute(coe())
    assert (match.chain.num_expert_runs, match.plain.num_expert_runs) == (10, 9)
    assert match.chain.flops == 2 * 10 * 3 * 1024 * 704
    assert match.ratio == pytest.approx(10 / 9)
    assert str(match).endswith("the chain computes +11.1%")
    once = match_compute(replace(coe(), chain=ChainConfig(rounds=2, shared_expert="once")))
    assert once.ratio == 1
    with pytest.raises(ValueError, match="num_experts_per_tok = 80 must lie in 1..num_experts = 63"):
        match_compute(replace(coe(), num_experts_per_tok=40))


@pytest.mark.parametrize("is_tied", [False, True])
def test_flops_equal_the_matrix_products_that_run(is_tied):
    assert_flops_equal_the_products(
        tiny_config(tie_word_embeddings=is_tied, use_shared_expert_gate=True, num_key_value_heads=4)
    )


def assert_flops_equal_the_products(config):
    model = tiny_model(config, dtype=torch.float64)
    B, S = 2, 16
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tiny_tokens(B, S))
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for op, flops in counted.items() if "attention" in op)
    matrices = sum(counted.values()) - attention
    # the counter takes attention in full; half of it is visible
    full_attention = B * S * 4 * L * H * d * S
    assert attention in (0, full_attention)
    assert flops_per_token(config, S) * B * S == matrices + full_attention // 2


@pytest.mark.parametrize("activation", ["swiglu", "gpt_oss", "relu2"])
def test_biases_of_experts_and_routers_are_parameters_and_no_operations(activation):
    router = TopKConfig(softmax_after_topk=True)
    plain = tiny_config(expert_activation=activation, router=router)
    biased = replace(plain, expert_bias=True, router=replace(router, use_router_bias=True))
    width = (1 if activation == "relu2" else 2) * F_EXPERT
    num_moe = len(plain.moe_layers)
    before, after = count_parameters(plain), count_parameters(biased)
    assert before.experts == num_moe * E * (width * D + F_EXPERT * D)
    assert after.experts - before.experts == num_moe * E * (width + D)
    assert after.router - before.router == num_moe * E
    assert after.active - before.active == num_moe * (K * (width + D) + E)
    assert flops_per_token(biased, 8) == flops_per_token(plain, 8)
    assert_flops_equal_the_products(biased)


@pytest.mark.parametrize(
    ("router", "mean"),
    [
        (TopKConfig(), 2),
        (DynamicConfidenceConfig(), 2),
        (DynamicConfidenceConfig(target_experts_per_tok=1.5), 1.5),
        (ZeroExpertsConfig(target_experts_per_tok=1.25), 1.25),
        (ExpertChoiceConfig(allow_noncausal=True, capacity_factor=0.5), 1),
    ],
    ids=lambda value: str(value) if isinstance(value, int | float) else value.kind,
)
def test_active_parameters_and_operations_follow_the_mean_that_the_router_holds(router, mean):
    config = replace(tiny_config(), num_experts=4, num_experts_per_tok=2, router=router)
    plain = replace(config, router=TopKConfig())
    per_expert = count_parameters(plain).experts // config.num_experts
    saved = round((2 - mean) * per_expert)
    other = count_parameters(config).router - count_parameters(plain).router
    assert count_parameters(config).active == count_parameters(plain).active - saved + other
    assert flops_per_token(config, 8) == flops_per_token(plain, 8) + 2 * (other - saved)
