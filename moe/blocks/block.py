"""Block: one pre-norm decoder layer.

    x = x + attention(norm(x))
    x = x + feed_forward(norm(x))        or  moe(norm(x)), or a chain of several rounds of it: chain.py

Activation checkpointing keeps the input of each half and recomputes the rest in backward. The router stays
outside the recomputed part, so a recompute cannot route differently: the MoE layer recomputes its own part.
"""

from dataclasses import replace

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


class Block(nn.Module):
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
        cache: LayerCache | None = None,
        experts: Experts | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """Return (x_BSD, the routings of this layer, one per round; none if it is dense).

        Args:
            experts: the pool, for an MoE layer that shares it with others.
        """
        # a recomputed attention would append to the cache twice
        is_recomputed = self.activation_checkpointing and self.training and cache is None
        if is_recomputed:
            x_BSD = _recomputed(self._attend, x_BSD, cos_BSc, sin_BSc)
        else:
            x_BSD = self._attend(x_BSD, cos_BSc, sin_BSc, cache)
        if self.moe is not None:
            return self._route(self.moe, x_BSD, context, experts)
        return (_recomputed(self._feed, x_BSD) if is_recomputed else self._feed(x_BSD)), []

    def _attend(self, x_BSD: Tensor, cos_BSc: Tensor, sin_BSc: Tensor, cache: LayerCache | None = None) -> Tensor:
        return x_BSD + self.attention(self.attention_norm(x_BSD), cos_BSc, sin_BSc, cache)

    def _route(
        self, moe: MoELayer, x_BSD: Tensor, context: RouterContext, experts: Experts | None
    ) -> tuple[Tensor, list[Routing]]:
        def run_round(u_BSD: Tensor, t: int) -> tuple[Tensor, list[Routing]]:
            use_shared_expert = t < self.chain.num_shared_runs
            return moe(u_BSD, replace(context, round=t), experts=experts, use_shared_expert=use_shared_expert)

        return run_chain(x_BSD, chain=self.chain, norm=self.feed_forward_norm, run_round=run_round)

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

    def _feed(self, x_BSD: Tensor) -> Tensor:
        assert self.feed_forward is not None
        return x_BSD + self.feed_forward(self.feed_forward_norm(x_BSD))


def _recomputed(function, *args: Tensor) -> Tensor:
    # nothing in a block draws random numbers, so there is no generator state to save
    y = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(y, Tensor)
    return y
