"""Cross-layer reuse: r adjacent MoE layers choose from one pool of all their experts (ReXMoE, arXiv 2510.17483).

MoE layer l of group g = l // r, with N experts a layer, has a router over r*N experts; expert n of member m of the
group is number m*N + n for all of them. The last group is smaller where r does not divide the number of MoE layers.

A pool may grow (the paper's progressive scaling). Of r*N experts N_t are open at step t, in integers

    linear      N_t = N + (r - 1) N (t - t_s) // (t_e - t_s)                  t_s < t < t_e
    stepwise    N_t = N min(r, 2 + (r - 2) (t - t_s) // (t_e - t_s))          t_s <= t < t_e

with N before and r*N after; t_s and t_e are shares of the run. Which experts are open is drawn again at every step from
(seed, step, layer): the same on all ranks, in all micro-batches and in a recompute, and nothing of it is saved.

A closed expert is never chosen. Its score goes before the softmax (neg_inf), or after it as in the paper (zero_score):
then open experts share less than all of the mass, and a layer starts with about 1/r of its output.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe.routers import noise
from moe.routing import RouterContext

_DRAW = 0x706F6F6C  # tells this draw from the noise of the same step and layer


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolPlace:
    """Where an MoE layer stands among those that share its experts."""

    pool: int  # number of the group
    member: int  # of the layer within it
    num_members: int


@dataclass(frozen=True, kw_only=True)
class ReuseConfig:
    """How many adjacent MoE layers share one pool of experts, and how it grows. 1: every layer has its own."""

    __pydantic_config__ = {"extra": "forbid"}

    group_size: int = 1
    schedule: Literal["none", "linear", "stepwise"] = "none"
    """none: the whole pool is open from the first step."""
    start: float = 0.21
    """Share of the run after which a pool of N grows."""
    end: float = 0.63
    """Share of the run at which all of it is open."""
    keep: Literal["local_first", "random"] = "local_first"
    """local_first: a layer's own experts are always open, the rest are drawn; random: all are, as in the paper. In
    evaluation always local_first."""
    mask: Literal["neg_inf", "zero_score"] = "neg_inf"
    num_shares: int = 4
    """With group_size = 1 and a schedule: a layer starts with one of so many shares of its own experts. That is growth
    without reuse, the ablation that the paper lacks."""

    def validate(self) -> None:
        """Raise ValueError for a value out of range."""
        if self.group_size < 1:
            raise ValueError(f"model.reuse.group_size = {self.group_size} must be at least 1; 1 shares nothing")
        if self.num_shares < 2:
            raise ValueError(f"model.reuse.num_shares = {self.num_shares} must be at least 2")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"model.reuse.start = {self.start} and model.reuse.end = {self.end} are shares of the run and must "
                "satisfy 0 <= start < end <= 1"
            )
        for name, allowed in (
            ("schedule", ("none", "linear", "stepwise")),
            ("keep", ("local_first", "random")),
            ("mask", ("neg_inf", "zero_score")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"model.reuse.{name} = {getattr(self, name)!r} must be one of {', '.join(allowed)}")

    def place(self, index: int, *, num_layers: int) -> PoolPlace:
        """Return the place of the MoE layer that comes `index`-th of `num_layers`."""
        pool, member = divmod(index, self.group_size)
        return PoolPlace(
            pool=pool, member=member, num_members=min(self.group_size, num_layers - pool * self.group_size)
        )

    def first_size(self, num_experts: int) -> int:
        """Return how many experts a layer of `num_experts` chooses among at first."""
        if self.schedule == "none" or self.group_size > 1:
            return num_experts
        if num_experts % self.num_shares:
            raise ValueError(
                f"model.reuse.num_shares = {self.num_shares} does not divide model.num_experts = {num_experts}"
            )
        return num_experts // self.num_shares

    def num_open(self, context: RouterContext, *, num_experts: int, num_members: int) -> int:
        """Return how many experts of a pool are open; `num_experts` are those of a layer."""
        everything = num_members * num_experts
        if self.schedule == "none" or context.progress >= 1:
            return everything
        # steps of the run, in integers again: a float would be one short at some steps
        total = round(context.step / context.progress) if context.progress > 0 else 0
        first, last = round(self.start * total), round(self.end * total)
        size = linear_pool_size if self.schedule == "linear" else stepwise_pool_size
        return size(context.step, first=first, last=last, num_experts=num_experts, num_members=num_members)

    @torch.no_grad()
    def open_experts(
        self,
        context: RouterContext,
        *,
        place: PoolPlace,
        num_experts: int,
        layer_index: int,
        is_training: bool,
        device: torch.device,
    ) -> Tensor | None:
        """Return which experts of the pool a layer may choose at this step, bool [E]; None means all."""
        if self.group_size == 1:
            # the shares of a layer's own experts take the place of the layers of a group
            num_experts = self.first_size(num_experts)
            place = PoolPlace(pool=place.pool, member=0, num_members=self.num_shares)
        E = place.num_members * num_experts
        num_open = self.num_open(context, num_experts=num_experts, num_members=place.num_members)
        if num_open == E:
            return None
        key = (_DRAW, context.seed, context.step, layer_index)
        draw_E = noise.uniform(torch.zeros(1, dtype=torch.int64, device=device), E, key=key)[0]
        if self.keep == "local_first" or not is_training:
            draw_E[place.member * num_experts : (place.member + 1) * num_experts] = -1.0
        open_E = torch.zeros(E, dtype=torch.bool, device=device)
        open_E[torch.sort(draw_E, stable=True).indices[:num_open]] = True
        return open_E


def linear_pool_size(step: int, *, first: int, last: int, num_experts: int, num_members: int) -> int:
    """Return N_t: N up to step `first`, then growing evenly to r*N at step `last`."""
    if step <= first:
        return num_experts
    if step >= last:
        return num_members * num_experts
    return num_experts + (num_members - 1) * num_experts * (step - first) // (last - first)


def stepwise_pool_size(step: int, *, first: int, last: int, num_experts: int, num_members: int) -> int:
    """Return N_t: N before step `first`, where it grows by N, and by N again at even distances up to step `last`.

    With 64 experts, 4 members, first = 10,000 and last = 30,000: 128, 192 and 256 at 10, 20 and 30 thousand.
    """
    if step < first:
        return num_experts
    if step >= last:
        return num_members * num_experts
    num_opened = 2 + (num_members - 2) * (step - first) // (last - first)
    return num_experts * min(num_members, num_opened)
