"""Evaluation per domain: loss, perplexity, bits per byte, and which experts the domain's tokens went to."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.balance.statistics import collect
from moe.data.store import PreparedData
from moe.data.tokens import Batch, validation_batches
from moe.parallel.groups import ParallelGroups
from moe.routing import RouterContext
from moe.train.loss import language_model_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainEvaluation:
    """Result on the held-out text of one domain, the same on every rank."""

    loss: float  # nats per token
    perplexity: float
    bits_per_byte: float | None  # None where the bytes of the text are unknown (token files brought by a user)
    num_tokens: int
    tokens_per_expert_LE: Tensor | None  # int64, on the CPU; None for a model without MoE layers


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: PreparedData,
    *,
    groups: ParallelGroups,
    sequence_length: int,
    batch_sequences: int,
    max_sequences: int,
    context: RouterContext | None = None,
) -> dict[str, DomainEvaluation]:
    """Return the evaluation of each domain by name. Collective; the model's training flag is restored.

    Args:
        batch_sequences: sequences in one forward of one rank.
        max_sequences: of each domain, at even distances in its held-out text.
        context: how far the training has come, for routers that change with it; None means that it is over.
    """
    was_training = model.training
    model.eval()
    try:
        return {
            domain.name: _evaluate_domain(
                model,
                validation_batches(
                    domain,
                    sequence_length=sequence_length,
                    batch_size=batch_sequences,
                    max_sequences=max_sequences,
                ),
                groups,
                context,
                bytes_per_token=domain.validation.num_bytes / max(1, domain.validation.num_tokens),
            )
            for domain in data.domains
        }
    finally:
        model.train(was_training)


def _evaluate_domain(
    model: nn.Module,
    batches: Iterable[Batch],
    groups: ParallelGroups,
    context: RouterContext | None,
    *,
    bytes_per_token: float,
) -> DomainEvaluation:
    loss_sum = torch.zeros((), dtype=torch.float64, device=groups.device)
    num_tokens = torch.zeros((), dtype=torch.int64, device=groups.device)
    counts_LE: Tensor | None = None
    for batch in _share_of_rank(batches, groups):
        batch = batch.to(groups.device)
        logits_BSV, routings = model(batch.token_BS, valid_BS=batch.valid_BS, context=context)
        loss_sum += language_model_loss(logits_BSV, batch.label_BS, batch.valid_BS).double()
        num_tokens += batch.valid_BS.sum()
        if routings:
            seen_LE = collect(routings).tokens_per_expert_LE
            counts_LE = seen_LE if counts_LE is None else counts_LE + seen_LE
    if groups.data_group is not None:
        for total in (loss_sum, num_tokens) if counts_LE is None else (loss_sum, num_tokens, counts_LE):
            dist.all_reduce(total, group=groups.data_group)
    loss = (loss_sum / num_tokens).item()
    return DomainEvaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),  # exp overflows above 709
        bits_per_byte=loss / math.log(2) / bytes_per_token if bytes_per_token else None,
        num_tokens=int(num_tokens),
        tokens_per_expert_LE=None if counts_LE is None else counts_LE.cpu(),
    )


def _share_of_rank(batches: Iterable[Batch], groups: ParallelGroups) -> Iterator[Batch]:
    """Yield every world_size-th batch; where batches run out, one without a valid token.

    A forward under expert parallelism is collective, so all ranks must run equally many.
    """
    rounds = zip_longest(*[iter(batches)] * groups.world_size)
    for batch_per_rank in rounds:
        batch = batch_per_rank[groups.rank]
        if batch is None:
            first = batch_per_rank[0]
            batch = replace(first, valid_BS=torch.zeros_like(first.valid_BS))
        yield batch
