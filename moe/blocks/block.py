"""Block: one pre-norm decoder layer. ShortcutBlock: LongCat-Flash's, two of them around one MoE layer.

    x = x + attention(norm(x))
    x = x + feed_forward(norm(x))        or  moe(norm(x)), or a chain of several rounds of it: chain.py

    x = x + attention_0(norm(x));  u = norm(x);  s = moe(u);  x = x + feed_forward_0(u)        shortcut (2509.01322)
    x = x + attention_1(norm(x));  x = x + feed_forward_1(norm(x)) + s

Activation checkpointing keeps the input of each half and recomputes the rest in backward. The router stays
outside the recomputed part, so a recompute cannot route differently: the MoE layer recomputes its own part.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.blocks.attention import Attention
from moe.blocks.cache import LayerCache
from moe.blocks.chain import ChainConfig, run_chain
from moe.blocks.feed_forward import FeedForward
from moe.blocks.latent_attention import LatentAttention
from moe.blocks.norm import RMSNorm
from moe.experts import Experts
from moe.layer import MoELayer
from moe.routing import RouterContext, Routing


class RoutedBlock(nn.Module):
    """What all blocks have in common: perhaps an MoE layer, whose routers learn at the end of a step."""

    moe: MoELayer | None
    chain: ChainConfig
    activation_checkpointing: bool

    def end_step(self, tokens_per_expert_CE: Tensor, context: RouterContext, *, num_tokens: int) -> None:
        """Give the routers of an MoE layer the step's global counts, a row per round.

        A router of its own for each round gets the counts of that round. A shared one has one state for all rounds and
        sees C times as many tokens: it gets their sum.
        """
        assert self.moe is not None, "a dense block has no router"
        if self.chain.num_routers == 1:
            total_E = tokens_per_expert_CE.sum(0)
            self.moe.router.end_step(total_E, context, num_tokens=num_tokens * self.chain.rounds)
            return
        for t, counts_E in enumerate(tokens_per_expert_CE):
            self.moe.router.end_step(counts_E, replace(context, round=t), num_tokens=num_tokens)


class Block(RoutedBlock):
    """One decoder layer, with either a dense `feed_forward` or an `moe` layer (exactly one of the two).

    Args:
        chain: how often `moe` runs, and what its rounds pass on.
        activation_checkpointing: recompute attention and the dense feed-forward in backward. `moe` is told by
            its own argument of this name.
    """

    def __init__(
        self,
        *,
        attention_norm: RMSNorm,
        attention: Attention | LatentAttention,
        feed_forward_norm: RMSNorm,
        feed_forward: FeedForward | None = None,
        moe: MoELayer | None = None,
        chain: ChainConfig | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        assert (feed_forward is None) != (moe is None), "a block has a feed_forward or an moe layer"
        self.attention_norm = attention_norm
        self.attention = attention
        self.feed_forward_norm = feed_forward_norm
        # an absent one is no sub-module: names and iteration show what is there
        self.feed_forward = feed_forward
        self.moe = moe
        self.chain = chain if chain is not None else ChainConfig()
        self.activation_checkpointing = activation_checkpointing

    def forward(
        self,
        x_BSD: Tensor,
        cos_BSc: Tensor,
        sin_BSc: Tensor,
        context: RouterContext,
        caches: Sequence[LayerCache] | None = None,
        experts: Experts | None = None,
        first_B: Tensor | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """Return (x_BSD, the routings of this layer, one per round; none if it is dense).

        Args:
            caches: one for each attention of the block.
            experts: the pool, for an MoE layer that shares it with others.
            first_B: where each sequence begins, see attend; None: at 0.
        """
        # a recomputed attention would append to the cache twice
        is_recomputed = self.activation_checkpointing and self.training and caches is None
        if is_recomputed:
            x_BSD = _recomputed(partial(self._attend, first_B=first_B), x_BSD, cos_BSc, sin_BSc)
        else:
            x_BSD = self._attend(x_BSD, cos_BSc, sin_BSc, caches[0] if caches is not None else None, first_B)
        if self.moe is not None:
            return self._route(self.moe, x_BSD, context, experts)
        return (_recomputed(self._feed, x_BSD) if is_recomputed else self._feed(x_BSD)), []

    def _attend(
        self,
        x_BSD: Tensor,
        cos_BSc: Tensor,
        sin_BSc: Tensor,
        cache: LayerCache | None = None,
        first_B: Tensor | None = None,
    ) -> Tensor:
        return x_BSD + self.attention(self.attention_norm(x_BSD), cos_BSc, sin_BSc, cache, first_B)

    def _route(
        self, moe: MoELayer, x_BSD: Tensor, context: RouterContext, experts: Experts | None
    ) -> tuple[Tensor, list[Routing]]:
        def run_round(u_BSD: Tensor, t: int) -> tuple[Tensor, list[Routing]]:
            use_shared_expert = t < self.chain.num_shared_runs
            return moe(u_BSD, replace(context, round=t), experts=experts, use_shared_expert=use_shared_expert)

        return run_chain(x_BSD, chain=self.chain, norm=self.feed_forward_norm, run_round=run_round)

    def _feed(self, x_BSD: Tensor) -> Tensor:
        assert self.feed_forward is not None
        return x_BSD + self.feed_forward(self.feed_forward_norm(x_BSD))


class ShortcutBlock(RoutedBlock):
    """Two attentions and two dense feed-forwards, and one MoE layer beside them, which reads what the first
    feed-forward reads and joins at the end: nothing waits for its communication in between.

    Args:
        attention_norms, attentions, feed_forward_norms, feed_forwards: two of each, in order.
        activation_checkpointing: recompute each attention and feed-forward in backward.
    """

    def __init__(
        self,
        *,
        attention_norms: Sequence[RMSNorm],
        attentions: Sequence[nn.Module],
        feed_forward_norms: Sequence[RMSNorm],
        feed_forwards: Sequence[FeedForward],
        moe: MoELayer,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.ModuleList(attention_norms)
        self.attention = nn.ModuleList(attentions)
        self.feed_forward_norm = nn.ModuleList(feed_forward_norms)
        self.feed_forward = nn.ModuleList(feed_forwards)
        self.moe = moe
        self.chain = ChainConfig()
        self.activation_checkpointing = activation_checkpointing

    def forward(
        self,
        x_BSD: Tensor,
        cos_BSc: Tensor,
        sin_BSc: Tensor,
        context: RouterContext,
        caches: Sequence[LayerCache] | None = None,
        experts: Experts | None = None,
        first_B: Tensor | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """Return (x_BSD, the routing of this layer); arguments as for Block."""
        assert self.moe is not None
        is_recomputed = self.activation_checkpointing and self.training and caches is None
        run = _recomputed if is_recomputed else _directly
        first, second = (None, None) if caches is None else caches
        x_BSD = run(partial(self._attend, 0, cache=first, first_B=first_B), x_BSD, cos_BSc, sin_BSc)
        u_BSD = self.feed_forward_norm[0](x_BSD)
        shortcut_BSD, routings = self.moe(u_BSD, context, experts=experts)
        x_BSD = x_BSD + run(self.feed_forward[0], u_BSD)
        x_BSD = run(partial(self._attend, 1, cache=second, first_B=first_B), x_BSD, cos_BSc, sin_BSc)
        return run(self._feed, x_BSD) + shortcut_BSD, routings

    def _attend(
        self,
        index: int,
        x_BSD: Tensor,
        cos_BSc: Tensor,
        sin_BSc: Tensor,
        *,
        cache: LayerCache | None,
        first_B: Tensor | None,
    ) -> Tensor:
        return x_BSD + self.attention[index](self.attention_norm[index](x_BSD), cos_BSc, sin_BSc, cache, first_B)

    def _feed(self, x_BSD: Tensor) -> Tensor:
        return x_BSD + self.feed_forward[1](self.feed_forward_norm[1](x_BSD))


def end_routers_step(
    model: nn.Module, tokens_per_expert_LE: Tensor, context: RouterContext, *, num_tokens: int
) -> None:
    """Give every router the step's global counts, in the order in which the model returns routings."""
    blocks = [module for module in model.modules() if isinstance(module, RoutedBlock) and module.moe is not None]
    counts = tokens_per_expert_LE.split([block.chain.rounds for block in blocks])
    for block, counts_CE in zip(blocks, counts, strict=True):
        block.end_step(counts_CE, context, num_tokens=num_tokens)


def _directly(function, *args: Tensor) -> Tensor:
    return function(*args)


def _recomputed(function, *args: Tensor) -> Tensor:
    # nothing in a block draws random numbers, so there is no generator state to save
    y = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(y, Tensor)
    return y
