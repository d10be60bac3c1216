"""Grouping against a plain-Python sort, on every routing and on random expert ids."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels.grouping import Rows, compact, group_rows, rows_from_mask, rows_from_topk
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


def pairs(rows: Rows, num_experts: int) -> list[tuple[int, int, float]]:
    """Return (token, expert, weight) of the rows in use, in order."""
    triples = zip(rows.token_N.tolist(), rows.expert_N.tolist(), rows.weight_N.tolist(), strict=True)
    return [triple for triple in triples if triple[1] < num_experts]


@pytest.mark.parametrize(("T", "E", "K"), [(0, 3, None), (1, 1, None), (7, 5, None), (7, 5, 3), (9, 64, 4)])
def test_a_mask_gives_every_chosen_pair_once_and_in_order(T: int, E: int, K: int | None) -> None:
    draw = torch.Generator().manual_seed(T * E)
    mask_TE = torch.rand(T, E, generator=draw) < 0.4
    if K is not None:
        mask_TE &= mask_TE.cumsum(1) <= K
    weight_TE = torch.rand(T, E, generator=draw).requires_grad_()
    rows = rows_from_mask(mask_TE, weight_TE, max_per_token=K)
    assert rows.fan_out == (K or E)
    assert rows.expert_N.numel() == T * (K or E)
    expected = [(t, e, weight_TE[t, e].item()) for t, e in mask_TE.nonzero().tolist()]
    assert pairs(rows, E) == expected
    used_N = rows.expert_N < E
    (gradient_TE,) = torch.autograd.grad(rows.weight_N[used_N].sum(), weight_TE)
    assert torch.equal(gradient_TE, mask_TE.float())

    small = compact(rows, E, max_rows=len(expected) + 2)
    assert small.fan_out is None
    assert small.expert_N.numel() == min(len(expected) + 2, T * (K or E))
    assert pairs(small, E) == expected


def test_bounds_that_do_not_hold_are_errors() -> None:
    mask_TE = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="more than max_per_token=2 experts"):
        rows_from_mask(mask_TE, torch.ones(2, 3), max_per_token=2)
    with pytest.raises(RuntimeError, match="more than max_rows=5 rows"):
        compact(rows_from_mask(mask_TE, torch.ones(2, 3)), 3, max_rows=5)


def test_topk_pairs_keep_their_places() -> None:
    rows = rows_from_topk(torch.tensor([[2, 0], [3, 1]], dtype=torch.int32), torch.tensor([[0.5, 0.4], [0.3, 0.2]]))
    assert rows.token_N.tolist() == [0, 0, 1, 1]
    assert rows.expert_N.tolist() == [2, 0, 3, 1]
    assert rows.expert_N.dtype == torch.int64
    assert rows.fan_out == 2
