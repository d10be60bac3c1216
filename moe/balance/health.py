"""How evenly experts are loaded: the figures every run logs, from the counts of one global batch."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadFigures:
    """Means over layers and rounds, except the dead share, which is over all experts of all layers."""

    max_over_mean: float  # 1 = even; E/K = everything on K experts
    cv: float  # standard deviation over mean
    dead_expert_frac: float  # share of experts without a single token


def load_figures(tokens_per_expert_LE: Tensor, active_LE: Tensor | None = None) -> LoadFigures:
    """Return the figures of integer counts [L, E]; a layer without any token counts as even.

    Experts that are not active, which could not be chosen, are left out. None means that all are.
    """
    counts_LE = tokens_per_expert_LE.double()
    active_LE = counts_LE.new_ones(counts_LE.shape) if active_LE is None else active_LE.double()
    num_active_L1 = active_LE.sum(-1, keepdim=True)
    mean_L1 = counts_LE.sum(-1, keepdim=True) / num_active_L1
    ratio_LE = (counts_LE / mean_L1).where(mean_L1 > 0, active_LE)
    variance_L1 = ((ratio_LE - 1).square() * active_LE).sum(-1, keepdim=True) / num_active_L1
    dead_frac = ((ratio_LE == 0).double() * active_LE).sum() / active_LE.sum()
    # together: each number of its own that is fetched from a GPU waits once more
    figures = torch.stack((ratio_LE.amax(-1).mean(), variance_L1.sqrt().mean(), dead_frac)).tolist()
    return LoadFigures(max_over_mean=figures[0], cv=figures[1], dead_expert_frac=figures[2])
