"""Families: what a model of ours is called in transformers, field by field and tensor by tensor.

A family reads a configuration of transformers into a ModelConfig and writes one back. What it cannot write is found by
reading it again: a model is exported only if it comes back the same. Names of tensors are in moe/convert/names.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from moe.blocks.rope import RopeScaling
from moe.config import ModelConfig
from moe.convert import ConversionError
from moe.routers.topk import TopKConfig
from moe.routers.zero_experts import ZeroExpertsConfig


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of transformers."""

    model_type: str
    architecture: str  # the class in config.json
    config: type[PreTrainedConfig]
    read: Callable[[Any], dict[str, Any]]  # attributes of their configuration -> our fields beside the common ones
    write: Callable[[ModelConfig], dict[str, Any]]  # our configuration -> their fields beside the common ones
    experts: str = "mlp.experts.{e}.{gate_proj,up_proj,down_proj}"
    """How a file names the matrices of expert e: gate, up, down. Fused stacks are understood as well."""
    renames: tuple[tuple[str, str], ...] = ()  # ours -> theirs, before the common ones
    turns_pairs: bool = False  # positions turn neighbouring pairs of a head, not its halves (DeepSeek)
    is_gpt_oss: bool = False  # stacks are [E, in, out] with gate and up in turns
    has_unused_experts: bool = False  # fused stacks hold the zero-computation experts too (LongCat)

    @property
    def is_moe(self) -> bool:
        """Whether models of the family have experts."""
        return bool(self.experts)

    def to_ours(self, theirs: PreTrainedConfig) -> ModelConfig:
        """Return our configuration. Raises ConversionError for a field that our model does not have."""
        _expect(theirs, hidden_act="silu", mlp_bias=False)
        heads = theirs.num_attention_heads
        common: dict[str, Any] = {
            "vocab_size": theirs.vocab_size,
            "hidden_size": theirs.hidden_size,
            "num_hidden_layers": theirs.num_hidden_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": theirs.num_key_value_heads or heads,
            "max_position_embeddings": theirs.max_position_embeddings,
            "tie_word_embeddings": bool(theirs.tie_word_embeddings),
            "rms_norm_eps": theirs.rms_norm_eps,
            "rope_theta": float(theirs.rope_parameters["rope_theta"]),
            "rope_scaling": _read_rope(theirs),
            "initializer_range": theirs.initializer_range,
            "head_dim": getattr(theirs, "head_dim", None) or 0,
            "num_experts": 0,
            "num_experts_per_tok": 0,
            "moe_intermediate_size": 0,
        }
        config = ModelConfig(**{**common, **self.read(theirs)})
        if config.head_dim * heads == config.hidden_size:
            config = replace(config, head_dim=0)
        config.validate()
        return config

    def to_theirs(self, config: ModelConfig) -> PreTrainedConfig:
        """Return their configuration. Raises ConversionError naming every field that would not come back the same."""
        common = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "max_position_embeddings": config.max_position_embeddings,
            "tie_word_embeddings": config.tie_word_embeddings,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_parameters": _write_rope(config),
            "initializer_range": config.initializer_range,
            # or a class's own default comes in, and generation stops at somebody else's token
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        if not config.kv_lora_rank:
            common["head_dim"] = config.attention_head_dim
        try:
            theirs = self.config(**{**common, **self.write(config)})
            wanted, found = config.meaning(), self.to_ours(theirs).meaning()
        except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
            raise ConversionError(f"{self.model_type} cannot express this model: {error}") from error
        differing = [name for name in wanted if wanted[name] != found[name]]
        wrong = [f"model.{name} = {wanted[name]!r} (it would be {found[name]!r})" for name in differing]
        if wrong:
            raise ConversionError(f"{self.model_type} cannot express {'; '.join(wrong)}")
        theirs.architectures = [self.architecture]
        return theirs


def _expect(theirs: Any, **values: Any) -> None:
    """Raise ConversionError for a field that their configuration has with another value."""
    for name, value in values.items():
        found = getattr(theirs, name, value)
        if found != value and not (found is None and not value):
            raise ConversionError(f"{theirs.model_type}: {name} = {found!r}; this framework has {value!r} only")


_YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim")


def _read_rope(theirs: Any) -> RopeScaling:
    """Return how positions are stretched. Raises ConversionError for a way that our model does not have."""
    rope = dict(theirs.rope_parameters or {})
    kind, share = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    if kind not in ("default", "yarn") or share != 1.0 or rope.get("attention_factor") is not None:
        raise ConversionError(
            f"{theirs.model_type}: rope_parameters = {rope}; this framework turns whole heads, by plain frequencies or "
            "by YaRN with its own amplitude"
        )
    if kind == "default":
        return RopeScaling()
    given = {name: rope[name] for name in _YARN if rope.get(name) is not None}
    return RopeScaling(**{"original_max_position_embeddings": theirs.max_position_embeddings, **given})


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    if config.rope_scaling.factor == 1:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    values = {name: getattr(config.rope_scaling, name) for name in _YARN}
    if not values["mscale"] and not values["mscale_all_dim"]:
        del values["mscale"], values["mscale_all_dim"]
    return {"rope_type": "yarn", "rope_theta": config.rope_theta, **values}


