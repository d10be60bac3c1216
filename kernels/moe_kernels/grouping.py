"""Grouping: the routed rows in expert order, and where each expert's rows begin.

Every backend that runs one expert at a time on contiguous rows starts here. Letters: N rows, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Grouping:
    """Rows sorted by expert, those of one expert in the order they came (a stable sort).

    Let R = offsets_E1[E], the number of rows in use. Then:
        the rows of expert e are order_N[offsets_E1[e] : offsets_E1[e + 1]], in ascending order;
        offsets_E1 starts at 0 and never falls, and an expert without rows has two equal offsets;
        positions R..N-1 hold the unused rows (expert id E): a backend never reads what these rows point at;
        order_N and inverse_N are permutations of 0..N-1 and undo each other.
    """

    order_N: Tensor  # int64, sorted position -> row
    inverse_N: Tensor  # int64, row -> sorted position
    offsets_E1: Tensor  # int64, [E + 1]


def group_rows(expert_N: Tensor, num_experts: int) -> Grouping:
    """Return the Grouping of `expert_N` (int64, 0..E, where E marks an unused row).

    Every shape depends on N and E alone and nothing is copied to the host, so the call neither waits for a
    device nor changes with the routing.
    """
    sorted_N, order_N = torch.sort(expert_N, stable=True)
    rows_N = torch.arange(expert_N.numel(), device=expert_N.device)
    experts_E1 = torch.arange(num_experts + 1, device=expert_N.device)
    return Grouping(
        order_N=order_N,
        inverse_N=torch.empty_like(order_N).scatter_(0, order_N, rows_N),
        offsets_E1=torch.searchsorted(sorted_N, experts_E1),
    )
