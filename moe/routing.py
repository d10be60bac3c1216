"""Who goes where, with what weight: the records that routers return and everything downstream reads.

Letters (docs/words.md): T tokens, D width, E experts, N routed (token, expert) rows, K experts per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """Which expert sees which token, and how much its answer counts. One row per (token, expert) pair."""

    token_N: Tensor  # int64, 0..T-1
    expert_N: Tensor  # int64, 0..E-1; E marks an unused row (skipped, never multiplied by 0)
    weight_N: Tensor  # float32; the gradient of the output reaches the router through it
    num_experts: int
    fan_out: int | None  # K if every token owns exactly K consecutive rows, else None (ragged)


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """What a router returns; losses, metrics and controllers read only this."""

    assignment: Assignment
    logits_TE: Tensor  # float32, raw; what the z-loss reads. Wider than E where zero-computation experts are scored
    probs_TE: Tensor  # float32, rows sum to 1; what the balance loss reads
    kept: Assignment | None = None  # what is left of the assignment where experts have a capacity; None means all of it
    valid_T: Tensor | None = None  # bool, False on padding: not dispatched, not counted
    active_E: Tensor | None = None  # bool, experts open at this step (growing pool); None means all
    identity_weight_T: Tensor | None = None  # weight of the token itself (zero-computation experts)
    added_TD: Tensor | None = None  # what else zero-computation experts add to a token, float32 or wider
    loss_sum: Tensor | None = None  # scalar with gradient: the router's own loss, summed over valid tokens, weighted


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterContext:
    """Everything a router may know besides x; the same on every layout.

    Noise is seeded by `position_T`, the global index of a token within its optimizer step, never by rank or
    micro-batch: a run is a function of its recipe, not of its layout.
    """

    seed: int = 0  # of the run; with step, layer and position it seeds every draw
    step: int = 0  # optimizer step
    progress: float = 0.0  # share of training done, 0..1
    round: int = 0  # chain of experts
    valid_T: Tensor | None = None  # bool
    position_T: Tensor | None = None  # int64
    token_T: Tensor | None = None  # int64, the id of each token in the vocabulary
    open_E: Tensor | None = None  # bool, experts that may be chosen at this step (growing pool); None means all
    use_zero_score: bool = False  # the others take part in the softmax and lose their score after it, not before


def count_ids(id_N: Tensor, num_ids: int) -> Tensor:
    """Return how often each of 0..num_ids-1 stands in `id_N` (int64, nothing else in it), int64 [num_ids]."""
    # not bincount: on a GPU it waits for the largest id, to learn the size of its answer
    return id_N.new_zeros(num_ids).scatter_add_(0, id_N, torch.ones_like(id_N))
