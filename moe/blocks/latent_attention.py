"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values of all heads from one narrow latent.

    q    = q_b(norm(q_a x))                     or q_proj x where q_lora_rank = 0
    c, r = kv_a x                               latent [kv_lora_rank] and the one rotary key [qk_rope_head_dim]
    k, v = kv_b(norm(c))                        per head: qk_nope_head_dim of key without position, v_head_dim of value

A head's query and key are the part without position, then the rotary part. Positions turn halves, as everywhere here;
DeepSeek's checkpoints turn neighbouring pairs, which is the same model with the rotary rows in another order.

Letters: H heads, d width of a head's query and key, P tokens seen so far.
"""

import torch
from torch import Tensor, nn

from moe.blocks.attention import attend
from moe.blocks.cache import LayerCache
from moe.blocks.norm import RMSNorm
from moe.blocks.rope import rotate

# DeepSeek and LongCat keep it for the norms of the latents, whatever the rms_norm_eps of the model
NORM_EPS = 1e-6


class LatentAttention(nn.Module):
    """Parameters `q_a_proj` [q_lora, D], `q_a_norm`, `q_b_proj` [H*d, q_lora] (or `q_proj` [H*d, D]), `kv_a_proj`
    [kv_lora + rope, D], `kv_a_norm`, `kv_b_proj` [H*(nope + v), kv_lora], `o_proj` [D, H*v].

    Args:
        scales_latents: multiply queries by sqrt(D / q_lora_rank) and the latent of keys and values by sqrt(D /
            kv_lora_rank), so that all have the variance of x (LongCat-Flash, arXiv 2509.01322).
        score_factor: on all scores, where positions are stretched (RopeScaling.score_factor).
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        q_lora_rank: int,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        scales_latents: bool = False,
        score_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self._num_heads = num_heads
        self._splits = (qk_nope_head_dim, qk_rope_head_dim, v_head_dim)
        query_size = num_heads * (qk_nope_head_dim + qk_rope_head_dim)
        if q_lora_rank:
            self.q_a_proj = nn.Linear(hidden_size, q_lora_rank, bias=False)
            self.q_a_norm = RMSNorm(size=q_lora_rank, eps=NORM_EPS)
            self.q_b_proj = nn.Linear(q_lora_rank, query_size, bias=False)
        else:
            self.q_proj = nn.Linear(hidden_size, query_size, bias=False)
        self.kv_a_proj = nn.Linear(hidden_size, kv_lora_rank + qk_rope_head_dim, bias=False)
        self.kv_a_norm = RMSNorm(size=kv_lora_rank, eps=NORM_EPS)
        self.kv_b_proj = nn.Linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * v_head_dim, hidden_size, bias=False)
        self._has_query_latent = bool(q_lora_rank)
        self._query_scale = score_factor * (
            (hidden_size / q_lora_rank) ** 0.5 if scales_latents and q_lora_rank else 1.0
        )
        self._latent_scale = (hidden_size / kv_lora_rank) ** 0.5 if scales_latents else 1.0

    def forward(
        self,
        x_BSD: Tensor,
        cos_BSc: Tensor,
        sin_BSc: Tensor,
        cache: LayerCache | None = None,
        first_B: Tensor | None = None,
    ) -> Tensor:
        """Return y_BSD. Each token sees the tokens of `cache`, then those of x up to itself; `first_B` as in attend."""
        nope, rope, value = self._splits
        query = self.q_b_proj(self.q_a_norm(self.q_a_proj(x_BSD))) if self._has_query_latent else self.q_proj(x_BSD)
        query_BHSd = self._heads(query) * self._query_scale
        latent, rotary_key = self.kv_a_proj(x_BSD).split((self.kv_a_proj.out_features - rope, rope), dim=-1)
        key_value_BHSd = self._heads(self.kv_b_proj(self.kv_a_norm(latent) * self._latent_scale))
        key_BHSn, value_BHSv = key_value_BHSd.split((nope, value), dim=-1)
        query_BHSn, query_BHSr = query_BHSd.split((nope, rope), dim=-1)
        # one rotary key for all heads
        key_BHSr = rotate(rotary_key.unsqueeze(1), cos_BSc, sin_BSc).expand(-1, self._num_heads, -1, -1)
        query_BHSd = torch.cat((query_BHSn, rotate(query_BHSr, cos_BSc, sin_BSc)), dim=-1)
        key_BHSd = torch.cat((key_BHSn, key_BHSr), dim=-1)
        return self.o_proj(attend(query_BHSd, key_BHSd, value_BHSv, cache, first_B=first_B))

    def _heads(self, x: Tensor) -> Tensor:
        """Return [B, H, S, width] of [B, S, H*width]."""
        return x.unflatten(-1, (self._num_heads, -1)).transpose(1, 2)
