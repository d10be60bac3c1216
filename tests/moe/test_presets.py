"""Published architectures: parameter counts, forward and backward against the models in transformers."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moe import presets
from moe.counts import count_parameters
from moe.model import Model, ModelConfig
from moe.parallel.groups import ParallelGroups
from moe.routers.topk import TopKConfig
from tiny import assert_near, tiny_config, tiny_model, tiny_tokens

FAMILIES = {
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}


def build_theirs(family: str, config: ModelConfig):
    """The transformers model of the same shape."""
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "num_experts_per_tok": config.num_experts_per_tok,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "pad_token_id": None,
    }
    if config.head_dim:
        fields["head_dim"] = config.head_dim
    if family == "mixtral":
        fields |= {"num_local_experts": config.num_experts, "intermediate_size": config.moe_intermediate_size}
    else:
        fields |= {"num_experts": config.num_experts, "norm_topk_prob": config.router.norm_topk_prob}
    if family == "olmoe":
        fields |= {"intermediate_size": config.moe_intermediate_size}
    if family.startswith("qwen"):
        fields |= {
            "intermediate_size": config.intermediate_size,
            "moe_intermediate_size": config.moe_intermediate_size,
            "decoder_sparse_step": config.decoder_sparse_step,
            "mlp_only_layers": list(config.mlp_only_layers),
        }
    if family == "qwen2_moe":
        fields |= {"shared_expert_intermediate_size": config.shared_expert_intermediate_size}
        fields |= {"qkv_bias": config.attention_bias}
    config_class, model_class = FAMILIES[family]
    return model_class._from_config(
        config_class(**fields),
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
    )


RENAMES = (
    ("moe.router.", "mlp.gate."),
    ("moe.shared_expert.sigmoid_gate.", "mlp.shared_expert_gate."),
    ("moe.", "mlp."),
    (".feed_forward.", ".mlp."),
    (".attention_norm.", ".input_layernorm."),
    (".feed_forward_norm.", ".post_attention_layernorm."),
    (".attention.", ".self_attn."),
)


def their_name(name: str) -> str:
    for ours, theirs in RENAMES:
        name = name.replace(ours, theirs)
    return name if name.startswith("lm_head.") else f"model.{name}"


@pytest.mark.parametrize(
    ("family", "preset", "total", "active_in_billions"),
    [
        ("mixtral", presets.mixtral_8x7b, 46_702_792_704, 12.9),
        ("olmoe", presets.olmoe_1b_7b, 6_919_161_856, 1.3),
        ("qwen3_moe", presets.qwen3_30b_a3b, 30_532_122_624, 3.35),
    ],
)
def test_parameter_counts_equal_the_published_ones(family, preset, total, active_in_billions):
    config = preset()
    config.validate()
    count = count_parameters(config)
    assert count.total == total
    assert abs(count.active / 1e9 - active_in_billions) < 0.05
    with torch.device("meta"):
        theirs = build_theirs(family, config)
        ours = Model(config, groups=ParallelGroups.single())
    shapes = {their_name(name): parameter.shape for name, parameter in ours.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in theirs.named_parameters()}


@pytest.mark.parametrize(
    ("rounds", "num_experts", "published", "in_mebi"),
    [(1, 64, 570956800, "544.51"), (2, 64, 571214848, "544.75"), (2, 48, 432671744, "412.63")],
    ids=["MoE(8/64)", "CoE-2(4/64)", "CoE-2(4/48)"],
)
def test_chain_of_experts_has_the_published_parameters_in_all_but_the_attention(
    rounds, num_experts, published, in_mebi
):
    config = presets.coe()
    config = replace(config, num_experts=num_experts - 1, chain=replace(config.chain, rounds=rounds))
    config.validate()
    count = count_parameters(config)
    assert count.router == 4 * rounds * (num_experts - 1) * 1024
    assert count.experts + count.shared_expert == 4 * num_experts * 3 * 1024 * 704
    assert count.norm == 4 * 2 * 1024 + 1024
    # latent attention, which we do not have: queries 8 x (128 + 64), a latent of 512 with a norm, a rotary key of 64
    latent = 1024 * 8 * 192 + 1024 * (512 + 64) + 512 + 512 * 8 * (128 + 128) + 8 * 128 * 1024
    total = count.router + count.experts + count.shared_expert + count.norm + 4 * latent
    assert total == published
    assert f"{total / 2**20:.2f}" == in_mebi


NO_SHARED = {"shared_expert_intermediate_size": 0, "mlp_only_layers": ()}
SQUARE = {"hidden_size": 24, "head_dim": 0}
CASES = {
    "mixtral": ("mixtral", tiny_config(**NO_SHARED, rms_norm_eps=1e-5, rope_theta=1e3)),
    "olmoe": ("olmoe", tiny_config(**NO_SHARED, **SQUARE, qk_norm="full", router=TopKConfig())),
    "olmoe_normalised": ("olmoe", tiny_config(**NO_SHARED, **SQUARE, qk_norm="full")),
    "qwen3_moe": ("qwen3_moe", tiny_config(shared_expert_intermediate_size=0, qk_norm="head")),
    "qwen3_moe_tied": (
        "qwen3_moe",
        tiny_config(**NO_SHARED, qk_norm="head", router=TopKConfig(), tie_word_embeddings=True, decoder_sparse_step=2),
    ),
    "qwen2_moe": (
        "qwen2_moe",
        tiny_config(**SQUARE, use_shared_expert_gate=True, attention_bias=True, router=TopKConfig()),
    ),
}


@pytest.mark.parametrize(("family", "config"), CASES.values(), ids=CASES.keys())
def test_logits_and_every_gradient_equal_those_of_transformers(family, config):
    ours = tiny_model(config)
    theirs = build_theirs(family, config)
    state = {their_name(name): tensor for name, tensor in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    token = tiny_tokens(2, 11)
    logits, _ = ours(token)
    expected = theirs(input_ids=token, use_cache=False).logits
    assert_near(logits, expected, 1e-5)
    assert (logits - expected).abs().max() < 1e-4
    for values in (logits, expected):
        F.cross_entropy(values[:, :-1].flatten(0, 1), token[:, 1:].flatten()).backward()
    their_grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert len(their_grads) == len(list(ours.parameters()))
    for name, parameter in ours.named_parameters():
        assert_near(parameter.grad, their_grads[their_name(name)], 1e-4)
