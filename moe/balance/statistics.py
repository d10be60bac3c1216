"""What losses and metrics read of a micro-batch: counts and sums over its valid tokens, one row per routing.

Computed once per micro-batch from the routings a model returned, outside every recomputed region. Nothing is counted
in `forward`, so recomputation cannot count twice.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.routing import Routing, count_ids


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterStatistics:
    """Sums over the valid tokens of one micro-batch of B sequences. L counts routings: layers times rounds.

    E is that of the layer with most experts. Where a layer has fewer, or not all of them are open, its sums of
    probabilities are scaled by their number over E, which makes the loss E * sum_i f_i P_i 1 at uniform load over them.
    """

    tokens_per_expert_BLE: Tensor  # int64, no gradient
    prob_sum_BLE: Tensor  # float32; the gradient of the load-balancing loss flows through it
    z_sum_L: Tensor  # float32, sum of logsumexp(logits)^2, with gradient
    entropy_sum_L: Tensor  # float32, sum of the entropy of probs in nats, with gradient
    router_loss_sum_L: Tensor  # float32, sum of the routers' own losses, already weighted, with gradient
    num_dropped_L: Tensor  # int64, chosen rows that found no room
    num_tokens: Tensor  # int64 scalar
    active_LE: Tensor | None = None  # bool, False where there is no expert or a closed one; None means all

    @property
    def tokens_per_expert_LE(self) -> Tensor:
        """Counts of the whole micro-batch, int64."""
        return self.tokens_per_expert_BLE.sum(0)

    @property
    def prob_sum_LE(self) -> Tensor:
        """Probability sums of the whole micro-batch, float32, with gradient."""
        return self.prob_sum_BLE.sum(0)


def collect(routings: list[Routing], *, num_sequences: int = 1) -> RouterStatistics:
    """Return the statistics of the routings of one micro-batch of `num_sequences` sequences of equal length.

    Raises ValueError for a model without MoE layers.
    """
    if not routings:
        raise ValueError("a model without MoE layers returns no routing to collect statistics from")
    E = max(routing.assignment.num_experts for routing in routings)
    rows = [_one(routing, num_sequences) for routing in routings]
    counts, prob_sums, z_sums, entropies, router_losses, dropped, num_tokens = (
        list(column) for column in zip(*rows, strict=True)
    )
    active_LE = _active(routings, E)
    prob_sum_BLE = torch.stack([_widened(prob_sum_BE, E) for prob_sum_BE in prob_sums], dim=1)
    if active_LE is not None:
        prob_sum_BLE = prob_sum_BLE * (active_LE.sum(-1, keepdim=True) / E).to(prob_sum_BLE.dtype)
    return RouterStatistics(
        tokens_per_expert_BLE=torch.stack([_widened(counts_BE, E) for counts_BE in counts], dim=1),
        prob_sum_BLE=prob_sum_BLE,
        active_LE=active_LE,
        z_sum_L=torch.stack(z_sums),
        entropy_sum_L=torch.stack(entropies),
        router_loss_sum_L=torch.stack(router_losses),
        num_dropped_L=torch.stack(dropped),
        num_tokens=num_tokens[0],
    )


def _widened(values_BE: Tensor, num_experts: int) -> Tensor:
    """Return the values with zeros for experts that other layers have more."""
    return F.pad(values_BE, (0, num_experts - values_BE.shape[1])) if values_BE.shape[1] < num_experts else values_BE


def _active(routings: list[Routing], num_experts: int) -> Tensor | None:
    """Return which of the widest layer's experts each routing could choose, bool [L, E]; None means all."""
    if all(r.active_E is None and r.assignment.num_experts == num_experts for r in routings):
        return None
    rows = []
    for routing in routings:
        active_E = routing.active_E
        if active_E is None:
            active_E = torch.ones(routing.assignment.num_experts, dtype=torch.bool, device=routing.logits_TE.device)
        rows.append(F.pad(active_E, (0, num_experts - active_E.shape[0])))
    return torch.stack(rows)


def _one(routing: Routing, num_sequences: int) -> tuple[Tensor, ...]:
    E = routing.assignment.num_experts
    probs_TE, logits_TE = routing.probs_TE, routing.logits_TE
    T = probs_TE.shape[0]
    z_T = torch.logsumexp(logits_TE, dim=-1).square()
    # held above zero: at 0 the derivative is infinite, and infinity times a softmax's 0 is nan
    entropy_T = torch.special.entr(probs_TE.clamp_min(torch.finfo(probs_TE.dtype).tiny)).sum(-1)
    router_loss = z_T.new_zeros(()) if routing.loss_sum is None else routing.loss_sum
    if routing.valid_T is None:
        num_tokens = torch.tensor(T, device=probs_TE.device)
    else:
        # where, not a product: a padding row may hold anything, and 0 * nan is nan
        probs_TE = torch.where(routing.valid_T.unsqueeze(1), probs_TE, 0.0)
        z_T = torch.where(routing.valid_T, z_T, 0.0)
        entropy_T = torch.where(routing.valid_T, entropy_T, 0.0)
        num_tokens = routing.valid_T.sum()
    B = num_sequences
    # one bin per sequence and expert; id E marks unused rows, whose bins are dropped
    sequence_N = routing.assignment.token_N // max(T // B, 1)
    bin_N = sequence_N * (E + 1) + routing.assignment.expert_N
    counts_BE = count_ids(bin_N, B * (E + 1)).view(B, E + 1)[:, :E]
    prob_sum_BE = probs_TE.reshape(B, T // B, probs_TE.shape[1]).sum(1)
    num_dropped = torch.zeros_like(num_tokens)
    if routing.kept is not None:
        num_dropped = ((routing.assignment.expert_N < E) & (routing.kept.expert_N == E)).sum()
    return counts_BE, prob_sum_BE, z_T.sum(), entropy_T.sum(), router_loss, num_dropped, num_tokens
