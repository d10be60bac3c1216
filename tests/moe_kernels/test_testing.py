"""The yardsticks themselves: cases are what they say, and comparisons fail when they should."""

from dataclasses import replace

import pytest
import torch

from moe_kernels.backends import BACKENDS
from moe_kernels.spec import ExpertSpec
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
    run_reference_by_expert,
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


@pytest.mark.parametrize("rounds_da", [True, False])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "relu2", "gpt_oss"])
def test_mirrored_result_without_rounding_is_the_reference(activation, biases: bool, rounds_da: bool) -> None:
    # so that a mistake in the mirrored formulas cannot excuse the same mistake in a backend
    for spec in (
        ExpertSpec(activation=activation),
        ExpertSpec(activation=activation, gate_up="interleaved", weights="in_out"),
    ):
        case = make_case("some_unused", T=19, D=17, F=13, E=5, K=3, dtype=torch.float64, spec=spec, biases=biases)
        assert_close(run_mirrored(case, rounds_da=rounds_da), run_reference(case), tolerance=1e-13)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_reference_by_expert_is_the_reference_for_every_routing(routing: str) -> None:
    case = make_case(routing, T=19, D=17, F=13, E=5, K=3, dtype=torch.bfloat16)
    assert_close(run_reference_by_expert(case), run_reference(case), tolerance=1e-13)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "relu2", "gpt_oss"])
def test_reference_by_expert_is_the_reference_for_every_spec(activation, biases: bool) -> None:
    for spec in (
        ExpertSpec(activation=activation),
        ExpertSpec(activation=activation, gate_up="interleaved", weights="in_out"),
    ):
        case = make_case("some_unused", T=19, D=17, F=13, E=5, K=3, spec=spec, biases=biases)
        assert_close(run_reference_by_expert(case), run_reference(case), tolerance=1e-13)


def test_mirrored_result_rounds_the_gradient_of_the_activation_only_when_told() -> None:
    case = make_case(T=19, D=17, F=13, E=5, K=3, dtype=torch.bfloat16)
    rounded, kept = run_mirrored(case), run_mirrored(case, rounds_da=False)
    assert torch.equal(rounded.y_TD, kept.y_TD)
    assert 1e-4 < rms_ratio(kept.dweight_N, rounded.dweight_N) < 1e-2


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "relu2", "gpt_oss"])
def test_layouts_of_a_case_hold_the_same_experts(activation) -> None:
    sizes = {"T": 9, "D": 7, "F": 5, "E": 3, "K": 2, "biases": True}
    plain = run_reference(make_case(**sizes, spec=ExpertSpec(activation=activation)))
    for gate_up in ("concatenated", "interleaved"):
        for weights in ("out_in", "in_out"):
            spec = ExpertSpec(activation=activation, gate_up=gate_up, weights=weights)
            result = run_reference(make_case(**sizes, spec=spec))
            for name in ("y_TD", "dx_TD", "dweight_N", "ddown_bias_ED"):
                assert rms_ratio(getattr(result, name), getattr(plain, name)) < 1e-14


def test_some_of_what_gpt_oss_activates_lies_beyond_its_limits() -> None:
    case = make_case(T=200, D=16, F=16, E=3, K=1, dtype=torch.float64, spec=ExpertSpec(activation="gpt_oss"))
    h_NH = torch.einsum("nhd,nd->nh", case.gate_up_E2FD[case.expert_N], case.x_TD[case.token_N])
    gate_NF, up_NF = h_NH.chunk(2, dim=1)
    assert 0.02 < (gate_NF > 7).double().mean() < 0.1
    assert 0.04 < (up_NF.abs() > 7).double().mean() < 0.2


def test_comparison_sees_a_bias_that_has_no_gradient() -> None:
    right = run_reference(make_case(T=8, D=6, F=4, E=3, K=2, biases=True))
    assert_close(right, right, tolerance=0)
    for compare in (lambda wrong: assert_close(wrong, right, tolerance=1), lambda wrong: assert_same(wrong, right)):
        with pytest.raises(AssertionError, match="ddown_bias_ED is there in one result"):
            compare(replace(right, ddown_bias_ED=None))


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

        def __call__(self, x_TD, token_N, expert_N, weight_N, gate_up_E2FD, down_EDF, **options):
            is_used_N = expert_N < down_EDF.shape[0]
            token_N, expert_N = token_N * is_used_N, expert_N * is_used_N
            return BACKENDS["naive"](x_TD, token_N, expert_N, weight_N * is_used_N, gate_up_E2FD, down_EDF, **options)

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
