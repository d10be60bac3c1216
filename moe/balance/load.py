"""GlobalLoad: the expert counts that the load-balancing loss sees, over the scope the recipe asks for.

    scope      f counts the rows of                                   communication
    sequence   each sequence on its own                               none
    micro      this rank's micro-batch                                none
    ranks      one micro-batch of every rank                          one all-reduce of integers per micro-batch
    global     all ranks and the micro-batches of the step so far     the same
    exact      all ranks and all micro-batches of the step            the same, and with accumulation one extra
                                                                      forward, which counts before the first backward
    lagged     all ranks, the steps before (smoothed or only the last)  one all-reduce per step

`global` is the buffer of "Demons in the Detail" (arXiv 2501.11873, algorithm 1): early micro-batches of a step see
partial counts. Without accumulation `ranks`, `global` and `exact` are the same.
`sequence`, `exact` and `lagged` do not depend on how a batch is split over ranks and micro-batches.
"""

from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moe.balance.losses import frequency, load_balancing_loss
from moe.balance.statistics import RouterStatistics

Scope = Literal["sequence", "micro", "ranks", "global", "exact", "lagged"]


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Balance of a run. Coefficients multiply losses that are 1 at uniform load, summed over layers and rounds."""

    __pydantic_config__ = {"extra": "forbid"}

    scope: Scope = "global"
    coefficient: float = 0.008
    local_coefficient: float = 0.0
    """Of a second term over this rank's micro-batch; the paper takes 1 % of `coefficient`, against stragglers."""
    z_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    """Of the mean entropy of a token's router probabilities, in nats; 1e-4 with dynamic confidence (2403.07652)."""
    frequency: Literal["share", "per_token"] = "share"
    """per_token: f sums to the mean experts per token, so that more experts cost more loss (2403.07652); 1 becomes that
    mean. Scopes micro and exact only."""
    domain_groups: tuple[str, ...] = ()
    """Domains whose text is taught to its own group of experts: the experts are as many groups as there are names, in
    this order (moe/balance/domains.py)."""
    domain_coefficient: float = 0.0
    """Of that teaching; 0.1 warms a router up."""
    smoothing: float = 0.0
    """Scope lagged: share of the older steps in the counts; 0 takes the last step alone."""

    def validate(self) -> None:
        """Raise ValueError for a value out of range or a combination that contradicts itself."""
        names = ("coefficient", "local_coefficient", "z_coefficient", "entropy_coefficient", "domain_coefficient")
        for name in names:
            if getattr(self, name) < 0:
                raise ValueError(f"balance.{name} = {getattr(self, name)} must not be negative")
        if self.local_coefficient and self.scope in ("sequence", "exact", "lagged"):
            raise ValueError(
                f"balance.local_coefficient = {self.local_coefficient} depends on how the batch is split, which scope "
                f"{self.scope!r} promises not to; set it to 0, or use balance.scope = 'global'"
            )
        if bool(self.domain_coefficient) != bool(self.domain_groups):
            raise ValueError(
                f"balance.domain_coefficient = {self.domain_coefficient} and balance.domain_groups = "
                f"{self.domain_groups} go together; set both or neither"
            )
        if len(set(self.domain_groups)) < len(self.domain_groups):
            raise ValueError(f"balance.domain_groups = {self.domain_groups} names a domain twice")
        if self.frequency not in ("share", "per_token"):
            raise ValueError(f"balance.frequency = {self.frequency!r} must be 'share' or 'per_token'")
        if self.frequency == "per_token" and self.scope not in ("micro", "exact"):
            raise ValueError(
                f"balance.frequency = 'per_token' divides by the tokens in scope, which of scope {self.scope!r} nobody "
                "counts; only 'micro' and 'exact' know them, so use one of these"
            )
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"balance.smoothing = {self.smoothing} must lie in [0, 1)")
        if self.smoothing and self.scope != "lagged":
            raise ValueError(f"balance.smoothing = {self.smoothing} needs balance.scope = 'lagged'")


class RoutingChangedError(RuntimeError):
    """The counting pass of scope `exact` and the pass that trains routed differently."""


