"""Routing that is told the domain of a text: groups of experts learn whose text is theirs.

    P_g = sum of the router's probabilities over the experts of group g    loss = -mean log P_z, z: the text's group

The warm-up of Innovator (arXiv 2507.18671) is science-aware in this way; how, the paper's abstract does not say, and
this form is ours. E experts are as many groups of equal size as there are names; text of other domains has no part in
it. As with the other losses, the sum over layers is minimised and the mean is logged.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.routing import Routing

UNSUPERVISED = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainSums:
    """Sums over the supervised tokens of one micro-batch and all its routings."""

    loss: Tensor  # scalar, float32, with gradient: of -log P_z
    num_right: Tensor  # int64 scalar: tokens whose group has the largest P


def domain_sums(routings: list[Routing], group_B: Tensor, *, num_groups: int) -> DomainSums:
    """Return the sums for B sequences of equal length.

    Args:
        routings: of a micro-batch; each has probabilities over a multiple of `num_groups` experts.
        group_B: int64, the group that each sequence's text belongs to; UNSUPERVISED for none.
    """
    losses, rights = [], []
    for routing in routings:
        T, E = routing.probs_TE.shape
        group_T = group_B.repeat_interleave(T // group_B.shape[0])
        counts_T = group_T != UNSUPERVISED
        if routing.valid_T is not None:
            counts_T = counts_T & routing.valid_T
        mass_TG = routing.probs_TE.reshape(T, num_groups, E // num_groups).sum(-1)
        mass_T = mass_TG.gather(1, group_T.clamp_min(0).unsqueeze(1)).squeeze(1)
        # 1 where nothing counts: its logarithm is 0, and so is its gradient, whatever a padding row holds
        mass_T = torch.where(counts_T, mass_T, 1.0)
        losses.append(-mass_T.clamp_min(torch.finfo(mass_T.dtype).tiny).log().sum())
        rights.append((counts_T & (mass_TG.argmax(-1) == group_T)).sum())
    return DomainSums(loss=torch.stack(losses).sum(), num_right=torch.stack(rights).sum())


def groups_of(batch_domain_B: Tensor, group_of_domain: list[int]) -> Tensor:
    """Return the group of each sequence, int64 [B], from the index of its domain."""
    return torch.tensor(group_of_domain, device=batch_domain_B.device)[batch_domain_B]
