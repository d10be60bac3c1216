"""Models that need more than other names: DeepSeek-V3, GPT-OSS, LongCat-Flash. Logits, gradients and caches."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LongcatFlashConfig,
    LongcatFlashForCausalLM,
)

from moe.blocks.cache import KeyValueCache
from moe.blocks.chain import ChainConfig
from moe.model import Model, ModelConfig
from moe.routers.cross_layer import ReuseConfig
from moe.routers.topk import TopKConfig
from moe.routers.zero_experts import ZeroExpertsConfig
from moe.sample import generate
from tiny import assert_near, tiny_config, tiny_model, tiny_tokens

NOPE, ROPE, VALUE, Q_LORA, KV_LORA = 6, 4, 5, 9, 8

DEEPSEEK = tiny_config(
    head_dim=0,
    num_key_value_heads=4,
    kv_lora_rank=KV_LORA,
    q_lora_rank=Q_LORA,
    qk_nope_head_dim=NOPE,
    qk_rope_head_dim=ROPE,
    v_head_dim=VALUE,
    mlp_only_layers=(),
    first_k_dense_replace=1,
    router=TopKConfig(
        scoring_func="sigmoid",
        norm_topk_prob=True,
        use_selection_bias=True,
        n_group=3,
        topk_group=2,
        routed_scaling_factor=2.5,
    ),
)
GPT_OSS = tiny_config(
    mlp_only_layers=(),
    shared_expert_intermediate_size=0,
    intermediate_size=0,
    attention_bias=True,
    attention_output_bias=True,
    attention_sinks=True,
    sliding_window=4,
    full_attention_interval=2,
    expert_activation="gpt_oss",
    expert_bias=True,
    rms_norm_eps=1e-5,
    router=TopKConfig(softmax_after_topk=True, use_router_bias=True),
)
LONGCAT = replace(
    DEEPSEEK,
    num_hidden_layers=2,
    first_k_dense_replace=0,
    shared_expert_intermediate_size=0,
    is_shortcut_connected=True,
    scale_latents=True,
    rms_norm_eps=1e-5,
    num_experts_per_tok=4,
    router=ZeroExpertsConfig(num_identity_experts=3, routed_scaling_factor=6.0),
)


def shared_fields(config: ModelConfig) -> dict:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "num_experts_per_tok": config.num_experts_per_tok,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def deepseek(config: ModelConfig) -> DeepseekV3ForCausalLM:
    router = config.router
    theirs = DeepseekV3Config(
        **shared_fields(config),
        intermediate_size=config.intermediate_size,
        moe_intermediate_size=config.moe_intermediate_size,
        n_routed_experts=config.num_experts,
        # one shared expert has the width of a routed one
        n_shared_experts=config.shared_expert_intermediate_size // config.moe_intermediate_size,
        first_k_dense_replace=config.first_k_dense_replace,
        n_group=router.n_group,
        topk_group=router.topk_group,
        routed_scaling_factor=router.routed_scaling_factor,
        norm_topk_prob=True,
        q_lora_rank=config.q_lora_rank or None,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        rope_interleave=True,
    )
    return DeepseekV3ForCausalLM._from_config(
        theirs, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )


def gpt_oss(config: ModelConfig) -> GptOssForCausalLM:
    theirs = GptOssConfig(
        **shared_fields(config),
        head_dim=config.head_dim,
        intermediate_size=config.moe_intermediate_size,
        num_local_experts=config.num_experts,
        sliding_window=config.sliding_window,
        layer_types=["full_attention" if (i + 1) % 2 == 0 else "sliding_attention" for i in range(3)],
        attention_bias=True,
    )
    return GptOssForCausalLM._from_config(
        theirs, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )


def longcat(config: ModelConfig) -> LongcatFlashForCausalLM:
    fields = shared_fields(config)
    del fields["num_hidden_layers"], fields["num_experts_per_tok"]
    theirs = LongcatFlashConfig(
        **fields,
        num_layers=config.num_hidden_layers,
        ffn_hidden_size=config.intermediate_size,
        expert_ffn_hidden_size=config.moe_intermediate_size,
        n_routed_experts=config.num_experts,
        zero_expert_num=config.router.num_identity_experts,
        moe_topk=config.num_experts_per_tok,
        routed_scaling_factor=config.router.routed_scaling_factor,
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
    )
    return LongcatFlashForCausalLM._from_config(
        theirs, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )


BUILDERS = {"deepseek": deepseek, "gpt_oss": gpt_oss, "longcat": longcat}
RENAMES = {
    "deepseek": (
        (".moe.router.selection_bias", ".mlp.gate.e_score_correction_bias"),
        (".moe.router.", ".mlp.gate."),
        (".moe.shared_expert.", ".mlp.shared_experts."),
        (".kv_a_proj.", ".kv_a_proj_with_mqa."),
        ("_a_norm.", "_a_layernorm."),
    ),
    "gpt_oss": ((".moe.router.", ".mlp.router."),),
    "longcat": (
        (".moe.router.selection_bias", ".mlp.router.e_score_correction_bias"),
        (".moe.router.", ".mlp.router.classifier."),
        (".feed_forward.", ".mlps."),
        (".kv_a_proj.", ".kv_a_proj_with_mqa."),
        ("_a_norm.", "_a_layernorm."),
    ),
}
COMMON = (
    (".moe.", ".mlp."),
    (".feed_forward.", ".mlp."),
    (".attention_norm.", ".input_layernorm."),
    (".feed_forward_norm.", ".post_attention_layernorm."),
    (".attention.", ".self_attn."),
)


def their_name(family: str, name: str) -> str:
    for ours, theirs in (*RENAMES[family], *COMMON):
        name = name.replace(ours, theirs)
    return name if name.startswith("lm_head.") else f"model.{name}"


def in_pairs(rows: Tensor) -> Tensor:
    """Rotary rows in halves, [..., 2c, D], as rows in neighbouring pairs."""
    return torch.stack(rows.chunk(2, dim=-2), dim=-2).flatten(-3, -2)


def their_form(family: str, name: str, value: Tensor) -> Tensor:
    """Our tensor in the order in which they keep it."""
    if family == "longcat" and name.endswith("gate_up_proj"):
        # allocated there for the identity experts too, and never read
        return torch.cat((value, value.new_zeros(3, *value.shape[1:])))
    if family in ("deepseek", "longcat"):
        if name.endswith(("q_b_proj.weight", "q_proj.weight")):
            heads = value.unflatten(0, (-1, NOPE + ROPE))
            return torch.cat((heads[:, :NOPE], in_pairs(heads[:, NOPE:])), dim=1).flatten(0, 1)
        if name.endswith("kv_a_proj.weight"):
            return torch.cat((value[:KV_LORA], in_pairs(value[KV_LORA:])))
    elif ".experts." in name and family == "gpt_oss":
        if "gate_up" in name:
            value = torch.stack(value.chunk(2, dim=1), dim=2).flatten(1, 2)
        return value.transpose(1, 2) if value.dim() == 3 else value
    return value


CASES = {
    "deepseek": ("deepseek", replace(DEEPSEEK, shared_expert_intermediate_size=14)),
    "deepseek without query latent": (
        "deepseek",
        replace(DEEPSEEK, shared_expert_intermediate_size=28, q_lora_rank=0),
    ),
    "gpt_oss": ("gpt_oss", GPT_OSS),
    "longcat": ("longcat", LONGCAT),
    "gpt_oss k = E": ("gpt_oss", replace(GPT_OSS, num_experts_per_tok=6)),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_every_gradient_equal_those_of_transformers(case):
    family, config = CASES[case]
    ours = tiny_model(config)
    with torch.no_grad():
        for name, buffer in ours.named_buffers():
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(len(name))) - 1)
    theirs = BUILDERS[family](config)
    state = {their_name(family, name): their_form(family, name, value) for name, value in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not missing and not unexpected
    token = tiny_tokens(2, 11)
    logits, _ = ours(token)
    expected = theirs(input_ids=token, use_cache=False).logits
    assert_near(logits, expected, 1e-5)
    for values in (logits, expected):
        F.cross_entropy(values[:, :-1].flatten(0, 1), token[:, 1:].flatten()).backward()
    their_grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert len(their_grads) == len(list(ours.parameters()))
    for name, parameter in ours.named_parameters():
        assert_near(their_form(family, name, parameter.grad), their_grads[their_name(family, name)], 1e-4)


LONG = {**CASES, "latents scaled": ("deepseek", replace(DEEPSEEK, scale_latents=True))}


def logits_of(model: Model, token_BS: Tensor, cuts: tuple[int, ...]) -> Tensor:
    cache = KeyValueCache(num_layers=model.config.num_attention_layers, max_length=token_BS.shape[1])
    ends = (*cuts, token_BS.shape[1])
    starts = (0, *cuts)
    return torch.cat([model(token_BS[:, a:b], cache=cache)[0] for a, b in zip(starts, ends, strict=True)], dim=1)


@pytest.mark.parametrize("case", LONG)
def test_a_cache_gives_the_logits_of_the_whole_sequence(case):
    model, token = tiny_model(LONG[case][1]).eval(), tiny_tokens(2, 13)
    with torch.no_grad():
        whole = model(token)[0]
        for cuts in ((1, 2, 3, 7, 12), (6,), (3, 9)):
            torch.testing.assert_close(logits_of(model, token, cuts), whole, rtol=1e-4, atol=1e-4)
    assert len(generate(model, token[0].tolist(), max_new_tokens=9, temperature=0.0)) == 9


@pytest.mark.parametrize("case", LONG)
def test_recomputation_changes_no_bit(case):
    token, results = tiny_tokens(2, 9), []
    for is_on in (False, True):
        model = tiny_model(LONG[case][1], activation_checkpointing=is_on).train()
        logits, _ = model(token)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_scaled_latents_are_scaled_by_the_root_of_the_widths():
    plain, scaled = tiny_model(DEEPSEEK), tiny_model(replace(DEEPSEEK, scale_latents=True))
    D = DEEPSEEK.hidden_size
    with torch.no_grad():
        for layer in scaled.layers:
            # the same model where the weights behind the latents are smaller by as much
            layer.attention.q_b_proj.weight /= (D / Q_LORA) ** 0.5
            layer.attention.kv_b_proj.weight /= (D / KV_LORA) ** 0.5
        torch.testing.assert_close(scaled(tiny_tokens(2, 7))[0], plain(tiny_tokens(2, 7))[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_lora_rank": 8, "num_key_value_heads": 4, "head_dim": 0}, "qk_nope_head_dim = 0 must be at least 1"),
        ({"v_head_dim": 8}, "model.v_head_dim = 8 needs model.kv_lora_rank > 0"),
        ({"full_attention_interval": 2}, "needs model.sliding_window > 0"),
        ({"sliding_window": -1}, "sliding_window = -1 must not be negative"),
    ],
)
def test_attention_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes).validate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 0}, "needs model.intermediate_size"),
        ({"first_k_dense_replace": 1}, "needs an MoE in every layer"),
        ({"chain": ChainConfig(rounds=2)}, "model.chain does not go with"),
        ({"reuse": ReuseConfig(group_size=2)}, "model.reuse does not go with"),
    ],
)
def test_shortcut_connected_layers_that_cannot_be_built_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(LONGCAT, **changes).validate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads = 2 must be num_attention_heads = 4"),
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim = 3 must be even"),
        ({"qk_norm": "head"}, "model.qk_norm = 'head' is for ordinary attention"),
        ({"attention_sinks": True}, "model.attention_sinks = True is for ordinary attention"),
    ],
)
def test_latent_attention_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(DEEPSEEK, **changes).validate()
