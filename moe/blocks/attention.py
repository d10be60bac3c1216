"""Causal grouped-query attention (arXiv 2305.13245) on torch's scaled_dot_product_attention.

Letters: H query heads, G key-value heads (H is a multiple of G), d width of a head, P tokens seen so far.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.blocks.cache import LayerCache
from moe.blocks.norm import RMSNorm
from moe.blocks.rope import rotate

QkNorm = Literal["none", "head", "full"]


class Attention(nn.Module):
    """Parameters `q_proj` [H*d, D], `k_proj`, `v_proj` [G*d, D], `o_proj` [D, H*d], biases where asked for.

    Args:
        qk_norm: RMSNorm on queries and keys before they are turned: "head" over each head (Qwen3), "full"
            over all heads at once (OLMoE). Parameters `q_norm`, `k_norm`.
        bias: of q_proj, k_proj and v_proj.
        output_bias: of o_proj.
        norm_eps: of the query and key norms.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        qk_norm: QkNorm,
        bias: bool,
        output_bias: bool,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qk_norm: QkNorm = qk_norm
        self.is_grouped = num_heads != num_key_value_heads
        query_size, key_size = num_heads * head_dim, num_key_value_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, query_size, bias=bias)
        self.k_proj = nn.Linear(hidden_size, key_size, bias=bias)
        self.v_proj = nn.Linear(hidden_size, key_size, bias=bias)
        self.o_proj = nn.Linear(query_size, hidden_size, bias=output_bias)
        if qk_norm != "none":
            is_full = qk_norm == "full"
            self.q_norm = RMSNorm(size=query_size if is_full else head_dim, eps=norm_eps)
            self.k_norm = RMSNorm(size=key_size if is_full else head_dim, eps=norm_eps)

    def forward(self, x_BSD: Tensor, cos_BSc: Tensor, sin_BSc: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Return y_BSD. Each token sees the tokens of `cache`, then those of x up to itself."""
        query, key = self.q_proj(x_BSD), self.k_proj(x_BSD)
        if self.qk_norm == "full":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = self._split(query), self._split(key)
        if self.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        query_BHSd = rotate(query.transpose(1, 2), cos_BSc, sin_BSc)
        key_BGPd = rotate(key.transpose(1, 2), cos_BSc, sin_BSc)
        value_BGPd = self._split(self.v_proj(x_BSD)).transpose(1, 2)
        num_past = 0
        if cache is not None:
            num_past = cache.length
            key_BGPd, value_BGPd = cache.append(key_BGPd, value_BGPd)
        y_BHSd = F.scaled_dot_product_attention(
            query_BHSd,
            key_BGPd,
            value_BGPd,
            attn_mask=_mask(x_BSD.shape[1], num_past, x_BSD.device),
            is_causal=num_past == 0,
            enable_gqa=self.is_grouped,
        )
        return self.o_proj(y_BHSd.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """Return [B, S, heads, d] of [B, S, heads*d]."""
        return x.unflatten(-1, (-1, self.head_dim))


def _mask(num_new: int, num_past: int, device: torch.device) -> Tensor | None:
    """Return bool [S, P], True where a new token may look; None where a causal or full view is right."""
    if num_past == 0 or num_new == 1:
        return None
    return torch.ones(num_new, num_past + num_new, dtype=torch.bool, device=device).tril(diagonal=num_past)