def _window(theirs: Any) -> int:
    """Return the window that all layers share, 0 for none."""
    window = getattr(theirs, "sliding_window", None)
    return 0 if not window or window >= theirs.max_position_embeddings else window


def read_qwen2(c: Any) -> dict[str, Any]:
    """Qwen2: biases on queries, keys and values."""
    _expect(c, use_sliding_window=False)
    return {"intermediate_size": c.intermediate_size, "attention_bias": True}


def read_qwen3(c: Any) -> dict[str, Any]:
    """Qwen3: norms on the heads of queries and keys."""
    _expect(c, use_sliding_window=False, attention_bias=False)
    return {"intermediate_size": c.intermediate_size, "qk_norm": "head"}


def read_llama(c: Any) -> dict[str, Any]:
    _expect(c, attention_bias=False)
    return {"intermediate_size": c.intermediate_size, "sliding_window": _window(c)}


def write_dense(config: ModelConfig) -> dict[str, Any]:
    return {"intermediate_size": config.intermediate_size}


def write_mistral(config: ModelConfig) -> dict[str, Any]:
    return {**write_dense(config), "sliding_window": config.sliding_window or None}


def read_mixtral(c: Any) -> dict[str, Any]:
    return {
        "num_experts": c.num_local_experts,
        "num_experts_per_tok": c.num_experts_per_tok,
        "moe_intermediate_size": c.intermediate_size,
        "sliding_window": _window(c),
        "router": TopKConfig(norm_topk_prob=True),
    }


def write_mixtral(config: ModelConfig) -> dict[str, Any]:
    return {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "intermediate_size": config.moe_intermediate_size,
        "sliding_window": config.sliding_window or None,
    }


def read_olmoe(c: Any) -> dict[str, Any]:
    _expect(c, attention_bias=False, clip_qkv=None)
    return {
        "num_experts": c.num_experts,
        "num_experts_per_tok": c.num_experts_per_tok,
        "moe_intermediate_size": c.intermediate_size,
        "qk_norm": "full",
        "router": TopKConfig(norm_topk_prob=c.norm_topk_prob),
    }


def write_olmoe(config: ModelConfig) -> dict[str, Any]:
    return {
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": getattr(config.router, "norm_topk_prob", False),
    }


def read_qwen_moe(c: Any) -> dict[str, Any]:
    is_second = c.model_type == "qwen2_moe"
    shared = c.shared_expert_intermediate_size if is_second else 0
    bias = c.qkv_bias if is_second else c.attention_bias
    _expect(c, use_sliding_window=False, **({} if is_second else {"attention_bias": False}))
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
    _expect(c, attention_bias=False)
    return {"head_dim": 0, **{name: getattr(c, name) or 0 for name in LATENT}}


def write_latent(config: ModelConfig) -> dict[str, Any]:
    return {**{name: getattr(config, name) for name in LATENT}, "q_lora_rank": config.q_lora_rank or None}


def write_deepseek(config: ModelConfig) -> dict[str, Any]:
    return {**write_sigmoid(config), **write_latent(config)}


def read_deepseek(c: Any) -> dict[str, Any]:
    _expect(c, rope_interleave=True)
    return {**read_sigmoid(c), **read_latent(c)}


def read_glm(c: Any) -> dict[str, Any]:
    return {
        **read_sigmoid(c),
        "qk_norm": "head" if c.use_qk_norm else "none",
        "attention_bias": c.attention_bias,
    }


def write_glm(config: ModelConfig) -> dict[str, Any]:
    rope = {**_write_rope(config), "partial_rotary_factor": 1.0}
    return {
        **write_sigmoid(config),
        "use_qk_norm": config.qk_norm == "head",
        "attention_bias": config.attention_bias,
        "rope_parameters": rope,
    }


def read_dots(c: Any) -> dict[str, Any]:
    _expect(c, attention_bias=False)
    return {**read_sigmoid(c), "qk_norm": "head", "sliding_window": 0}


def _alternating(num_layers: int) -> list[str]:
    return ["full_attention" if index % 2 else "sliding_attention" for index in range(num_layers)]


def read_gpt_oss(c: Any) -> dict[str, Any]:
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
    return {
        **write_mixtral(config),
        "layer_types": _alternating(config.num_hidden_layers),
        "attention_bias": config.attention_bias,
    }


def read_longcat(c: Any) -> dict[str, Any]:
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
