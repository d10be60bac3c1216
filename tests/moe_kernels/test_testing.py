"""The yardsticks themselves: cases are what they say, and comparisons fail when they should."""

from dataclasses import replace

import pytest
import torch

from moe_kernels.backends import BACKENDS
from moe_kernels.testing import (
    ROUTINGS,
    assert_close,
    assert_same,
    make_case,
    make_rows,
    poison_unused,
    poisoned_memory,
    rms_ratio,
    run,
    run_mirrored,
    run_reference,
)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_fan_out_of_a_case_is_true(routing: str) -> None:
    case = make_case(routing, T=33, D=8, F=4, E=6, K=3)
    if case.fan_out is not None:
        assert torch.equal(case.token_N, torch.arange(33).repeat_interleave(case.fan_out))


def test_routings_are_what_they_are_called() -> None:
    def counts(routing: str) -> list[int]:
        generator = torch.Generator().manual_seed(0)
        expert_N = make_rows(routing, T=60, E=6, K=2, generator=generator)[1]
        return torch.bincount(expert_N, minlength=7).tolist()

    assert counts("balanced") == [20, 20, 20, 20, 20, 20, 0]
    assert counts("all_to_first") == [120, 0, 0, 0, 0, 0, 0]
    assert counts("all_to_last") == [0, 0, 0, 0, 0, 120, 0]
    assert counts("one_row_each") == [1, 1, 1, 1, 1, 1, 0]
    assert counts("all_unused") == [0, 0, 0, 0, 0, 0, 120]
    assert [count > 0 for count in counts("half_empty")] == [True, False, True, False, True, False, False]
    assert [count > 0 for count in counts("ends_empty")] == [False, True, True, True, True, False, False]
    assert 20 < counts("some_unused")[6] < 60
    assert max(counts("skewed")) > 1.5 * max(counts("random"))


def test_ragged_routing_has_tokens_without_rows_and_experts_twice_for_a_token() -> None:
    generator = torch.Generator().manual_seed(0)
    token_N, expert_N = make_rows("ragged", T=60, E=6, K=2, generator=generator)
    assert set(torch.bincount(token_N, minlength=60).tolist()) == {0, 1, 2, 3, 4}
    pairs = list(zip(token_N.tolist(), expert_N.tolist(), strict=True))
    assert len(set(pairs)) < len(pairs)
    assert token_N.tolist() != sorted(token_N.tolist())


def test_unknown_routing_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="routing 'fair' is unknown; known are random, skewed"):
        make_case("fair", T=1, D=1, F=1, E=1, K=1)


def test_mirrored_result_without_rounding_is_the_reference() -> None:
    # so that a mistake in the mirrored formulas cannot excuse the same mistake in a backend
    case = make_case("some_unused", T=37, D=17, F=13, E=5, K=3, dtype=torch.float64)
    assert_close(run_mirrored(case), run_reference(case), tolerance=1e-13)


def test_comparison_sees_one_wrong_row_a_nan_a_shape_and_what_should_be_zero() -> None:
    right = run_reference(make_case(T=8, D=6, F=4, E=3, K=2))
    assert_close(right, right, tolerance=0)
    one_row = right.dx_TD.clone()
    one_row[3] = 0
    for wrong in (
        replace(right, dx_TD=one_row),
        replace(right, dweight_N=right.dweight_N.index_fill(0, torch.tensor([1]), float("nan"))),
        replace(right, y_TD=right.y_TD[:1]),
    ):
        with pytest.raises(AssertionError):
            assert_close(wrong, right, tolerance=1e-2)
        with pytest.raises(AssertionError):
            assert_same(wrong, right)
    assert rms_ratio(torch.full((3,), 1e-30), torch.zeros(3)) == float("inf")
    assert rms_ratio(torch.zeros(3), torch.zeros(3)) == 0


def test_poison_is_seen_by_a_backend_that_multiplies_unused_rows_by_zero() -> None:
    class Careless:
        def refusal(self, **_: object) -> None:
            return None

        def __call__(self, x_TD, token_N, expert_N, weight_N, gate_up_E2FD, down_EDF, *, fan_out):
            is_used_N = expert_N < down_EDF.shape[0]
            token_N, expert_N = token_N * is_used_N, expert_N * is_used_N
            return BACKENDS["naive"](
                x_TD, token_N, expert_N, weight_N * is_used_N, gate_up_E2FD, down_EDF, fan_out=fan_out
            )

    case = make_case("some_unused", T=8, D=6, F=4, E=3, K=2)
    assert_close(run(Careless(), case), run_reference(case), tolerance=1e-6)
    with pytest.raises(AssertionError):
        assert_close(run(Careless(), poison_unused(case)), run_reference(case), tolerance=1e-6)


def test_fresh_memory_is_nan_inside_the_block_only() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    with poisoned_memory():
        assert torch.empty(100).isnan().all()
        assert torch.ones(3).new_empty(100).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
