"""Specialisation: how differently the domains use the experts, from counts of routed rows alone.

arXiv 2501.11873 compares domains by the frequency with which their tokens choose each expert. Here the frequency is a
share of the routed rows, so that it sums to 1 for any number of experts per token. Domains weigh the same however much
text each has: a figure must not change because more text of one domain was evaluated. Letter D counts domains.

A count of few rows looks specialised by chance: on n rows per domain, expect a mutual information of about
(E - 1) * (D - 1) / (2 * n * D * log D) where there is none.
"""

import math
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

_ROUNDING = 1e-9  # lifts this close to 1 are 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferredExpert:
    """An expert that a domain uses more than the domains do on average."""

    layer: int  # index into L of the counts
    expert: int
    share: float  # of the domain's rows in this layer
    lift: float  # share over its mean over domains


def preference_DLE(counts_DLE: Tensor) -> Tensor:
    """Return the share of a domain's rows that go to each expert; float64, sums to 1 over E, NaN without rows."""
    counts_DLE = counts_DLE.double()
    return counts_DLE / counts_DLE.sum(-1, keepdim=True)


def lift_DLE(counts_DLE: Tensor) -> Tensor:
    """Return preference over its mean over the domains that have rows: float64, 1 = as all domains together.

    NaN where there is nothing to compare: a domain without rows, an expert that no domain uses.
    """
    share_DLE = preference_DLE(counts_DLE)
    return share_DLE / share_DLE.nanmean(0)


def mutual_information_L(counts_DLE: Tensor) -> Tensor:
    """Return MI(domain; expert) / log(number of domains) of each layer: float64, 0 = no difference, 1 = disjoint.

    MI = sum over d, e of p(e | d) / D * log(p(e | d) / mean over d of p(e | d)), over the domains that have rows. With
    fewer than two of them it is 0.
    """
    return torch.stack([_mutual_information(share_DE) for share_DE in _present(counts_DLE)])


def jensen_shannon_L(counts_DLE: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of each layer, in bits, averaged over pairs of domains: float64, 0..1.

    Only domains that have rows count; with fewer than two of them it is 0.
    """
    return torch.stack([_jensen_shannon(share_DE) for share_DE in _present(counts_DLE)])


def preferred_experts(counts_DLE: Tensor, top: int) -> list[list[PreferredExpert]]:
    """Return, for each domain, the `top` experts of all layers with the highest lift, highest first.

    Only experts that take more than 1/E of the domain's rows and have a lift above 1: fewer than `top` where there are
    none, as for a single domain.
    """
    share_DLE, ratio_DLE = preference_DLE(counts_DLE), lift_DLE(counts_DLE)
    is_preferred_DLE = (share_DLE > 1 / counts_DLE.shape[-1]) & (ratio_DLE > 1 + _ROUNDING)
    preferred: list[list[PreferredExpert]] = [[] for _ in counts_DLE]
    for domain, layer, expert in is_preferred_DLE.nonzero().tolist():
        where = domain, layer, expert
        preferred[domain].append(
            PreferredExpert(layer=layer, expert=expert, share=share_DLE[where].item(), lift=ratio_DLE[where].item())
        )
    # the sort is stable: of equal lifts the larger share comes first, then the lower layer
    return [sorted(found, key=lambda e: (-e.lift, -e.share))[:top] for found in preferred]


def _present(counts_DLE: Tensor) -> list[Tensor]:
    """Return, for each layer, the shares [D', E] of the domains that have rows there."""
    return [share_DE[~share_DE.isnan().any(-1)] for share_DE in preference_DLE(counts_DLE).unbind(1)]


def _mutual_information(share_DE: Tensor) -> Tensor:
    num_domains = len(share_DE)
    if num_domains < 2:
        return share_DE.new_zeros(())
    # H(expert) - H(expert | domain); entr(0) is 0. Rounding must not make it negative.
    nats = _entropy(share_DE.mean(0)) - _entropy(share_DE).mean()
    return (nats / math.log(num_domains)).clamp(0, 1)


def _jensen_shannon(share_DE: Tensor) -> Tensor:
    pairs = [torch.stack(pair) for pair in combinations(share_DE, 2)]
    if not pairs:
        return share_DE.new_zeros(())
    # for two domains, the mutual information over log 2 is the divergence in bits
    return torch.stack([_mutual_information(pair_2E) for pair_2E in pairs]).mean()


def _entropy(share: Tensor) -> Tensor:
    return torch.special.entr(share).sum(-1)
