"""Grouping against a plain-Python sort, on every routing and on random expert ids."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels.grouping import group_rows
from moe_kernels.testing import ROUTINGS, make_rows


def check_invariants(experts: list[int], num_experts: int) -> None:
    expert_N = torch.tensor(experts, dtype=torch.int64)
    before = expert_N.clone()
    grouping = group_rows(expert_N, num_experts)
    # Python's sort is stable, so equal experts must keep their order
    order = sorted(range(len(experts)), key=lambda row: experts[row])
    assert grouping.order_N.tolist() == order
    assert grouping.offsets_E1.tolist() == [sum(e < bound for e in experts) for bound in range(num_experts + 1)]
    assert grouping.order_N[grouping.inverse_N].tolist() == list(range(len(experts)))
    assert grouping.inverse_N[grouping.order_N].tolist() == list(range(len(experts)))
    assert {grouping.order_N.dtype, grouping.inverse_N.dtype, grouping.offsets_E1.dtype} == {torch.int64}
    assert torch.equal(expert_N, before)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("T", "E", "K"), [(0, 3, 2), (1, 3, 2), (65, 7, 3), (9, 4, 4), (6, 1, 1)])
def test_rows_stand_in_expert_order_for_every_routing(routing: str, T: int, E: int, K: int) -> None:
    generator = torch.Generator().manual_seed(1)
    check_invariants(make_rows(routing, T=T, E=E, K=K, generator=generator)[1].tolist(), E)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 9).flatmap(lambda E: st.tuples(st.lists(st.integers(0, E), max_size=70), st.just(E))))
def test_rows_stand_in_expert_order_for_any_ids(case: tuple[list[int], int]) -> None:
    check_invariants(*case)


def test_unused_rows_come_last_and_belong_to_no_expert() -> None:
    grouping = group_rows(torch.tensor([2, 3, 0, 3, 2]), 3)
    assert grouping.order_N.tolist() == [2, 0, 4, 1, 3]
    assert grouping.offsets_E1.tolist() == [0, 1, 1, 3]
