"""Fields: what differs from family to family between configurations of transformers and ours.

`read_` functions return our fields beside the common ones from the attributes of their configuration c; they raise
ConversionError for a value that our model does not have. `write_` functions return theirs from ours.
"""

from typing import Any

from moe.config import ModelConfig
from moe.convert import ConversionError
from moe.convert.families import expect, write_rope
from moe.routers.topk import TopKConfig
from moe.routers.zero_experts import ZeroExpertsConfig


def _window(theirs: Any) -> int:
    """Return the window that all layers share, 0 for none."""
    window = getattr(theirs, "sliding_window", None)
    return 0 if not window or window >= theirs.max_position_embeddings else window


def read_qwen2(c: Any) -> dict[str, Any]:
    """Qwen2: biases on queries, keys and values."""
    expect(c, use_sliding_window=False)
    return {"intermediate_size": c.intermediate_size, "attention_bias": True}


def read_qwen3(c: Any) -> dict[str, Any]:
    """Qwen3: norms on the heads of queries and keys."""
    expect(c, use_sliding_window=False, attention_bias=False)
    return {"intermediate_size": c.intermediate_size, "qk_norm": "head"}


def read_llama(c: Any) -> dict[str, Any]:
    """Llama and Mistral, whose window is perhaps that of all layers."""
    expect(c, attention_bias=False)
    return {"intermediate_size": c.intermediate_size, "sliding_window": _window(c)}


def write_dense(config: ModelConfig) -> dict[str, Any]:
    """Any dense family."""
    return {"intermediate_size": config.intermediate_size}


def write_mistral(config: ModelConfig) -> dict[str, Any]:
    """A dense family with a window."""
    return {**write_dense(config), "sliding_window": config.sliding_window or None}


def read_mixtral(c: Any) -> dict[str, Any]:
    """Mixtral: every layer MoE, weights normalised."""
    return {
        "num_experts": c.num_local_experts,
        "num_experts_per_tok": c.num_experts_per_tok,
        "moe_intermediate_size": c.intermediate_size,
        "sliding_window": _window(c),
        "router": TopKConfig(norm_topk_prob=True),
    }


def write_mixtral(config: ModelConfig) -> dict[str, Any]:
    """Mixtral."""
    return {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "intermediate_size": config.moe_intermediate_size,
        "sliding_window": config.sliding_window or None,
    }


def read_olmoe(c: Any) -> dict[str, Any]:
    """OLMoE: norms over all heads at once, weights as they are."""
    expect(c, attention_bias=False, clip_qkv=None)
    return {
        "num_experts": c.num_experts,
        "num_experts_per_tok": c.num_experts_per_tok,
        "moe_intermediate_size": c.intermediate_size,
        "qk_norm": "full",
        "router": TopKConfig(norm_topk_prob=c.norm_topk_prob),
    }


def write_olmoe(config: ModelConfig) -> dict[str, Any]:
    """OLMoE."""
    return {
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": getattr(config.router, "norm_topk_prob", False),
    }


def read_qwen_moe(c: Any) -> dict[str, Any]:
    """Qwen2-MoE and Qwen3-MoE: dense layers among the others, in Qwen2 a gated shared expert."""
    is_second = c.model_type == "qwen2_moe"
    shared = c.shared_expert_intermediate_size if is_second else 0
    bias = c.qkv_bias if is_second else c.attention_bias
    expect(c, use_sliding_window=False, **({} if is_second else {"attention_bias": False}))
    return {
        "qk_norm": "none" if is_second else "head",
        "attention_bias": bias,
        "num_experts": c.num_experts,
        "num_experts_per_tok": c.num_experts_per_tok,
        "moe_intermediate_size": c.moe_intermediate_size,
        "intermediate_size": c.intermediate_size,
        "decoder_sparse_step": c.decoder_sparse_step,
        "mlp_only_layers": tuple(c.mlp_only_layers or ()),
        "shared_expert_intermediate_size": shared,
        "use_shared_expert_gate": shared > 0,
        "router": TopKConfig(norm_topk_prob=c.norm_topk_prob),
    }


def write_qwen_moe(config: ModelConfig) -> dict[str, Any]:
    """Qwen3-MoE."""
    return {
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "intermediate_size": config.intermediate_size or config.moe_intermediate_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(config.num_hidden_layers) if not config.is_moe_layer(i)],
        "norm_topk_prob": getattr(config.router, "norm_topk_prob", False),
    }


def write_qwen2_moe(config: ModelConfig) -> dict[str, Any]:
    """Qwen2-MoE."""
    return {
        **write_qwen_moe(config),
        "qkv_bias": config.attention_bias,
        "shared_expert_intermediate_size": config.shared_expert_intermediate_size,
        "use_sliding_window": False,
    }


def read_sigmoid(c: Any) -> dict[str, Any]:
    """DeepSeek-V3 and those who took over its routing: sigmoid scores, a bias that chooses, groups, ungated shared."""
    return {
        "num_experts": c.n_routed_experts,
        "num_experts_per_tok": c.num_experts_per_tok,
        "moe_intermediate_size": c.moe_intermediate_size,
        "intermediate_size": c.intermediate_size,
        "shared_expert_intermediate_size": (c.n_shared_experts or 0) * c.moe_intermediate_size,
        "first_k_dense_replace": c.first_k_dense_replace,
        "router": TopKConfig(
            scoring_func="sigmoid",
            norm_topk_prob=c.norm_topk_prob,
            routed_scaling_factor=c.routed_scaling_factor,
            n_group=c.n_group or 1,
            topk_group=c.topk_group or 1,
            use_selection_bias=True,
        ),
    }


