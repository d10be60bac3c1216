"""Rows: lists of (token, expert, weight) from whatever a router decides, and the Grouping of such a list by expert.

Every backend that runs one expert at a time on contiguous rows starts here. Letters: T tokens, N rows, E experts,
K rows per token. Nothing here is copied to the host: shapes follow from T, E, K and a bound the caller names.
"""

from dataclasses import dataclass
from typing import NamedTuple

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


class Rows(NamedTuple):
    """A list of pairs (token, expert) and their weights, as backends take it."""

    token_N: Tensor  # int64
    expert_N: Tensor  # int64; E marks an unused row
    weight_N: Tensor
    fan_out: int | None  # K if rows t*K..t*K+K-1 are those of token t, else None


def _require(condition: Tensor, message: str) -> None:
    """Raise RuntimeError unless the condition holds: on a CPU at once, on a GPU without waiting for it."""
    torch._assert_async(condition, message)  # pyright: ignore[reportPrivateImportUsage]


def rows_from_topk(expert_TK: Tensor, weight_TK: Tensor) -> Rows:
    """Return the rows of K experts per token, in order; expert id E leaves a place unused."""
    T, K = expert_TK.shape
    token_N = torch.arange(T, device=expert_TK.device).repeat_interleave(K)
    return Rows(token_N, expert_TK.long().flatten(), weight_TK.flatten(), K)


def rows_from_mask(mask_TE: Tensor, weight_TE: Tensor, *, max_per_token: int | None = None) -> Rows:
    """Return the rows of the experts a mask allows each token, ascending, with their entries of weight_TE.

    Args:
        mask_TE: bool; a token may have any number of experts, or none.
        max_per_token: the fan-out of the list, E if not given. Rows a token does not need are unused.

    Raises:
        RuntimeError: a token has more experts than that; on a GPU when the assertion there is reached.
    """
    E = mask_TE.shape[1]
    K = E if max_per_token is None else min(max_per_token, E)
    _require((mask_TE.sum(1) <= K).all(), f"a token has more than max_per_token={K} experts")
    # stable: chosen experts first, in ascending order
    order_TE = mask_TE.logical_not().to(torch.int8).sort(dim=1, stable=True).indices[:, :K]
    expert_TK = order_TE.masked_fill(~mask_TE.gather(1, order_TE), E)
    return rows_from_topk(expert_TK, weight_TE.gather(1, order_TE))


def compact(rows: Rows, num_experts: int, *, max_rows: int) -> Rows:
    """Return the rows in use, in order, as a ragged list of `max_rows`; what is left over at its end is unused.

    A list of T * K rows of which few are used holds memory for all of them; this one for `max_rows`.

    Raises:
        RuntimeError: more rows are in use; on a GPU when the assertion there is reached.
    """
    is_used_N = rows.expert_N < num_experts
    _require(is_used_N.sum() <= max_rows, f"more than max_rows={max_rows} rows are in use")
    order_N = is_used_N.logical_not().to(torch.int8).sort(stable=True).indices[:max_rows]
    return Rows(rows.token_N[order_N], rows.expert_N[order_N], rows.weight_N[order_N], None)
