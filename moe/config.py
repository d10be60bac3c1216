"""ModelConfig: what describes a model, in Hugging Face's names, and what cannot be built from it."""

from dataclasses import dataclass, field
from typing import Any

from moe.blocks.attention import QkNorm
from moe.blocks.chain import ChainConfig
from moe.blocks.rope import RopeScaling
from moe.routers import AnyRouter
from moe.routers.capacity import CapacityConfig
from moe.routers.cross_layer import PoolPlace, ReuseConfig
from moe.routers.topk import TopKConfig
from moe_kernels.spec import Activation, ExpertSpec


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer with dense and MoE layers. num_experts = 0 makes every layer dense."""

    __pydantic_config__ = {"extra": "forbid"}

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int  # longest sequence
    tie_word_embeddings: bool  # the head is the embedding table
    num_experts: int  # routed experts of an MoE layer
    num_experts_per_tok: int
    moe_intermediate_size: int  # hidden width of an expert
    expert_activation: Activation = "swiglu"  # of routed experts; "gpt_oss" is its clamped form (ExpertSpec)
    expert_bias: bool = False  # routed experts have biases (GPT-OSS)
    head_dim: int = 0  # 0 means hidden_size / num_attention_heads
    intermediate_size: int = 0  # hidden width of a dense layer; unused without dense layers
    first_k_dense_replace: int = 0  # the first layers are dense (DeepSeek)
    decoder_sparse_step: int = 1  # layer i can be MoE only if (i + 1) % step == 0 (Qwen)
    mlp_only_layers: tuple[int, ...] = ()  # more dense layers, by index (Qwen)
    shared_expert_intermediate_size: int = 0  # 0: no shared expert
    use_shared_expert_gate: bool = False  # shared expert times sigmoid(w . x) (Qwen2-MoE)
    qk_norm: QkNorm = "none"  # "head": over each head (Qwen3); "full": over all heads (OLMoE)
    attention_bias: bool = False  # of q_proj, k_proj, v_proj
    attention_output_bias: bool = False  # of o_proj
    sliding_window: int = 0  # tokens a query sees, itself included; 0 means all (Mistral, GPT-OSS)
    full_attention_interval: int = 0  # every so many layers, one sees all; 0: the window holds in all layers
    attention_sinks: bool = False  # a head may look at nothing, with a learned logit (GPT-OSS)
    kv_lora_rank: int = 0  # multi-head latent attention (DeepSeek-V2), with the four fields below; 0: ordinary
    q_lora_rank: int = 0  # 0: queries from the hidden state itself
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    scale_latents: bool = False  # by sqrt(hidden_size / rank) (LongCat-Flash)
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    is_shortcut_connected: bool = False  # a layer is two attentions and two dense FFNs beside one MoE (LongCat-Flash)
    initializer_range: float = 0.02  # standard deviation of initial weights
    router: AnyRouter = field(default_factory=TopKConfig)
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    chain: ChainConfig = field(default_factory=ChainConfig)
    reuse: ReuseConfig = field(default_factory=ReuseConfig)

    @property
    def attention_head_dim(self) -> int:
        """Width of a head, with 0 resolved."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def num_attention_layers(self) -> int:
        """Attentions of the model, each with a key-value cache."""
        return (2 if self.is_shortcut_connected else 1) * self.num_hidden_layers

    @property
    def num_dense_layers(self) -> int:
        """Dense feed-forwards of the model."""
        if self.is_shortcut_connected:
            return 2 * self.num_hidden_layers
        return self.num_hidden_layers - len(self.moe_layers)

    @property
    def rotary_dim(self) -> int:
        """Width of a head that positions turn."""
        return self.qk_rope_head_dim if self.kv_lora_rank else self.attention_head_dim

    @property
    def query_dim(self) -> int:
        """Width of a head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.kv_lora_rank else self.attention_head_dim

    @property
    def value_dim(self) -> int:
        """Width of a head's value."""
        return self.v_head_dim if self.kv_lora_rank else self.attention_head_dim

    def window(self, index: int) -> int:
        """Return how many tokens a query of layer `index` sees, 0 for all."""
        interval = self.full_attention_interval
        return 0 if interval and (index + 1) % interval == 0 else self.sliding_window

    @property
    def expert_spec(self) -> ExpertSpec:
        """What a routed expert computes. Raises ValueError for an activation that is unknown."""
        return ExpertSpec(activation=self.expert_activation)

    def is_moe_layer(self, index: int) -> bool:
        """Whether layer `index` has experts."""
        return (
            self.num_experts > 0
            and index >= self.first_k_dense_replace
            and (index + 1) % self.decoder_sparse_step == 0
            and index not in self.mlp_only_layers
        )

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts."""
        return tuple(index for index in range(self.num_hidden_layers) if self.is_moe_layer(index))

    def pool_place(self, index: int) -> PoolPlace:
        """Return where MoE layer `index` stands among the layers that share its experts."""
        layers = self.moe_layers
        return self.reuse.place(layers.index(index), num_layers=len(layers))

    @property
    def pool_sizes(self) -> tuple[int, ...]:
        """Experts of each pool, in order; a layer that shares nothing has a pool of its own."""
        places = {place.pool: place for place in map(self.pool_place, self.moe_layers)}
        return tuple(place.num_members * self.num_experts for place in places.values())

    @property
    def mean_experts_per_tok(self) -> float:
        """Experts that the average token runs in a round of an MoE layer, as far as the router says it."""
        return self.router.mean_experts_per_tok(self.num_experts_per_tok) if self.num_experts else 0.0

    @property
    def routing_names(self) -> tuple[str, ...]:
        """What to call the routings of a forward pass, in order: the layer and, in a chain, the round."""
        rounds = [f" round {t + 1}" for t in range(self.chain.rounds)] if self.chain.rounds > 1 else [""]
        return tuple(f"{index}{suffix}" for index in self.moe_layers for suffix in rounds)

    def meaning(self) -> dict[str, Any]:
        """Return what a trained model computes, in fields that are equal where two configurations mean the same.

        How layers are said to be dense, first weights, and what only steers training is left out.
        """
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("first_k_dense_replace", "decoder_sparse_step", "mlp_only_layers", "initializer_range"):
            del values[name]
        if not self.num_dense_layers:
            values["intermediate_size"] = 0
        if not self.kv_lora_rank:
            values["head_dim"] = self.attention_head_dim
        if not self.capacity.factor:
            values["capacity"] = CapacityConfig()
        values["rope_scaling"] = self.rope_scaling.meaning()
        values["router"] = self.router.meaning() if self.num_experts else None
        return {**values, "moe_layers": self.moe_layers}

    def differences(self, other: "ModelConfig") -> list[str]:
        """Return the fields in which the other model computes something else, as "name = this, there that".

        How many positions a model may read does not count: a run may be shorter.
        """
        ours, theirs = self.meaning(), other.meaning()
        wrong = [name for name in ours if ours[name] != theirs[name] and name != "max_position_embeddings"]
        return [f"{name} = {ours[name]!r}, there {theirs[name]!r}" for name in wrong]

    def validate(self) -> None:
        """Raise ValueError with the value, the limit and the remedy if no model can be built from this."""
        self._validate_numbers()
        self._validate_attention()
        if self.num_experts:
            self._validate_experts()
        else:
            self._validate_dense()
        if self.is_shortcut_connected:
            self._validate_shortcut()
        if len(self.moe_layers) < self.num_hidden_layers and not self.intermediate_size:
            dense = sorted(set(range(self.num_hidden_layers)) - set(self.moe_layers))
            raise ValueError(f"layers {dense} are dense but model.intermediate_size = 0; set it to their hidden width")

    def _validate_numbers(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "decoder_sparse_step",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} = {getattr(self, name)} must be at least 1")
        for name in (
            "num_experts",
            "head_dim",
            "intermediate_size",
            "shared_expert_intermediate_size",
            "first_k_dense_replace",
            "sliding_window",
            "full_attention_interval",
            "kv_lora_rank",
            "q_lora_rank",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name} = {getattr(self, name)} must not be negative")
        for name, limit in (("rms_norm_eps", 1.0), ("initializer_range", 1.0), ("rope_theta", float("inf"))):
            if not 0 < getattr(self, name) < limit:
                raise ValueError(f"model.{name} = {getattr(self, name)} must lie between 0 and {limit}, both excluded")

    def _validate_attention(self) -> None:
        heads, key_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % key_heads:
            divisors = [n for n in range(1, heads + 1) if heads % n == 0]
            raise ValueError(
                f"model.num_key_value_heads = {key_heads} does not divide num_attention_heads = {heads}; "
                f"use one of {divisors}"
            )
        self.rope_scaling.validate()
        if self.full_attention_interval and not self.sliding_window:
            raise ValueError(
                f"model.full_attention_interval = {self.full_attention_interval} needs model.sliding_window > 0"
            )
        if self.kv_lora_rank:
            self._validate_latent_attention()
            return
        for name in ("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "scale_latents"):
            if getattr(self, name):
                raise ValueError(f"model.{name} = {getattr(self, name)} needs model.kv_lora_rank > 0")
        if not self.head_dim and self.hidden_size % heads:
            raise ValueError(
                f"model.hidden_size = {self.hidden_size} is no multiple of num_attention_heads = {heads}; "
                "change one of them or set model.head_dim"
            )
        if self.attention_head_dim % 2:
            raise ValueError(
                f"a head is {self.attention_head_dim} wide, but rotary embedding turns pairs; make it even: "
                "set model.head_dim, or change model.hidden_size or model.num_attention_heads"
            )
        if self.qk_norm not in ("none", "head", "full"):
            raise ValueError(f"model.qk_norm = {self.qk_norm!r} must be one of 'none', 'head', 'full'")

    def _validate_shortcut(self) -> None:
        if len(self.moe_layers) < self.num_hidden_layers:
            raise ValueError(
                "model.is_shortcut_connected = True needs an MoE in every layer; set num_experts, and no dense layers"
            )
        if not self.intermediate_size:
            raise ValueError(
                "model.is_shortcut_connected = True needs model.intermediate_size, the width of its dense FFNs"
            )
        for name, default in (("chain", ChainConfig()), ("reuse", ReuseConfig())):
            if getattr(self, name) != default:
                raise ValueError(
                    f"model.{name} does not go with model.is_shortcut_connected = True; leave one of them out"
                )
        if self.sliding_window:
            raise ValueError(
                f"model.sliding_window = {self.sliding_window} does not go with model.is_shortcut_connected"
            )

    def _validate_latent_attention(self) -> None:
        for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"model.{name} = {getattr(self, name)} must be at least 1 with model.kv_lora_rank = "
                    f"{self.kv_lora_rank}"
                )
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"model.qk_rope_head_dim = {self.qk_rope_head_dim} must be even: positions turn pairs")
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"model.num_key_value_heads = {self.num_key_value_heads} must be num_attention_heads = "
                f"{self.num_attention_heads} with latent attention, whose heads all have keys of their own"
            )
        ordinary = {
            "head_dim": 0,
            "qk_norm": "none",
            "attention_bias": False,
            "attention_output_bias": False,
            "sliding_window": 0,
            "attention_sinks": False,
        }
        for name, value in ordinary.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"model.{name} = {getattr(self, name)!r} is for ordinary attention; with model.kv_lora_rank = "
                    f"{self.kv_lora_rank}, leave it at {value!r}"
                )

    def _validate_experts(self) -> None:
        if self.moe_intermediate_size < 1:
            raise ValueError(
                f"model.moe_intermediate_size = {self.moe_intermediate_size} must be at least 1 with "
                f"num_experts = {self.num_experts}"
            )
        _ = self.expert_spec
        self.chain.validate()
        self.reuse.validate()
        self.capacity.validate(num_experts_per_tok=self.num_experts_per_tok)
        if self.capacity.factor and not self.router.may_drop:
            raise ValueError(
                f"model.capacity.factor = {self.capacity.factor} does not go with router kind {self.router.kind!r}, "
                "which holds the load of its experts itself; set it to 0, which drops nothing"
            )
        # the experts of one layer too: a growing pool starts with so many
        for num_experts in sorted({self.num_experts, self.reuse.first_size(self.num_experts), *self.pool_sizes}):
            self.router.validate(num_experts=num_experts, num_experts_per_tok=self.num_experts_per_tok)
        if self.reuse.schedule != "none":
            self.router.check_can_close_experts()
        outside = [index for index in self.mlp_only_layers if not 0 <= index < self.num_hidden_layers]
        if outside:
            raise ValueError(
                f"model.mlp_only_layers = {self.mlp_only_layers} names {outside}; "
                f"use layers in 0..{self.num_hidden_layers - 1}"
            )
        if not self.moe_layers:
            raise ValueError(
                f"model.num_experts = {self.num_experts}, but all {self.num_hidden_layers} layers are dense: "
                f"first_k_dense_replace = {self.first_k_dense_replace}, decoder_sparse_step = "
                f"{self.decoder_sparse_step}, mlp_only_layers = {self.mlp_only_layers}; loosen these or set "
                "num_experts to 0"
            )
        if self.use_shared_expert_gate and not self.shared_expert_intermediate_size:
            raise ValueError("model.use_shared_expert_gate = True needs model.shared_expert_intermediate_size > 0")

    def _validate_dense(self) -> None:
        for name in (
            "num_experts_per_tok",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "use_shared_expert_gate",
        ):
            value = getattr(self, name)
            if value:
                raise ValueError(
                    f"model.{name} = {value} needs experts, but model.num_experts = 0; "
                    f"set num_experts, or {name} to {type(value)()}"
                )
        for name, default in (("chain", ChainConfig()), ("reuse", ReuseConfig()), ("capacity", CapacityConfig())):
            if getattr(self, name) != default:
                raise ValueError(
                    f"model.{name} = {getattr(self, name)} needs experts, but model.num_experts = 0; "
                    f"set num_experts, or leave model.{name} as it is"
                )
