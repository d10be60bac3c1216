"""RMSNorm (arXiv 1910.07467).

    y = x / sqrt(mean(x^2) + eps) * weight

Computed in float32 (in float64 for float64) and rounded once at the end. In float32 it equals the norm of the
Hugging Face models to the bit; in bfloat16 those round once more, before the multiplication with the weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension. Parameter `weight` [D], starts at one."""

    def __init__(self, *, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x, same shape and dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
