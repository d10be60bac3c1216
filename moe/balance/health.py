"""How evenly experts are loaded: the figures every run logs, from the counts of one global batch."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadFigures:
    """Means over layers and rounds, except the dead share, which is over all experts of all layers."""

    max_over_mean: float  # 1 = even; E/K = everything on K experts
    cv: float  # standard deviation over mean
    dead_expert_frac: float  # share of experts without a single token


def load_figures(tokens_per_expert_LE: Tensor) -> LoadFigures:
    """Return the figures of integer counts [L, E]; a layer without any token counts as even."""
    counts_LE = tokens_per_expert_LE.double()
    mean_L1 = counts_LE.mean(-1, keepdim=True)
    ratio_LE = (counts_LE / mean_L1).where(mean_L1 > 0, 1.0)
    return LoadFigures(
        max_over_mean=ratio_LE.amax(-1).mean().item(),
        cv=ratio_LE.std(-1, correction=0).mean().item(),
        dead_expert_frac=(ratio_LE == 0).double().mean().item(),
    )
