"""Parameter and FLOP counts against formulas by hand and against matrices multiplied."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe.counts import count_parameters, flops_per_token
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


@pytest.mark.parametrize("is_tied", [False, True])
def test_flops_equal_the_matrix_products_that_run(is_tied):
    config = tiny_config(tie_word_embeddings=is_tied, use_shared_expert_gate=True, num_key_value_heads=4)
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
