"""Rotary position embedding (arXiv 2104.09864), with the halves paired as in the Hugging Face Llama models.

    angle_i = position * f_i,  f_i = theta^(-2i/d), i = 0..d/2-1
    (x_i, x_{i+d/2}) turns by angle_i

YaRN (arXiv 2309.00071) stretches a trained range of positions: pairs that turn often keep their f_i, slow ones get
f_i / factor, those between a mixture. Llama 3.1 (arXiv 2407.21783) does so too, and mixes by how often a pair turns,
not by its index.

Letters: d width of a head, c = d/2 pairs.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from moe.blocks.fuse import fused_on_gpu


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """YaRN or Llama 3.1, with Hugging Face's names. A factor of 1 leaves everything as it is."""

    __pydantic_config__ = {"extra": "forbid"}

    rope_type: Literal["yarn", "llama3"] = "yarn"
    factor: float = 1.0  # how many times as many positions
    original_max_position_embeddings: int = 0  # the trained range
    low_freq_factor: float = 1.0  # llama3: a pair that turns less often over the trained range gets the whole factor
    high_freq_factor: float = 4.0  # llama3: one that turns more often keeps its frequency
    # the fields below are YaRN's
    beta_fast: float = 32.0  # a pair that turns more often than this over the trained range keeps its frequency
    beta_slow: float = 1.0  # one that turns less often is slowed by the whole factor
    truncate: bool = True  # the bounds between pairs are whole numbers (not in GPT-OSS)
    mscale: float = 0.0  # with mscale_all_dim, what queries and keys are multiplied by; see `amplitude`
    mscale_all_dim: float = 0.0  # latent attention also multiplies its scores; see `score_factor`

    def validate(self) -> None:
        """Raise ValueError for a value out of range."""
        if self.factor < 1:
            raise ValueError(f"model.rope_scaling.factor = {self.factor} must be at least 1; 1 scales nothing")
        if self.factor > 1 and self.original_max_position_embeddings < 1:
            raise ValueError(
                f"model.rope_scaling.factor = {self.factor} stretches the range "
                "model.rope_scaling.original_max_position_embeddings; set it to the positions the model was trained on"
            )
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"model.rope_scaling.beta_slow = {self.beta_slow} and beta_fast = {self.beta_fast} must be positive, "
                "the second larger"
            )
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"model.rope_scaling.low_freq_factor = {self.low_freq_factor} and high_freq_factor = "
                f"{self.high_freq_factor} must be positive, the second larger"
            )

    def meaning(self) -> "RopeScaling":
        """Return the same scaling with the fields that it does not read at their defaults."""
        plain = RopeScaling()
        if self.factor == 1:
            return plain
        if self.rope_type == "yarn":
            return replace(self, low_freq_factor=plain.low_freq_factor, high_freq_factor=plain.high_freq_factor)
        return replace(
            plain,
            rope_type=self.rope_type,
            factor=self.factor,
            original_max_position_embeddings=self.original_max_position_embeddings,
            low_freq_factor=self.low_freq_factor,
            high_freq_factor=self.high_freq_factor,
        )

    @property
    def amplitude(self) -> float:
        """What turned queries and keys are multiplied by: 0.1 ln(factor) + 1, or a ratio of two such."""
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    @property
    def score_factor(self) -> float:
        """What DeepSeek's latent attention multiplies its scores by."""
        return self._magnitude(self.mscale_all_dim) ** 2

    def _magnitude(self, mscale: float) -> float:
        if self.rope_type == "llama3":
            return 1.0
        return 0.1 * mscale * math.log(self.factor) + 1.0

    def stretched(self, frequency_c: Tensor, *, theta: float) -> Tensor:
        """Return the frequencies after scaling, float32."""
        if self.factor == 1:
            return frequency_c
        if self.rope_type == "llama3":
            turns_c = self.original_max_position_embeddings * frequency_c / (2 * math.pi)
            kept_c = (turns_c - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            share_c = 1 - kept_c.clamp(0, 1)
        else:
            share_c = self._share_of_pairs(frequency_c, theta)
        return frequency_c / self.factor * share_c + frequency_c * (1 - share_c)

    def _share_of_pairs(self, frequency_c: Tensor, theta: float) -> Tensor:
        """Return how much of the slowed frequency each pair gets by YaRN, 0 to 1."""
        first, last = (self._pair_that_turns(beta, frequency_c, theta) for beta in (self.beta_fast, self.beta_slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        # both bounds as transformers clamps them: the last one to a feature, not to a pair
        first, last = max(first, 0), min(last, 2 * len(frequency_c) - 1)
        pair_c = torch.arange(len(frequency_c), dtype=torch.float32, device=frequency_c.device)
        return ((pair_c - first) / (last - first or 0.001)).clamp(0, 1)

    def _pair_that_turns(self, times: float, frequency_c: Tensor, theta: float) -> float:
        """Return the index i, not rounded, of the pair that turns so often over the trained range."""
        turns = self.original_max_position_embeddings / (2 * math.pi * times)
        return len(frequency_c) * math.log(turns) / math.log(theta)


NO_SCALING = RopeScaling()


def rotation(
    position_S: Tensor, *, head_dim: int, theta: float, scaling: RopeScaling = NO_SCALING
) -> tuple[Tensor, Tensor]:
    """Return (cos, sin) of the angles times the amplitude, float32 [..., S, c].

    The frequencies are computed here and kept in no buffer, so that no cast of a model can round them. The
    angles are float32 in every model, as published checkpoints were trained.
    """
    exponent_c = torch.arange(0, head_dim, 2, device=position_S.device, dtype=torch.float32) / head_dim
    frequency_c = scaling.stretched(1.0 / theta**exponent_c, theta=theta)
    angle_Sc = position_S.to(torch.float32).unsqueeze(-1) * frequency_c
    return scaling.amplitude * angle_Sc.cos(), scaling.amplitude * angle_Sc.sin()


@fused_on_gpu
def rotate(x_BHSd: Tensor, cos_BSc: Tensor, sin_BSc: Tensor) -> Tensor:
    """Return the heads turned by their positions, dtype of x; computed in float32 or wider.

    `cos_BSc` and `sin_BSc` come from `rotation`; [S, c] serves every sequence of the batch.
    """
    cos_B1Sc, sin_B1Sc = cos_BSc.unsqueeze(-3), sin_BSc.unsqueeze(-3)
    first, second = x_BHSd.to(torch.promote_types(x_BHSd.dtype, torch.float32)).chunk(2, dim=-1)
    turned = torch.cat((first * cos_B1Sc - second * sin_B1Sc, second * cos_B1Sc + first * sin_B1Sc), dim=-1)
    return turned.to(x_BHSd.dtype)
