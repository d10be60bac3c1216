"""Selection bias: balance without an auxiliary loss (arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437).

A bias per expert is added to the scores for the choice of experts only; it never touches the weights. After each
optimizer step it moves against the load: b_i += rate * sign(mean(load) - load_i), from the counts of the whole global
batch.
"""

import torch
from torch import Tensor


def updated_bias(bias_E: Tensor, tokens_per_expert_E: Tensor, *, rate: float) -> Tensor:
    """Return the bias after one optimizer step, float32 [E]; equal load leaves it as it is."""
    load_E = tokens_per_expert_E.to(device=bias_E.device, dtype=torch.float32)
    return bias_E + rate * torch.sign(load_E.mean() - load_E)
