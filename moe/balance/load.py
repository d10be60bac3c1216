"""GlobalLoad: the expert counts that the load-balancing loss sees, over the scope the recipe asks for.

    micro     this rank's micro-batch                                  no communication during the step
    global    all ranks and all micro-batches of the step so far       one all-reduce of integers per micro-batch

`global` is the buffer of "Demons in the Detail" (arXiv 2501.11873, algorithm 1): early micro-batches of a step see
partial counts. Without accumulation it is exact.
"""

from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moe.balance.losses import frequency

Scope = Literal["micro", "global"]


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Balance of a run. Coefficients multiply losses that are 1 at uniform load, summed over layers and rounds."""

    __pydantic_config__ = {"extra": "forbid"}

    scope: Scope = "global"
    coefficient: float = 0.008
    z_coefficient: float = 0.0

    def validate(self) -> None:
        """Raise ValueError for a negative coefficient."""
        for name in ("coefficient", "z_coefficient"):
            if getattr(self, name) < 0:
                raise ValueError(f"balance.{name} = {getattr(self, name)} must not be negative")


class GlobalLoad:
    """Counts of one optimizer step. Call `frequency` once per micro-batch, then `end_step` once."""

    def __init__(self, *, scope: Scope, group: ProcessGroup | None) -> None:
        self._scope = scope
        self._group = group
        self._counts_LE: Tensor | None = None  # of the step so far: this rank's (micro) or all ranks' (global)

    def frequency(self, tokens_per_expert_LE: Tensor) -> Tensor:
        """Return the share of rows per expert over the scope, float64 [L, E], and remember the counts."""
        counts_LE = tokens_per_expert_LE
        if self._scope == "global":
            counts_LE = _sum_over_ranks(counts_LE, self._group)
        self._counts_LE = counts_LE if self._counts_LE is None else self._counts_LE + counts_LE
        return frequency(self._counts_LE if self._scope == "global" else counts_LE)

    def end_step(self) -> Tensor:
        """Return the counts of the whole global batch, int64 [L, E], and start the next step from zero."""
        assert self._counts_LE is not None, "a step ended without a micro-batch"
        counts_LE, self._counts_LE = self._counts_LE, None
        return counts_LE if self._scope == "global" else _sum_over_ranks(counts_LE, self._group)


def _sum_over_ranks(counts_LE: Tensor, group: ProcessGroup | None) -> Tensor:
    total_LE = counts_LE.clone()
    if group is not None:
        dist.all_reduce(total_LE, group=group)
    return total_LE
