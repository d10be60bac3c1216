"""Dispatch and combine: bring tokens to the ranks that hold their experts, and the answers back.

A token goes once to each rank that holds one of its experts, with the weights of those experts; that rank returns its
weighted sum. So no row is sent twice, and nothing but the received tokens has to be kept for backward. Dropless: the
splits are as uneven as the routing is.

`plan` moves integers only (who sends how much to whom, which expert each row is for). It runs once per layer, outside
any recomputed region, so that a recompute issues exactly the same collectives in the same order.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moe.parallel.groups import ParallelGroups
from moe.routing import Assignment


class Dispatcher(Protocol):
    """Moves tokens to the ranks of their experts and back."""

    def plan(self, assignment: Assignment, *, num_tokens: int) -> "Plan":
        """Return what `dispatch` and `combine` need; no gradient flows here."""
        ...

    def dispatch(self, x_TD: Tensor, plan: "Plan") -> tuple[Tensor, Assignment]:
        """Return the rows this rank received [R, D], and which of its own experts sees them with what weight."""
        ...

    def combine(self, y_RD: Tensor, plan: "Plan") -> Tensor:
        """Return y_TD, the sum over ranks of what each made of the token."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Who sends which rows where. Letters: M rows sent (token, rank), R rows received, P pairs received."""

    assignment: Assignment
    num_tokens: int
    exchange: "Exchange | None" = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """The integers of one all-to-all, as seen from one rank."""

    token_M: Tensor  # int64, the token of each sent row, by destination rank, then token
    pair_N: Tensor  # int64, rows of the assignment in the order they are sent
    sent_rows: list[int]  # per destination rank
    received_rows: list[int]  # per source rank
    sent_pairs: list[int]
    received_pairs: list[int]
    row_P: Tensor  # int64, received row of each received pair
    expert_P: Tensor  # int64, local expert of each received pair


class LocalDispatcher:
    """Every expert is here: rows stay where they are."""

    def plan(self, assignment: Assignment, *, num_tokens: int) -> Plan:
        return Plan(assignment=assignment, num_tokens=num_tokens)

    def dispatch(self, x_TD: Tensor, plan: Plan) -> tuple[Tensor, Assignment]:
        return x_TD, plan.assignment

    def combine(self, y_RD: Tensor, plan: Plan) -> Tensor:
        return y_RD


class AllToAllDispatcher:
    """Experts are spread over the ranks of an expert group; rank r holds experts r*E/ep .. (r+1)*E/ep - 1."""

    def __init__(self, *, group: ProcessGroup, ep_size: int, num_experts: int) -> None:
        self._group = group
        self._ep_size = ep_size
        self._num_local_experts = num_experts // ep_size

    def plan(self, assignment: Assignment, *, num_tokens: int) -> Plan:
        used_n = (assignment.expert_N < assignment.num_experts).nonzero()[:, 0]
        rank_n = assignment.expert_N[used_n] // self._num_local_experts
        # one key per (destination, token); pairs of one key travel as one row
        key_n = rank_n * num_tokens + assignment.token_N[used_n]
        order_n = torch.argsort(key_n, stable=True)
        pair_N = used_n[order_n]
        key_M, row_n = torch.unique_consecutive(key_n[order_n], return_inverse=True)
        rank_M = key_M // max(num_tokens, 1)
        row_counts = torch.bincount(rank_M, minlength=self._ep_size)
        pair_counts = torch.bincount(rank_n, minlength=self._ep_size)
        sent_2 = torch.stack([row_counts, pair_counts], dim=1)
        received_2 = torch.empty_like(sent_2)
        dist.all_to_all_single(received_2, sent_2, group=self._group)
        # the splits of an all-to-all are host integers: the one host synchronisation of expert parallelism
        sent_rows, sent_pairs = sent_2.t().tolist()
        received_rows, received_pairs = received_2.t().tolist()

        # row numbers count from the start of the block that one rank sends to another
        first_row = torch.cumsum(row_counts, 0) - row_counts
        local_row_n = row_n - first_row[rank_n[order_n]]
        local_expert_n = assignment.expert_N[pair_N] % self._num_local_experts
        sent_N2 = torch.stack([local_row_n, local_expert_n], dim=1)
        received_P2 = sent_N2.new_empty(sum(received_pairs), 2)
        dist.all_to_all_single(received_P2, sent_N2, received_pairs, sent_pairs, group=self._group)
        offset_ep = torch.cumsum(received_2[:, 0], 0) - received_2[:, 0]
        row_P = received_P2[:, 0] + torch.repeat_interleave(offset_ep, received_2[:, 1])
        exchange = Exchange(
            token_M=key_M % max(num_tokens, 1),
            pair_N=pair_N,
            sent_rows=sent_rows,
            received_rows=received_rows,
            sent_pairs=sent_pairs,
            received_pairs=received_pairs,
            row_P=row_P,
            expert_P=received_P2[:, 1].contiguous(),
        )
        return Plan(assignment=assignment, num_tokens=num_tokens, exchange=exchange)

    def dispatch(self, x_TD: Tensor, plan: Plan) -> tuple[Tensor, Assignment]:
        exchange = plan.exchange
        assert exchange is not None
        x_RD = _AllToAll.apply(
            x_TD.index_select(0, exchange.token_M), exchange.sent_rows, exchange.received_rows, self._group
        )
        weight_P = _AllToAll.apply(
            plan.assignment.weight_N.index_select(0, exchange.pair_N),
            exchange.sent_pairs,
            exchange.received_pairs,
            self._group,
        )
        received = Assignment(
            token_N=exchange.row_P,
            expert_N=exchange.expert_P,
            weight_N=weight_P,
            num_experts=self._num_local_experts,
            fan_out=None,
        )
        return x_RD, received

    def combine(self, y_RD: Tensor, plan: Plan) -> Tensor:
        exchange = plan.exchange
        assert exchange is not None
        y_MD = _AllToAll.apply(y_RD, exchange.received_rows, exchange.sent_rows, self._group)
        y_TD = y_MD.new_zeros(plan.num_tokens, y_MD.shape[1])
        return y_TD.index_add(0, exchange.token_M, y_MD)


class _AllToAll(torch.autograd.Function):
    """Rows to other ranks with uneven splits; backward sends the gradients the other way."""

    @staticmethod
    def forward(ctx, x: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(x, sent, received, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return _exchange(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(x: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    y = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(y, x.contiguous(), received, sent, group=group)
    return y


def make_dispatcher(groups: ParallelGroups, *, num_experts: int) -> Dispatcher:
    """Return the dispatcher for `num_experts` experts spread over the expert group.

    Raises:
        ValueError: `ep_size` does not divide `num_experts`.
    """
    check_expert_split(num_experts, groups.ep_size)
    if groups.ep_size == 1:
        return LocalDispatcher()
    # groups built by hand without a process group serve construction only: the first dispatch would need one
    return AllToAllDispatcher(group=groups.expert_group, ep_size=groups.ep_size, num_experts=num_experts)  # type: ignore[arg-type]


def check_expert_split(num_experts: int, ep_size: int) -> None:
    """Raise ValueError unless each rank of an expert group gets the same number of experts."""
    if num_experts % ep_size:
        divisors = [size for size in range(1, num_experts + 1) if num_experts % size == 0]
        raise ValueError(
            f"parallel.ep_size = {ep_size} does not divide the {num_experts} experts of a layer; use one of {divisors}"
        )
