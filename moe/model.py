"""Model: embeddings, blocks, head.

State-dict names:

    embed_tokens.weight
    layers.N.attention_norm, layers.N.attention.{q,k,v,o}_proj[, q_norm, k_norm, sinks], layers.N.feed_forward_norm
    layers.N.attention.{q_a,q_b,kv_a,kv_b,o}_proj, .q_a_norm, .kv_a_norm         instead, latent attention
    layers.N.feed_forward.{gate,up,down}_proj                                    dense layer
    layers.N.attention.{0,1}, .feed_forward.{0,1} and their norms                shortcut-connected layer: two of each
    layers.N.moe.router, .moe.experts.{gate_up,down}_proj, .moe.shared_expert    MoE layer
    layers.N.moe.router.rounds.T                                                 instead, a router for each round
    pools.G.{gate_up,down}_proj                                                  instead, experts that layers share
    norm.weight, lm_head.weight                                                  no lm_head if tied
"""

from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.blocks.attention import Attention
from moe.blocks.block import Block, ShortcutBlock
from moe.blocks.cache import KeyValueCache
from moe.blocks.feed_forward import FeedForward, SharedExpert
from moe.blocks.latent_attention import LatentAttention
from moe.blocks.norm import RMSNorm
from moe.blocks.rope import rotation
from moe.config import ModelConfig
from moe.experts import Experts
from moe.layer import MoELayer
from moe.parallel.dispatch import make_dispatcher
from moe.parallel.groups import ParallelGroups
from moe.routers import Router
from moe.routers.rounds import RoundRouters
from moe.routing import RouterContext, Routing


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
        # experts that several layers share; no layer holds them, so that each is stored once
        self.pools = (
            nn.ModuleList(_make_experts(config, size, groups, backend) for size in config.pool_sizes)
            if config.reuse.group_size > 1
            else None
        )
        self._places = {index: config.pool_place(index) for index in config.moe_layers}
        self.norm = _make_norm(config)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    def forward(
        self,
        token_BS: Tensor,
        *,
        valid_BS: Tensor | None = None,
        first_B: Tensor | None = None,
        position_BS: Tensor | None = None,
        cache: KeyValueCache | None = None,
        context: RouterContext | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """Return (logits_BSV, one routing per MoE layer and round in order). Arguments as for `hidden`."""
        x_BSD, routings = self.hidden(
            token_BS, valid_BS=valid_BS, first_B=first_B, position_BS=position_BS, cache=cache, context=context
        )
        head_VD = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(x_BSD, head_VD), routings

    def hidden(
        self,
        token_BS: Tensor,
        *,
        valid_BS: Tensor | None = None,
        first_B: Tensor | None = None,
        position_BS: Tensor | None = None,
        cache: KeyValueCache | None = None,
        context: RouterContext | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """Return (x_BSD, which the head turns into logits; one routing per MoE layer and round in order).

        Args:
            token_BS: int64.
            valid_BS: bool, False on padding, which is not routed. Attention is causal, so no valid token looks
                at padding to the right of a sequence. Logits on padding mean nothing.
            first_B: place of the first token of each sequence, int64, counted from the start of the cache:
                attention sees none of the padding before it. None: there is none.
            position_BS: position of each token in its sequence, int64; default 0..S-1, after the tokens of
                the cache. Only differences matter, so padding before a sequence may count.
            cache: keys and values of earlier tokens; the new ones are appended.
            context: what routers may know, its tensors flattened to [B*S]; valid_BS fills its valid_T. None: a
                model whose training is over.
        """
        context = context if context is not None else RouterContext(progress=1.0)
        context = replace(context, token_T=token_BS.reshape(-1))
        if valid_BS is not None:
            context = replace(context, valid_T=valid_BS.reshape(-1))
        if position_BS is None:
            num_past = cache.length if cache is not None else 0
            position_BS = torch.arange(num_past, num_past + token_BS.shape[1], device=token_BS.device)
        cos_BSc, sin_BSc = rotation(
            position_BS,
            head_dim=self.config.rotary_dim,
            theta=self.config.rope_theta,
            scaling=self.config.rope_scaling,
        )
        x_BSD = self.embed_tokens(token_BS)
        routings: list[Routing] = []
        per_layer = self.config.num_attention_layers // self.config.num_hidden_layers
        for index, block in enumerate(self.layers):
            caches = cache.layers[index * per_layer : (index + 1) * per_layer] if cache is not None else None
            layer_context, pool = self._pool(index, context, token_BS.device)
            x_BSD, layer_routings = block(x_BSD, cos_BSc, sin_BSc, layer_context, caches, pool, first_B)
            routings += layer_routings
        return self.norm(x_BSD), routings

    def _pool(self, index: int, context: RouterContext, device: torch.device) -> tuple[RouterContext, Experts | None]:
        """Return what the router of layer `index` may know, and the experts it shares with other layers."""
        config = self.config
        is_growing = config.reuse.schedule != "none"
        if index not in self._places or (self.pools is None and not is_growing):
            return context, None
        place = self._places[index]
        open_E = config.reuse.open_experts(
            context,
            place=place,
            num_experts=config.num_experts,
            layer_index=index,
            is_training=self.training,
            device=device,
        )
        # an Experts, or what an adapter put around it
        pool = cast(Experts, self.pools[place.pool]) if self.pools is not None else None
        return replace(context, open_E=open_E, use_zero_score=config.reuse.mask == "zero_score"), pool


def _make_norm(config: ModelConfig) -> RMSNorm:
    return RMSNorm(size=config.hidden_size, eps=config.rms_norm_eps)


def _make_feed_forward(config: ModelConfig) -> FeedForward:
    return FeedForward(hidden_size=config.hidden_size, intermediate_size=config.intermediate_size)


def _make_block(
    config: ModelConfig, index: int, groups: ParallelGroups, backend: str, activation_checkpointing: bool
) -> Block | ShortcutBlock:
    if config.is_shortcut_connected:
        return ShortcutBlock(
            attention_norms=[_make_norm(config) for _ in range(2)],
            attentions=[_make_attention(config, index) for _ in range(2)],
            feed_forward_norms=[_make_norm(config) for _ in range(2)],
            feed_forwards=[_make_feed_forward(config) for _ in range(2)],
            moe=_make_moe(config, index, groups, backend, activation_checkpointing),
            activation_checkpointing=activation_checkpointing,
        )
    is_moe = config.is_moe_layer(index)
    return Block(
        attention_norm=_make_norm(config),
        attention=_make_attention(config, index),
        feed_forward_norm=_make_norm(config),
        feed_forward=None if is_moe else _make_feed_forward(config),
        moe=_make_moe(config, index, groups, backend, activation_checkpointing) if is_moe else None,
        chain=config.chain,
        activation_checkpointing=activation_checkpointing,
    )


def _make_attention(config: ModelConfig, index: int) -> Attention | LatentAttention:
    if config.kv_lora_rank:
        return LatentAttention(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=config.kv_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            scales_latents=config.scale_latents,
            score_factor=config.rope_scaling.score_factor,
        )
    return Attention(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.attention_head_dim,
        qk_norm=config.qk_norm,
        bias=config.attention_bias,
        output_bias=config.attention_output_bias,
        norm_eps=config.rms_norm_eps,
        window=config.window(index),
        has_sinks=config.attention_sinks,
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
    num_experts = config.pool_place(index).num_members * config.num_experts
    return MoELayer(
        router=_make_router(config, index, num_experts),
        dispatcher=make_dispatcher(groups, num_experts=num_experts),
        experts=_make_experts(config, num_experts, groups, backend) if config.reuse.group_size == 1 else None,
        shared_expert=shared_expert,
        capacity=config.capacity,
        experts_per_tok=config.mean_experts_per_tok,
        activation_checkpointing=activation_checkpointing,
    )


def _make_experts(config: ModelConfig, num_experts: int, groups: ParallelGroups, backend: str) -> Experts:
    return Experts(
        num_experts=num_experts,
        hidden_size=config.hidden_size,
        intermediate_size=config.moe_intermediate_size,
        groups=groups,
        backend=backend,
        activation=config.expert_spec.activation,
        has_bias=config.expert_bias,
    )


def _make_router(config: ModelConfig, index: int, num_experts: int) -> Router:
    routers = [
        config.router.build(
            hidden_size=config.hidden_size,
            num_experts=num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            layer_index=index,
        )
        for _ in range(config.chain.num_routers)
    ]
    return routers[0] if len(routers) == 1 else RoundRouters(routers)
