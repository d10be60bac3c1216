"""The loss of one micro-batch, and what a step adds up of it.

Every term is divided by a count of the whole step (all ranks, all micro-batches), known before the first forward. So
the terms of all micro-batches and ranks simply add up to the loss of the global batch, however unevenly valid tokens
are spread; a mean per micro-batch would not.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.balance.load import BalanceConfig
from moe.balance.losses import load_balancing_loss, z_loss
from moe.balance.statistics import RouterStatistics


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerms:
    """This micro-batch's share of the step's loss. `total` carries the gradient."""

    total: Tensor  # scalar
    lm: Tensor  # scalar, detached


def language_model_loss(logits_BSV: Tensor, label_BS: Tensor, valid_BS: Tensor) -> Tensor:
    """Return the sum of the cross-entropy in nats over valid tokens, float32 scalar."""
    target_T = torch.where(valid_BS, label_BS, -100).flatten()
    return F.cross_entropy(logits_BSV.flatten(0, 1).float(), target_T, ignore_index=-100, reduction="sum")


def micro_batch_loss(
    *,
    logits_BSV: Tensor,
    label_BS: Tensor,
    valid_BS: Tensor,
    statistics: RouterStatistics | None,
    frequency_LE: Tensor | None,
    balance: BalanceConfig,
    num_step_tokens: int,
) -> LossTerms:
    """Return this micro-batch's share of the step's loss.

    Args:
        statistics: of the routings of this micro-batch; None for a model without MoE layers.
        frequency_LE: share of rows per expert over the balance scope.
        num_step_tokens: valid tokens of the whole step; each has one label and, in every layer, one routing.
    """
    lm = language_model_loss(logits_BSV, label_BS, valid_BS) / num_step_tokens
    total = lm
    if statistics is not None and frequency_LE is not None:
        # coefficient 0 still touches the graph, so that every layout builds the same one
        balance_L = load_balancing_loss(frequency_LE.float(), statistics.prob_sum_LE, num_step_tokens)
        z_L = z_loss(statistics.z_sum_L, num_step_tokens)
        total = total + balance.coefficient * balance_L.sum() + balance.z_coefficient * z_L.sum()
    return LossTerms(total=total, lm=lm.detach())
