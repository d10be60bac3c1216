"""Block: one pre-norm decoder layer.

    x = x + attention(norm(x))
    x = x + feed_forward(norm(x))        or  moe(norm(x))

Activation checkpointing keeps the input of each half and recomputes the rest in backward. The router stays
outside the recomputed part, so a recompute cannot route differently: the MoE layer recomputes its own part.
"""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.blocks.attention import Attention
from moe.blocks.cache import LayerCache
from moe.blocks.feed_forward import FeedForward
from moe.blocks.norm import RMSNorm
from moe.layer import MoELayer
from moe.routing import RouterContext, Routing


class Block(nn.Module):
    """One decoder layer, with either a dense `feed_forward` or an `moe` layer (exactly one of the two).

    Args:
        activation_checkpointing: recompute attention and the dense feed-forward in backward. `moe` is told by
            its own argument of this name.
    """

    def __init__(
        self,
        *,
        attention_norm: RMSNorm,
        attention: Attention,
        feed_forward_norm: RMSNorm,
        feed_forward: FeedForward | None = None,
        moe: MoELayer | None = None,
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
        self.activation_checkpointing = activation_checkpointing

    def forward(
        self,
        x_BSD: Tensor,
        cos_BSc: Tensor,
        sin_BSc: Tensor,
        context: RouterContext,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """Return (x_BSD, the routings of this layer; none if it is dense)."""
        # a recomputed attention would append to the cache twice
        is_recomputed = self.activation_checkpointing and self.training and cache is None
        if is_recomputed:
            x_BSD = _recomputed(self._attend, x_BSD, cos_BSc, sin_BSc)
        else:
            x_BSD = self._attend(x_BSD, cos_BSc, sin_BSc, cache)
        if self.moe is not None:
            y_BSD, routings = self.moe(self.feed_forward_norm(x_BSD), context)
            return x_BSD + y_BSD, routings
        return (_recomputed(self._feed, x_BSD) if is_recomputed else self._feed(x_BSD)), []

    def _attend(self, x_BSD: Tensor, cos_BSc: Tensor, sin_BSc: Tensor, cache: LayerCache | None = None) -> Tensor:
        return x_BSD + self.attention(self.attention_norm(x_BSD), cos_BSc, sin_BSc, cache)

    def _feed(self, x_BSD: Tensor) -> Tensor:
        assert self.feed_forward is not None
        return x_BSD + self.feed_forward(self.feed_forward_norm(x_BSD))


def _recomputed(function, *args: Tensor) -> Tensor:
    # nothing in a block draws random numbers, so there is no generator state to save
    y = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(y, Tensor)
    return y
