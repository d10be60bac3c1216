"""The loss of one micro-batch, and what a step adds up of it.

Every term is divided by a count of the whole step (all ranks, all micro-batches), known before the first forward. So
the terms of all micro-batches and ranks simply add up to the loss of the global batch, however unevenly valid tokens
are spread; a mean per micro-batch would not.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.balance.domains import DomainSums
from moe.balance.load import BalanceConfig, GlobalLoad
from moe.balance.losses import frequency, load_balancing_loss, z_loss
from moe.balance.statistics import RouterStatistics
from moe.blocks.fuse import fused_on_gpu


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerms:
    """This micro-batch's share of the step's loss. `total` carries the gradient."""

    total: Tensor  # scalar
    lm: Tensor  # scalar, detached
    balance: Tensor | None  # scalar, weighted load-balancing loss of both terms, with gradient; None without MoE layers
    is_finite: Tensor  # bool scalar: loss and router logits are; if not, `total` is nan


def language_model_loss(logits_BSV: Tensor, label_BS: Tensor, valid_BS: Tensor) -> Tensor:
    """Return the sum of the cross-entropy in nats over valid tokens; scalar, float32 (float64 for a float64 model)."""
    target_T = torch.where(valid_BS, label_BS, -100).flatten()
    return _cross_entropy_sum(logits_BSV.flatten(0, 1), target_T)


@fused_on_gpu
def _cross_entropy_sum(logits_TV: Tensor, target_T: Tensor) -> Tensor:
    # fused, no float32 copy of the logits is made: several GB in a large vocabulary
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    return F.cross_entropy(logits_TV.to(wide), target_T, ignore_index=-100, reduction="sum")


def micro_batch_loss(
    *,
    lm_sum: Tensor,
    statistics: RouterStatistics | None,
    load: GlobalLoad,
    balance: BalanceConfig,
    num_tokens: int,
    domains: DomainSums | None = None,
    num_supervised: int = 0,
) -> LossTerms:
    """Return this micro-batch's share of the step's loss. Collective where the balance scope is.

    Args:
        lm_sum: cross-entropy, summed over the valid tokens of this micro-batch.
        statistics: of the routings of this micro-batch; None for a model without MoE layers.
        load: of this step.
        num_tokens: valid tokens of the whole step; each has one label and, in every layer, one routing.
        domains: with balance.domain_groups, sums of this micro-batch.
        num_supervised: valid tokens of the whole step that belong to one of these domains.
    """
    lm = lm_sum / num_tokens
    total, balance_term = lm, None
    if statistics is not None:
        # a coefficient of 0 still touches the graph, so that every recipe builds the same one
        balance_term = balance.coefficient * load.balance_loss(statistics, num_tokens).sum()
        if balance.local_coefficient:
            local_LE = frequency(statistics.tokens_per_expert_LE)
            local_L = load_balancing_loss(local_LE, statistics.prob_sum_LE, num_tokens)
            balance_term = balance_term + balance.local_coefficient * local_L.sum()
        total = total + balance_term
        total = total + balance.z_coefficient * z_loss(statistics.z_sum_L, num_tokens).sum()
        total = total + statistics.router_loss_sum_L.sum() / num_tokens
        if balance.entropy_coefficient:
            total = total + balance.entropy_coefficient * statistics.entropy_sum_L.sum() / num_tokens
    if domains is not None:
        total = total + balance.domain_coefficient * domains.loss / max(num_supervised, 1)
    # logits that are not finite show in z_sum even where the loss does not see them
    is_finite = torch.isfinite(total)
    if statistics is not None:
        is_finite = is_finite & torch.isfinite(statistics.z_sum_L).all()
    # nan times the loss makes every gradient nan, on every rank after the reduction: the engine then skips the step
    total = total * torch.where(is_finite, 1.0, float("nan"))
    return LossTerms(total=total, lm=lm.detach(), balance=balance_term, is_finite=is_finite)
