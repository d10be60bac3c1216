"""Model: embeddings, blocks, head, and ModelConfig, which describes it in Hugging Face's names.

State-dict names:

    embed_tokens.weight
    layers.N.attention_norm, layers.N.attention.{q,k,v,o}_proj[, q_norm, k_norm], layers.N.feed_forward_norm
    layers.N.feed_forward.{gate,up,down}_proj                                    dense layer
    layers.N.moe.router, .moe.experts.{gate_up,down}_proj, .moe.shared_expert    MoE layer
    layers.N.moe.router.rounds.T                                                 instead, a router for each round
    norm.weight, lm_head.weight                                                  no lm_head if tied
"""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.blocks.attention import Attention, QkNorm
from moe.blocks.block import Block
from moe.blocks.cache import KeyValueCache
from moe.blocks.chain import ChainConfig
from moe.blocks.feed_forward import FeedForward, SharedExpert
from moe.blocks.norm import RMSNorm
from moe.blocks.rope import rotation
from moe.experts import Experts
from moe.layer import MoELayer
from moe.parallel.dispatch import make_dispatcher
from moe.parallel.groups import ParallelGroups
from moe.routers import AnyRouter, Router
from moe.routers.rounds import RoundRouters
from moe.routers.topk import TopKConfig
from moe.routing import RouterContext, Routing


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
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    initializer_range: float = 0.02  # standard deviation of initial weights
    router: AnyRouter = field(default_factory=TopKConfig)
    chain: ChainConfig = field(default_factory=ChainConfig)

    @property
    def attention_head_dim(self) -> int:
        """Width of a head, with 0 resolved."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

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

    @property
    def routing_names(self) -> tuple[str, ...]:
        """What to call the routings of a forward pass, in order: the layer and, in a chain, the round."""
        rounds = [f" round {t + 1}" for t in range(self.chain.rounds)] if self.chain.rounds > 1 else [""]
        return tuple(f"{index}{suffix}" for index in self.moe_layers for suffix in rounds)

    def validate(self) -> None:
        """Raise ValueError with the value, the limit and the remedy if no model can be built from this."""
        self._validate_numbers()
        self._validate_attention()
        if self.num_experts:
            self._validate_experts()
        else:
            self._validate_dense()
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

    def _validate_experts(self) -> None:
        if self.moe_intermediate_size < 1:
            raise ValueError(
                f"model.moe_intermediate_size = {self.moe_intermediate_size} must be at least 1 with "
                f"num_experts = {self.num_experts}"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"model.num_experts_per_tok = {self.num_experts_per_tok} must lie in 1..num_experts = "
                f"{self.num_experts}"
            )
        self.router.validate(num_experts=self.num_experts, num_experts_per_tok=self.num_experts_per_tok)
        self.chain.validate()
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
        if self.chain != ChainConfig():
            raise ValueError(
                f"model.chain = {self.chain} needs experts, but model.num_experts = 0; "
                "set num_experts, or leave model.chain as it is"
            )


class Model(nn.Module):
    """Token ids in, next-token logits and routings out.

    The experts of each MoE layer are split over the expert group; all else is the same on every rank. Weights
    are undefined until `moe.initial.initialise` or a checkpoint fills them. Under `torch.device("meta")` a
    model of any size is built without memory.

    Raises ValueError if the configuration is invalid or the experts do not divide over the expert group.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        groups: ParallelGroups,
        backend: str = "auto",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            _make_block(config, index, groups, backend, activation_checkpointing)
            for index in range(config.num_hidden_layers)
        )
        self.norm = _make_norm(config)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    def forward(
        self,
        token_BS: Tensor,
        *,
        valid_BS: Tensor | None = None,
        position_BS: Tensor | None = None,
        cache: KeyValueCache | None = None,
        context: RouterContext | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """Return (logits_BSV, one routing per MoE layer and round in order).

        Args:
            token_BS: int64.
            valid_BS: bool, False on padding, which is not routed. Attention is causal and knows no padding,
                so padding must stand to the right of a sequence, where no valid token looks. Logits on
                padding mean nothing.
            position_BS: position of each token in its sequence, int64; default 0..S-1, after the tokens of
                the cache.
            cache: keys and values of earlier tokens; the new ones are appended.
            context: what routers may know, its tensors flattened to [B*S]; valid_BS fills its valid_T.
        """
        context = replace(context if context is not None else RouterContext(), token_T=token_BS.reshape(-1))
        if valid_BS is not None:
            context = replace(context, valid_T=valid_BS.reshape(-1))
        if position_BS is None:
            num_past = cache.length if cache is not None else 0
            position_BS = torch.arange(num_past, num_past + token_BS.shape[1], device=token_BS.device)
        cos_BSc, sin_BSc = rotation(position_BS, head_dim=self.config.attention_head_dim, theta=self.config.rope_theta)
        x_BSD = self.embed_tokens(token_BS)
        routings: list[Routing] = []
        for index, block in enumerate(self.layers):
            layer_cache = cache.layers[index] if cache is not None else None
            x_BSD, layer_routings = block(x_BSD, cos_BSc, sin_BSc, context, layer_cache)
            routings += layer_routings
        x_BSD = self.norm(x_BSD)
        head_VD = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(x_BSD, head_VD), routings


def _make_norm(config: ModelConfig) -> RMSNorm:
    return RMSNorm(size=config.hidden_size, eps=config.rms_norm_eps)


def _make_block(
    config: ModelConfig, index: int, groups: ParallelGroups, backend: str, activation_checkpointing: bool
) -> Block:
    attention = Attention(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.attention_head_dim,
        qk_norm=config.qk_norm,
        bias=config.attention_bias,
        output_bias=config.attention_output_bias,
        norm_eps=config.rms_norm_eps,
    )
    is_moe = config.is_moe_layer(index)
    return Block(
        attention_norm=_make_norm(config),
        attention=attention,
        feed_forward_norm=_make_norm(config),
        feed_forward=None
        if is_moe
        else FeedForward(hidden_size=config.hidden_size, intermediate_size=config.intermediate_size),
        moe=_make_moe(config, index, groups, backend, activation_checkpointing) if is_moe else None,
        chain=config.chain,
        activation_checkpointing=activation_checkpointing,
    )


def _make_moe(
    config: ModelConfig, index: int, groups: ParallelGroups, backend: str, activation_checkpointing: bool
) -> MoELayer:
    shared_expert = None
    if config.shared_expert_intermediate_size:
        shared_expert = SharedExpert(
            hidden_size=config.hidden_size,
            intermediate_size=config.shared_expert_intermediate_size,
            use_sigmoid_gate=config.use_shared_expert_gate,
        )
    return MoELayer(
        router=_make_router(config, index),
        dispatcher=make_dispatcher(groups, num_experts=config.num_experts),
        experts=Experts(
            num_experts=config.num_experts,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            groups=groups,
            backend=backend,
        ),
        shared_expert=shared_expert,
        activation_checkpointing=activation_checkpointing,
    )


def _make_router(config: ModelConfig, index: int) -> Router:
    routers = [
        config.router.build(
            hidden_size=config.hidden_size,
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            layer_index=index,
        )
        for _ in range(config.chain.num_routers)
    ]
    return routers[0] if len(routers) == 1 else RoundRouters(routers)
