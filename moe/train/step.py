"""One optimizer step: all micro-batches of this rank, forward and backward, then the update and the routers' own.

Order: count the step's tokens -> (scope exact with accumulation: count its expert load in a pass of its own) -> for
each micro-batch: forward, statistics, balance over the scope, loss, backward -> counts of the global batch -> engine
step -> routers' end of step -> sums for the log.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from moe.balance.domains import UNSUPERVISED, DomainSums, domain_sums, groups_of
from moe.balance.health import LoadFigures, load_figures
from moe.balance.load import BalanceConfig, GlobalLoad
from moe.balance.losses import frequency, load_balancing_loss
from moe.balance.statistics import RouterStatistics, collect
from moe.blocks.block import end_routers_step
from moe.data.tokens import Batch
from moe.parallel.groups import ParallelGroups
from moe.routing import RouterContext
from moe.train.engine import Engine, StepResult
from moe.train.loss import LossTerms, language_model_loss, micro_batch_loss
from moe.train.router_gradients import RouterGradients, mean_ratio


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """What one step did, the same on every rank. Balance and z-loss are unweighted means over layers."""

    num_tokens: int  # valid tokens of the global batch
    loss: float  # what was minimised
    lm_loss: float
    load_balancing_loss: float  # of the whole global batch, uniform = 1, whatever the scope of the gradient
    z_loss: float
    router_entropy: float  # nats, mean over tokens and layers
    experts_per_token: float  # that ran
    router_grad_ratio: float | None  # moe.train.router_gradients; None where it was not measured, or is 0 / 0
    dropped_frac: float  # share of the chosen rows for which experts had no room
    domain_loss: float | None  # of balance.domain_groups, mean over supervised tokens and layers; None without
    domain_accuracy: float | None  # share of them whose group has the most probability
    grad_norm: float
    is_skipped: bool
    bad_micro_batches: tuple[int, ...]  # of this rank: those whose loss or router logits were not finite
    load: LoadFigures | None
    tokens_per_expert_LE: Tensor | None  # int64, of the global batch


class TrainStep:
    """Runs optimizer steps of one engine.

    Args:
        engine: holds the model.
        groups: of this rank.
        balance: scope and coefficients.
        seed: of the run; seeds router noise.
        domains: names of the domains of the data, in its order.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        groups: ParallelGroups,
        balance: BalanceConfig,
        seed: int,
        domains: Sequence[str] = (),
    ) -> None:
        self._engine = engine
        self._groups = groups
        self._balance = balance
        self._seed = seed
        names = balance.domain_groups
        self._group_of_domain = [names.index(name) if name in names else UNSUPERVISED for name in domains]
        self.load = GlobalLoad(
            scope=balance.scope,
            is_per_token=balance.frequency == "per_token",
            smoothing=balance.smoothing,
            group=groups.data_group,
        )

    def context(self, *, step: int, progress: float) -> RouterContext:
        """Return what routers may know after `step` optimizer steps."""
        return RouterContext(seed=self._seed, step=step, progress=progress)

    def run(
        self,
        batches: list[Batch],
        *,
        step: int,
        progress: float,
        learning_rate: float,
        measures_gradients: bool = False,
    ) -> StepRecord:
        """Return what the step did. Raises ValueError for a global batch without a valid token.

        Args:
            measures_gradients: fill `router_grad_ratio`, which costs a few passes over all router logits.
        """
        num_tokens, num_supervised = self._sum_ints(
            sum(batch.num_valid for batch in batches), sum(self._num_supervised(batch) for batch in batches)
        )
        if num_tokens == 0:
            raise ValueError(f"step {step}: the global batch holds no valid token; check the data and its padding")
        self._engine.module.train()
        context = self.context(step=step, progress=progress)
        batches = [batch.to(self._groups.device) for batch in batches]
        if self._balance.scope == "exact" and len(batches) > 1:
            self._count(batches, context)
        # DeepSpeed averages gradients over the ranks; the terms are shares of a sum
        loss_scale = float(self._groups.world_size)
        sums = _StepSums(gradients=RouterGradients(loss_scale=loss_scale) if measures_gradients else None)
        for batch in batches:
            self._micro_step(batch, context, num_tokens, num_supervised, sums)
        counts_LE = self.load.end_step() if sums.prob_sum_LE is not None else None
        result = self._engine.step(learning_rate=learning_rate)
        if counts_LE is not None and not result.is_skipped:
            self.load.remember(counts_LE)
            end_routers_step(self._engine.module, counts_LE, context, num_tokens=num_tokens)
        return self._record(sums, counts_LE, num_tokens, num_supervised, result)

    @torch.no_grad()
    def _count(self, batches: list[Batch], context: RouterContext) -> None:
        """Scope exact under accumulation: route the whole step once, before its first backward, to know its counts."""
        total_LE: Tensor | None = None
        for batch in batches:
            _, routings = self._engine.module(
                batch.token_BS, valid_BS=batch.valid_BS, context=_with_positions(context, batch)
            )
            if routings:
                counts_LE = collect(routings).tokens_per_expert_LE
                total_LE = counts_LE if total_LE is None else total_LE + counts_LE
        if total_LE is not None:
            self.load.expect(total_LE)

    def _num_supervised(self, batch: Batch) -> int:
        if not self._balance.domain_groups:
            return 0
        is_supervised_B = groups_of(batch.domain_B, self._group_of_domain) != UNSUPERVISED
        return int(batch.valid_BS[is_supervised_B].sum())

    def _micro_step(
        self, batch: Batch, context: RouterContext, num_tokens: int, num_supervised: int, sums: "_StepSums"
    ) -> None:
        logits_BSV, routings = self._engine(
            batch.token_BS, valid_BS=batch.valid_BS, context=_with_positions(context, batch)
        )
        statistics = collect(routings, num_sequences=batch.token_BS.shape[0]) if routings else None
        domains = None
        if self._balance.domain_groups:
            group_B = groups_of(batch.domain_B, self._group_of_domain)
            domains = domain_sums(routings, group_B, num_groups=len(self._balance.domain_groups))
        terms = micro_batch_loss(
            lm_sum=language_model_loss(logits_BSV, batch.label_BS, batch.valid_BS),
            statistics=statistics,
            load=self.load,
            balance=self._balance,
            num_tokens=num_tokens,
            domains=domains,
            num_supervised=num_supervised,
        )
        if sums.gradients is not None and statistics is not None and terms.balance is not None:
            sums.gradients.watch(routings, statistics, terms.balance)
        self._engine.backward(terms.total * self._groups.world_size)
        if sums.gradients is not None and statistics is not None:
            sums.gradients.finish()
        sums.add(terms, statistics, domains)

    def _record(
        self,
        sums: "_StepSums",
        counts_LE: Tensor | None,
        num_tokens: int,
        num_supervised: int,
        result: StepResult,
    ) -> StepRecord:
        totals = sums.flat()
        if self._groups.data_group is not None:
            dist.all_reduce(totals, group=self._groups.data_group)
        # everything the log wants in one transfer: each of its own would let a GPU wait for the host once more
        is_finite = torch.stack(sums.is_finite)
        counts_N = totals.new_empty(0) if counts_LE is None else counts_LE.flatten()
        fetched = torch.cat([totals, counts_N.double(), is_finite.double()]).cpu()
        totals, counts_N, is_finite = fetched.split([totals.numel(), counts_N.numel(), is_finite.numel()])
        if counts_LE is not None:
            counts_LE = counts_N.long().view(counts_LE.shape)
        active_LE = None if sums.active_LE is None else sums.active_LE.cpu()
        head, totals = totals[: _StepSums.NUM_HEAD].tolist(), totals[_StepSums.NUM_HEAD :]
        loss, lm_loss, z_sum, entropy_sum, num_dropped, domain_sum, num_right = head
        ratio, num_supervised_rows = math.nan, 0
        if counts_LE is None:
            balance = experts_per_token = dropped_frac = z_mean = entropy = 0.0
        else:
            num_rows = counts_LE.shape[0] * num_tokens
            num_supervised_rows = counts_LE.shape[0] * num_supervised
            prob_sum_LE = totals[: counts_LE.numel()].reshape(counts_LE.shape)
            if sums.gradients is not None:
                ratio = mean_ratio(totals[counts_LE.numel() :].reshape(2, -1))
            balance = load_balancing_loss(frequency(counts_LE), prob_sum_LE, num_tokens).mean().item()
            num_chosen = counts_LE.sum().item()
            experts_per_token = (num_chosen - num_dropped) / num_rows
            dropped_frac = num_dropped / max(num_chosen, 1)
            z_mean, entropy = z_sum / num_rows, entropy_sum / num_rows
        return StepRecord(
            num_tokens=num_tokens,
            loss=loss,
            lm_loss=lm_loss,
            load_balancing_loss=balance,
            z_loss=z_mean,
            router_entropy=entropy,
            experts_per_token=experts_per_token,
            router_grad_ratio=ratio if math.isfinite(ratio) else None,
            dropped_frac=dropped_frac,
            domain_loss=domain_sum / num_supervised_rows if num_supervised_rows else None,
            domain_accuracy=num_right / num_supervised_rows if num_supervised_rows else None,
            grad_norm=result.grad_norm,
            is_skipped=result.is_skipped,
            bad_micro_batches=tuple(i for i, ok in enumerate(is_finite.tolist()) if not ok),
            load=load_figures(counts_LE, active_LE) if counts_LE is not None else None,
            tokens_per_expert_LE=counts_LE,
        )

    def _sum_ints(self, *values: int) -> list[int]:
        totals = torch.tensor(values, dtype=torch.int64, device=self._groups.device)
        if self._groups.data_group is not None:
            dist.all_reduce(totals, group=self._groups.data_group)
        return totals.tolist()


