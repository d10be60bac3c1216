"""Families: what a model of ours is called in transformers, field by field and tensor by tensor.

A family reads a configuration of transformers into a ModelConfig and writes one back. What it cannot write is found by
reading it again: a model is exported only if it comes back the same. Names of tensors are in moe/convert/names.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from moe.blocks.rope import RopeScaling
from moe.config import ModelConfig
from moe.convert import ConversionError


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
    shared_expert: Literal["if any", "always", "always, with gate"] = "if any"
    """Whether a shared expert of width 0 has tensors."""

    @property
    def is_moe(self) -> bool:
        """Whether models of the family have experts."""
        return bool(self.experts)

    def to_ours(self, theirs: PreTrainedConfig) -> ModelConfig:
        """Return our configuration. Raises ConversionError for a field that our model does not have."""
        expect(theirs, hidden_act="silu", mlp_bias=False)
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
        try:
            config.validate()
        except ValueError as error:
            raise ConversionError(f"{self.model_type}: {error}") from error
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
            "rope_parameters": write_rope(config),
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


def expect(theirs: Any, **values: Any) -> None:
    """Raise ConversionError for a field that their configuration has with another value."""
    for name, value in values.items():
        found = getattr(theirs, name, value)
        if found != value and not (found is None and not value):
            raise ConversionError(f"{theirs.model_type}: {name} = {found!r}; this framework has {value!r} only")


# fields of rope_parameters that are read, by type
_ROPE = {
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "truncate",
        "mscale",
        "mscale_all_dim",
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
_ANY_ROPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "attention_factor")


def _read_rope(theirs: Any) -> RopeScaling:
    """Return how positions are stretched. Raises ConversionError for a way that our model does not have."""
    rope = dict(theirs.rope_parameters or {})
    kind, share = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    is_known = kind == "default" or (kind in _ROPE and set(rope) <= {*_ROPE[kind], *_ANY_ROPE})
    if not is_known or share != 1.0 or rope.get("attention_factor") is not None:
        raise ConversionError(
            f"{theirs.model_type}: rope_parameters = {rope}; this framework turns whole heads, by plain frequencies, "
            "by YaRN with its own amplitude, or as Llama 3.1"
        )
    if kind == "default":
        return RopeScaling()
    given = {name: rope[name] for name in _ROPE[kind] if rope.get(name) is not None}
    return RopeScaling(
        **{"rope_type": kind, "original_max_position_embeddings": theirs.max_position_embeddings, **given}
    )


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """Return rope_parameters of transformers."""
    scaling = config.rope_scaling
    if scaling.factor == 1:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    values = {name: getattr(scaling, name) for name in _ROPE[scaling.rope_type]}
    if not values.get("mscale") and not values.get("mscale_all_dim"):
        values = {name: value for name, value in values.items() if not name.startswith("mscale")}
    return {"rope_type": scaling.rope_type, "rope_theta": config.rope_theta, **values}