def write_sigmoid(config: ModelConfig) -> dict[str, Any]:
    """DeepSeek-V3's routing."""
    router: Any = config.router
    dense = [index for index in range(config.num_hidden_layers) if not config.is_moe_layer(index)]
    return {
        "n_routed_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "intermediate_size": config.intermediate_size or config.moe_intermediate_size,
        "n_shared_experts": config.shared_expert_intermediate_size // max(config.moe_intermediate_size, 1),
        "first_k_dense_replace": len(dense),
        "norm_topk_prob": getattr(router, "norm_topk_prob", False),
        "routed_scaling_factor": getattr(router, "routed_scaling_factor", 1.0),
        "n_group": getattr(router, "n_group", 1),
        "topk_group": getattr(router, "topk_group", 1),
    }


LATENT = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def read_latent(c: Any) -> dict[str, Any]:
    """DeepSeek's latent attention."""
    expect(c, attention_bias=False)
    return {"head_dim": 0, **{name: getattr(c, name) or 0 for name in LATENT}}


def write_latent(config: ModelConfig) -> dict[str, Any]:
    """DeepSeek's latent attention."""
    return {**{name: getattr(config, name) for name in LATENT}, "q_lora_rank": config.q_lora_rank or None}


def write_deepseek(config: ModelConfig) -> dict[str, Any]:
    """DeepSeek-V3."""
    return {**write_sigmoid(config), **write_latent(config)}


def read_deepseek(c: Any) -> dict[str, Any]:
    """DeepSeek-V3."""
    expect(c, rope_interleave=True)
    return {**read_sigmoid(c), **read_latent(c)}


def read_glm(c: Any) -> dict[str, Any]:
    """GLM-4-MoE: DeepSeek's routing, ordinary attention."""
    return {
        **read_sigmoid(c),
        "qk_norm": "head" if c.use_qk_norm else "none",
        "attention_bias": c.attention_bias,
    }


def write_glm(config: ModelConfig) -> dict[str, Any]:
    """GLM-4-MoE."""
    rope = {**write_rope(config), "partial_rotary_factor": 1.0}
    return {
        **write_sigmoid(config),
        "use_qk_norm": config.qk_norm == "head",
        "attention_bias": config.attention_bias,
        "rope_parameters": rope,
    }


def read_dots(c: Any) -> dict[str, Any]:
    """dots.llm1: DeepSeek's routing, norms on heads."""
    expect(c, attention_bias=False)
    if "sliding_attention" in c.layer_types:
        raise ConversionError(f"dots1: layer_types = {c.layer_types}; every layer must see everything")
    return {**read_sigmoid(c), "qk_norm": "head", "sliding_window": 0}


def write_dots(config: ModelConfig) -> dict[str, Any]:
    """dots.llm1."""
    # its own default gives a window to the layers after the 62nd
    return {**write_sigmoid(config), "sliding_window": None}


def _alternating(num_layers: int) -> list[str]:
    return ["full_attention" if index % 2 else "sliding_attention" for index in range(num_layers)]


def read_gpt_oss(c: Any) -> dict[str, Any]:
    """GPT-OSS: biases everywhere, sinks, a window in every second layer."""
    expect(c, swiglu_alpha=1.702, swiglu_limit=7.0)
    if list(c.layer_types) != _alternating(c.num_hidden_layers):
        raise ConversionError(f"gpt_oss: layer_types = {c.layer_types}; every second layer must see everything")
    return {
        "num_experts": c.num_local_experts,
        "num_experts_per_tok": c.num_experts_per_tok,
        "moe_intermediate_size": c.intermediate_size,
        "expert_activation": "gpt_oss",
        "expert_bias": True,
        "attention_bias": c.attention_bias,
        "attention_output_bias": c.attention_bias,
        "attention_sinks": True,
        "sliding_window": c.sliding_window,
        "full_attention_interval": 2,
        "router": TopKConfig(softmax_after_topk=True, use_router_bias=True),
    }


def write_gpt_oss(config: ModelConfig) -> dict[str, Any]:
    """GPT-OSS."""
    return {
        **write_mixtral(config),
        "layer_types": _alternating(config.num_hidden_layers),
        "attention_bias": config.attention_bias,
    }


def read_longcat(c: Any) -> dict[str, Any]:
    """LongCat-Flash: identity experts in shortcut-connected layers."""
    return {
        **read_latent(c),
        "num_hidden_layers": c.num_layers,
        "num_experts": c.n_routed_experts,
        "num_experts_per_tok": c.moe_topk,
        "moe_intermediate_size": c.expert_ffn_hidden_size,
        "intermediate_size": c.ffn_hidden_size,
        "is_shortcut_connected": True,
        "scale_latents": True,
        "router": ZeroExpertsConfig(
            num_identity_experts=c.zero_expert_num, routed_scaling_factor=c.routed_scaling_factor
        ),
    }


def write_longcat(config: ModelConfig) -> dict[str, Any]:
    """LongCat-Flash."""
    router: Any = config.router
    return {
        **write_latent(config),
        "num_hidden_layers": 2 * config.num_hidden_layers,
        "num_layers": config.num_hidden_layers,
        "n_routed_experts": config.num_experts,
        "moe_topk": config.num_experts_per_tok,
        "expert_ffn_hidden_size": config.moe_intermediate_size,
        "ffn_hidden_size": config.intermediate_size,
        "zero_expert_num": getattr(router, "num_identity_experts", 0),
        "routed_scaling_factor": getattr(router, "routed_scaling_factor", 1.0),
        "head_dim": config.qk_rope_head_dim,
    }
