"""Published architectures: parameter counts, forward and backward against the models in transformers."""

import inspect
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
def test_chain_of_experts_has_the_published_parameters(rounds, num_experts, published, in_mebi):
    config = presets.coe()
    config = replace(config, num_experts=num_experts - 1, chain=replace(config.chain, rounds=rounds))
    config.validate()
    count = count_parameters(config)
    assert count.total - count.embedding - count.head == published
    assert f"{published / 2**20:.2f}" == in_mebi


@pytest.mark.parametrize(
    ("preset", "total", "active_in_billions"),
    [
        # totals of the first three are those of the same configurations in transformers
        (presets.deepseek_v3, 671_026_404_352, 37.55),
        (presets.gpt_oss_20b, 20_914_757_184, 4.19),  # 3.61 without the head, as published
        (presets.gpt_oss_120b, 116_829_156_672, 5.71),  # 5.13 without the head
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_totals_equal_those_of_transformers(preset, total, active_in_billions):
    config = preset()
    config.validate()
    count = count_parameters(config)
    assert count.total == total
    assert count.active / 1e9 == pytest.approx(active_in_billions, abs=0.05)


def test_longcat_flash_has_its_published_sizes():
    config = presets.longcat_flash()
    count = count_parameters(config)
    assert count.total / 1e9 == pytest.approx(560, abs=2)
    expert = count.experts // config.num_experts
    assert expert / 1e9 == pytest.approx(1.057, abs=1e-3)
    fixed = count.total - count.experts - count.embedding
    # 18.6 to 31.3 billion active for 0 to 12 real experts, 27 on average
    for num_real, published in ((0, 18.6), (8, 27.0), (12, 31.3)):
        assert (fixed + num_real * expert) / 1e9 == pytest.approx(published, abs=0.3)
    assert count.active == fixed + count.embedding + 8 * expert


def test_dynamic_moe_has_its_published_sizes():
    config = presets.dynamic_moe()
    count = count_parameters(config)
    without_router = count.total - count.router
    assert without_router / 1e9 == pytest.approx(3.488, abs=5e-4)
    expert = count.experts // 16
    for mean, published in ((1, 373.87e6), (2, 581.49e6), (1.76, 531.66e6)):
        assert without_router - count.experts + mean * expert == pytest.approx(published, abs=1e4)


@pytest.mark.parametrize(
    ("preset", "total_in_billions", "active_in_billions"),
    [(presets.demons, 3.4, 0.6), (presets.remoe, 0.777, 0.182)],
    ids=["demons", "remoe"],
)
def test_sizes_are_the_published_ones(preset, total_in_billions, active_in_billions):
    count = count_parameters(preset())
    assert count.total / 1e9 == pytest.approx(total_in_billions, rel=0.01)
    assert count.active / 1e9 == pytest.approx(active_in_billions, rel=0.01)


PRESETS = [
    value for name, value in vars(presets).items() if inspect.isfunction(value) and value.__module__ == presets.__name__
]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_every_preset_can_be_built_and_names_its_source(preset):
    config = preset()
    config.validate()
    assert "arXiv" in preset.__doc__ or "arXiv" in inspect.getdoc(preset)
    count_parameters(config)


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