@dataclass(kw_only=True, slots=True)
class _StepSums:
    """This rank's sums over the micro-batches of a step, in float64; they feed the log only."""

    NUM_HEAD: ClassVar[int] = 7  # numbers at the head of `flat`
    loss: Tensor | float = 0.0
    lm: Tensor | float = 0.0
    z: Tensor | float = 0.0
    entropy: Tensor | float = 0.0
    num_dropped: Tensor | float = 0.0
    domain_loss: Tensor | float = 0.0
    num_right: Tensor | float = 0.0
    prob_sum_LE: Tensor | None = None
    gradients: RouterGradients | None = None
    active_LE: Tensor | None = None  # the same in all micro-batches
    is_finite: list[Tensor] = field(default_factory=list)  # one flag a micro-batch

    def add(self, terms: LossTerms, statistics: RouterStatistics | None, domains: DomainSums | None) -> None:
        self.loss = self.loss + terms.total.detach().double()
        self.lm = self.lm + terms.lm.double()
        self.is_finite.append(terms.is_finite)
        if statistics is not None:
            self.z = self.z + statistics.z_sum_L.detach().double().sum()
            self.entropy = self.entropy + statistics.entropy_sum_L.detach().double().sum()
            self.num_dropped = self.num_dropped + statistics.num_dropped_L.double().sum()
            self.active_LE = statistics.active_LE
            prob_sum_LE = statistics.prob_sum_LE.detach().double()
            self.prob_sum_LE = prob_sum_LE if self.prob_sum_LE is None else self.prob_sum_LE + prob_sum_LE

        if domains is not None:
            self.domain_loss = self.domain_loss + domains.loss.detach().double()
            self.num_right = self.num_right + domains.num_right.double()

    def flat(self) -> Tensor:
        """Return one float64 vector: a head of single numbers, the probability sums, squares of gradients."""
        assert isinstance(self.loss, Tensor)
        device = self.loss.device
        values = (self.loss, self.lm, self.z, self.entropy, self.num_dropped, self.domain_loss, self.num_right)
        head = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
        if self.prob_sum_LE is None:
            return head
        squares = [self.gradients.squares().flatten()] if self.gradients is not None else []
        return torch.cat([head, self.prob_sum_LE.flatten(), *squares])


def _with_positions(context: RouterContext, batch: Batch) -> RouterContext:
    return replace(context, position_T=batch.position_BS.flatten())
