"""What losses and metrics read of a micro-batch: counts and sums over its valid tokens, one row per routing.

Computed once per micro-batch from the routings a model returned, outside every recomputed region. Nothing is counted in
`forward`, so recomputation cannot count twice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.routing import Routing


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterStatistics:
    """Sums over the valid tokens of one micro-batch. L counts routings: layers times rounds."""

    tokens_per_expert_LE: Tensor  # int64, no gradient
    prob_sum_LE: Tensor  # float32; the gradient of the load-balancing loss flows through it
    z_sum_L: Tensor  # float32, sum of logsumexp(logits)^2, with gradient
    entropy_sum_L: Tensor  # float32, sum of the entropy of probs in nats, no gradient
    num_tokens: Tensor  # int64 scalar


def collect(routings: list[Routing]) -> RouterStatistics:
    """Return the statistics of the routings of one micro-batch. Raises ValueError for a model without MoE layers."""
    if not routings:
        raise ValueError("a model without MoE layers returns no routing to collect statistics from")
    rows = [_one(routing) for routing in routings]
    counts, prob_sums, z_sums, entropies, num_tokens = (list(column) for column in zip(*rows, strict=True))
    return RouterStatistics(
        tokens_per_expert_LE=torch.stack(counts),
        prob_sum_LE=torch.stack(prob_sums),
        z_sum_L=torch.stack(z_sums),
        entropy_sum_L=torch.stack(entropies),
        num_tokens=num_tokens[0],
    )


def _one(routing: Routing) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    E = routing.assignment.num_experts
    # id E marks unused rows; their bin is dropped
    tokens_per_expert_E = torch.bincount(routing.assignment.expert_N, minlength=E + 1)[:E]
    probs_TE, logits_TE = routing.probs_TE, routing.logits_TE
    z_T = torch.logsumexp(logits_TE, dim=-1).square()
    with torch.no_grad():
        entropy_T = torch.special.entr(probs_TE).sum(-1)
    if routing.valid_T is None:
        num_tokens = torch.tensor(probs_TE.shape[0], device=probs_TE.device)
    else:
        # where, not a product: a padding row may hold anything, and 0 * nan is nan
        probs_TE = torch.where(routing.valid_T.unsqueeze(1), probs_TE, 0.0)
        z_T = torch.where(routing.valid_T, z_T, 0.0)
        entropy_T = torch.where(routing.valid_T, entropy_T, 0.0)
        num_tokens = routing.valid_T.sum()
    return tokens_per_expert_E, probs_TE.sum(0), z_T.sum(), entropy_T.sum(), num_tokens