class GlobalLoad:
    """Counts of one optimizer step. Once per micro-batch `balance_loss`, then `end_step` once.

    Args:
        scope: whose rows are counted.
        is_per_token: counts are divided by tokens, not by rows; scopes micro and exact.
        smoothing: for scope lagged.
        group: all ranks with tokens of their own; None for one process.
    """

    def __init__(
        self, *, scope: Scope, is_per_token: bool = False, smoothing: float = 0.0, group: ProcessGroup | None
    ) -> None:
        self._scope = scope
        self._is_per_token = is_per_token
        self._smoothing = smoothing
        self._group = group
        self._counts_LE: Tensor | None = None  # of the step so far; of this rank, or of all where the scope sums them
        self._expected_LE: Tensor | None = None  # scope exact: of the whole step, from the counting pass
        self.lagged_LE: Tensor | None = None  # scope lagged: float64 counts of the steps before; part of a checkpoint

    def expect(self, tokens_per_expert_LE: Tensor) -> None:
        """Scope exact: take this rank's counts of the whole step, int64, before its first backward. Collective."""
        self._expected_LE = self._sum_over_ranks(tokens_per_expert_LE)

    def balance_loss(self, statistics: RouterStatistics, num_tokens: int) -> Tensor:
        """Return this micro-batch's share of the load-balancing loss, float32 [L], and remember its counts.

        `num_tokens` are the valid tokens of the whole step. Collective in the scopes that count other ranks.
        """
        counts_LE = statistics.tokens_per_expert_LE
        if self._scope in ("ranks", "global", "exact"):
            counts_LE = self._sum_over_ranks(counts_LE)
        self._counts_LE = counts_LE if self._counts_LE is None else self._counts_LE + counts_LE
        if self._scope == "sequence":
            return sequence_loss(statistics, num_tokens)
        loss_L = load_balancing_loss(self._frequency(counts_LE), statistics.prob_sum_LE, num_tokens)
        if not self._is_per_token:
            return loss_L
        if self._scope == "micro":
            return loss_L * counts_LE.sum(-1) / statistics.num_tokens.clamp_min(1)
        total_LE = self._expected_LE if self._expected_LE is not None else counts_LE
        return loss_L * total_LE.sum(-1) / num_tokens

    def _frequency(self, counts_LE: Tensor) -> Tensor:
        if self._scope == "lagged":
            # before there is a past, every expert counts the same and the loss has no gradient
            return frequency(counts_LE * 0 + 1 if self.lagged_LE is None else self.lagged_LE)
        if self._scope == "exact" and self._expected_LE is not None:
            return frequency(self._expected_LE)
        assert self._counts_LE is not None
        return frequency(self._counts_LE if self._scope in ("global", "exact") else counts_LE)

    def end_step(self) -> Tensor:
        """Return the counts of the whole global batch, int64 [L, E], and start the next step from zero. Collective.

        Raises RoutingChangedError if the counting pass of scope exact saw other counts.
        """
        assert self._counts_LE is not None, "a step ended without a micro-batch"
        counts_LE, self._counts_LE = self._counts_LE, None
        expected_LE, self._expected_LE = self._expected_LE, None
        if self._scope not in ("ranks", "global", "exact"):
            counts_LE = self._sum_over_ranks(counts_LE)
        if expected_LE is not None and not expected_LE.equal(counts_LE):
            raise RoutingChangedError(
                f"balance.scope = exact: the counting pass and the training pass differ by "
                f"{int((expected_LE - counts_LE).abs().sum())} rows; something in the model is not deterministic"
            )
        return counts_LE

    def remember(self, tokens_per_expert_LE: Tensor) -> None:
        """Scope lagged: take the counts of a step that was applied into what the next steps see."""
        if self._scope == "lagged":
            counts_LE = tokens_per_expert_LE.double()
            past_LE = self.lagged_LE
            self.lagged_LE = counts_LE if past_LE is None else past_LE.lerp(counts_LE, 1 - self._smoothing)

    def _sum_over_ranks(self, counts_LE: Tensor) -> Tensor:
        total_LE = counts_LE.clone()
        if self._group is not None:
            dist.all_reduce(total_LE, group=self._group)
        return total_LE


def sequence_loss(statistics: RouterStatistics, num_tokens: int) -> Tensor:
    """Return this micro-batch's share of the sequence-wise loss [L]: every sequence balanced on its own.

    A sequence weighs by its valid tokens, so that the shares of all micro-batches and ranks add up whatever the split.
    """
    frequency_BLE = frequency(statistics.tokens_per_expert_BLE)
    return load_balancing_loss(frequency_BLE, statistics.prob_sum_BLE, num_tokens).sum(0)
