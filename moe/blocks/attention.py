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
        window: tokens a query sees, itself included; 0 means all before it (Mistral, GPT-OSS).
        has_sinks: each head may also look at nothing, with a learned logit: parameter `sinks` [H] (GPT-OSS).
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
        window: int = 0,
        has_sinks: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.window = window
        self.sinks = nn.Parameter(torch.empty(num_heads)) if has_sinks else None
        self.qk_norm: QkNorm = qk_norm
        query_size, key_size = num_heads * head_dim, num_key_value_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, query_size, bias=bias)
        self.k_proj = nn.Linear(hidden_size, key_size, bias=bias)
        self.v_proj = nn.Linear(hidden_size, key_size, bias=bias)
        self.o_proj = nn.Linear(query_size, hidden_size, bias=output_bias)
        if qk_norm != "none":
            is_full = qk_norm == "full"
            self.q_norm = RMSNorm(size=query_size if is_full else head_dim, eps=norm_eps)
            self.k_norm = RMSNorm(size=key_size if is_full else head_dim, eps=norm_eps)

    def forward(
        self,
        x_BSD: Tensor,
        cos_BSc: Tensor,
        sin_BSc: Tensor,
        cache: LayerCache | None = None,
        first_B: Tensor | None = None,
    ) -> Tensor:
        """Return y_BSD. Each token sees the tokens of `cache`, then those of x up to itself; `first_B` as in attend."""
        query, key = self.q_proj(x_BSD), self.k_proj(x_BSD)
        if self.qk_norm == "full":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = self._split(query), self._split(key)
        if self.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        query_BHSd = rotate(query.transpose(1, 2), cos_BSc, sin_BSc)
        key_BGSd = rotate(key.transpose(1, 2), cos_BSc, sin_BSc)
        value_BGSd = self._split(self.v_proj(x_BSD)).transpose(1, 2)
        y_BSd = attend(query_BHSd, key_BGSd, value_BGSd, cache, window=self.window, sinks_H=self.sinks, first_B=first_B)
        return self.o_proj(y_BSd)

    def _split(self, x: Tensor) -> Tensor:
        """Return [B, S, heads, d] of [B, S, heads*d]."""
        return x.unflatten(-1, (-1, self.head_dim))


def attend(
    query_BHSd: Tensor,
    key_BGSd: Tensor,
    value_BGSv: Tensor,
    cache: LayerCache | None,
    *,
    window: int = 0,
    sinks_H: Tensor | None = None,
    first_B: Tensor | None = None,
) -> Tensor:
    """Return what the heads see [B, S, H*v], causally; keys and values are appended to the cache first.

    Args:
        first_B: int64, place of the first token of each sequence, counted from the first of the cache: what stands
            before it is padding, which no token sees. None: all begin at 0.
    """
    num_new, num_past = query_BHSd.shape[2], 0
    if cache is not None:
        num_past = cache.length
        key_BGSd, value_BGSv = cache.append(key_BGSd, value_BGSv)
    is_plain = first_B is None and (num_past == 0 or num_new == 1)  # a causal or full view is right
    is_windowed = 0 < window < num_past + num_new
    mask = None
    if not is_plain or is_windowed or sinks_H is not None:
        mask = _seen(num_new, num_past, window, query_BHSd.device, first_B)
    if sinks_H is not None:
        assert mask is not None
        # one more key, zero, whose score is the sink and whose value is zero: it takes weight and gives nothing
        sink_H11 = sinks_H.to(query_BHSd.dtype)[:, None, None]
        bias_HSP = torch.zeros_like(sink_H11).masked_fill(~mask, float("-inf"))  # [B, H, S, P] with first_B
        mask = torch.cat((bias_HSP, sink_H11.expand(*bias_HSP.shape[:-1], 1)), dim=-1)
        key_BGSd, value_BGSv = F.pad(key_BGSd, (0, 0, 0, 1)), F.pad(value_BGSv, (0, 0, 0, 1))
    y_BHSv = F.scaled_dot_product_attention(
        query_BHSd,
        key_BGSd,
        value_BGSv,
        attn_mask=mask,
        is_causal=mask is None and num_past == 0,
        enable_gqa=query_BHSd.shape[1] != key_BGSd.shape[1],
    )
    return y_BHSv.transpose(1, 2).flatten(2)


def _seen(num_new: int, num_past: int, window: int, device: torch.device, first_B: Tensor | None) -> Tensor:
    """Return bool [S, P], or [B, 1, S, P] with first_B, True where a new token may look."""
    ones_SP = torch.ones(num_new, num_past + num_new, dtype=torch.bool, device=device)
    seen_SP = ones_SP.tril(diagonal=num_past)
    if window:
        seen_SP = seen_SP.triu(diagonal=num_past - window + 1)
    if first_B is None:
        return seen_SP
    place_P = torch.arange(num_past + num_new, device=device)
    # padding sees itself: some kernels make NaN of a row that sees nothing, and NaN times a weight of zero is NaN
    itself_SP = place_P == place_P[num_past:, None]
    return (seen_SP & (place_P >= first_B[:, None, None, None])) | itself_SP
