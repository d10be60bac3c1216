"""What segments promises beyond the contract: what it keeps, where it rounds, how it pads."""

from dataclasses import replace

import pytest
import torch

from moe_kernels.backends import BACKENDS, segments
from moe_kernels.backends.segments import padded_rows
from moe_kernels.spec import ExpertSpec
from moe_kernels.testing import ROUTINGS, assert_close, assert_same, make_case, run, run_mirrored, saved_bytes

# torch only warns when an out= buffer is too small and gets reallocated
pytestmark = pytest.mark.filterwarnings("error")

SEGMENTS = BACKENDS["segments"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("routing", ["random", "all_to_first", "some_unused", "all_unused"])
def test_keeps_x_and_h_and_two_ids_per_row_and_nothing_else(routing: str, dtype: torch.dtype) -> None:
    case = make_case(routing, T=50, D=24, F=16, E=6, K=3, dtype=dtype)
    rows_in_use = int((case.expert_N < 6).sum())
    h, tokens, order = rows_in_use * 2 * 16 * dtype.itemsize, rows_in_use * 8, 150 * 8
    assert saved_bytes(SEGMENTS, case) == h + tokens + order


def test_padding_adds_at_most_one_segment_tail_to_what_is_kept() -> None:
    case = make_case(T=500, D=24, F=16, E=6, K=3, dtype=torch.bfloat16)
    exact = 1500 * (2 * 16 * 2 + 2 * 8)
    assert exact <= saved_bytes(SEGMENTS, case) <= exact + 32 * 2 * 16 * 2


@pytest.mark.parametrize("biases", [False, True])
def test_keeps_no_h_if_it_is_to_be_computed_again(biases: bool) -> None:
    case = make_case(T=50, D=24, F=16, E=6, K=3, spec=ExpertSpec(saved="X"), biases=biases)
    assert saved_bytes(SEGMENTS, case) == 150 * 8 + 150 * 8


def test_biases_and_squared_relu_cost_no_memory() -> None:
    case = make_case(T=50, D=24, F=16, E=6, K=3, spec=ExpertSpec(activation="relu2"), biases=True)
    assert saved_bytes(SEGMENTS, case) == 150 * 16 * 4 + 150 * 8 + 150 * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_h_computed_again_is_equal_to_the_bit(dtype: torch.dtype) -> None:
    for activation, biases in (("swiglu", False), ("gpt_oss", True)):
        spec = ExpertSpec(activation=activation)
        case = make_case(T=130, D=40, F=24, E=3, K=2, dtype=dtype, spec=spec, biases=biases)
        again = replace(case, spec=replace(spec, saved="X"))
        assert_same(run(SEGMENTS, again), run(SEGMENTS, case))


# not to the bit: at the end of a block torch computes exp without vector instructions
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("saved", ["H", "X"])
def test_blocks_of_rows_change_nothing(saved: str, dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for activation, biases in (("swiglu", False), ("geglu", False), ("gpt_oss", True), ("relu2", True)):
        spec = ExpertSpec(activation=activation, saved=saved)
        case = make_case("some_unused", T=130, D=40, F=24, E=3, K=2, dtype=dtype, spec=spec, biases=biases)
        monkeypatch.setattr(segments, "BLOCK", 2**18)
        whole = run(SEGMENTS, case)
        monkeypatch.setattr(segments, "BLOCK", 500)  # 10 to 20 rows
        assert_close(run(SEGMENTS, case), whole, tolerance=tolerance)


def test_keeps_less_than_the_plain_loop() -> None:
    case = make_case(T=500, D=64, F=32, E=6, K=3)
    assert saved_bytes(SEGMENTS, case) < 0.35 * saved_bytes(BACKENDS["naive"], case)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("T", "D", "F", "E", "K"), [(130, 40, 24, 3, 2), (33, 17, 13, 5, 3)])
def test_bfloat16_rounds_where_it_stores_and_nowhere_else(T: int, D: int, F: int, E: int, K: int, routing: str) -> None:
    # the same roundings done in float64 arithmetic: what is left are sums that fell on the other side of a tie
    case = make_case(routing, T=T, D=D, F=F, E=E, K=K, dtype=torch.bfloat16)
    assert_close(run(SEGMENTS, case), run_mirrored(case), tolerance=1e-3)


@pytest.mark.parametrize("saved", ["H", "X"])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "relu2", "gpt_oss"])
def test_bfloat16_rounds_where_it_stores_in_every_form_of_expert(activation, saved) -> None:
    for gate_up, weights in (("concatenated", "out_in"), ("interleaved", "in_out")):
        spec = ExpertSpec(activation=activation, gate_up=gate_up, weights=weights, saved=saved)
        case = make_case("some_unused", T=130, D=40, F=24, E=3, K=2, dtype=torch.bfloat16, spec=spec, biases=True)
        assert_close(run(SEGMENTS, case), run_mirrored(case), tolerance=1e-3)


def test_float32_and_float64_segments_are_not_padded() -> None:
    assert [padded_rows(count, torch.float32) for count in (1, 17, 1000)] == [1, 17, 1000]
    assert [padded_rows(count, torch.float64) for count in (1, 17, 1000)] == [1, 17, 1000]


def test_bfloat16_segments_are_padded_to_few_lengths_by_little() -> None:
    padded = {count: padded_rows(count, torch.bfloat16) for count in range(1, 4097)}
    assert all(count <= longer < count + max(16, count / 4) for count, longer in padded.items())
    assert len(set(padded.values())) <= 8 + 8 * 5
    assert all(padded_rows(longer, torch.bfloat16) == longer for longer in set(padded.values()))


def test_second_derivative_is_refused() -> None:
    case = make_case(T=5, D=4, F=3, E=3, K=2, dtype=torch.float64)
    x_TD = case.x_TD.requires_grad_()
    y_TD = SEGMENTS(x_TD, case.token_N, case.expert_N, case.weight_N, case.gate_up_E2FD, case.down_EDF, fan_out=2)
    (dx_TD,) = torch.autograd.grad(y_TD.square().sum(), x_TD, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx_TD.sum().backward()


def test_input_changed_between_the_passes_is_refused() -> None:
    case = make_case(T=5, D=4, F=3, E=3, K=2)
    down_EDF = case.down_EDF.clone().requires_grad_()
    y_TD = SEGMENTS(case.x_TD, case.token_N, case.expert_N, case.weight_N, case.gate_up_E2FD, down_EDF, fan_out=2)
    with torch.no_grad():
        down_EDF.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y_TD.sum().backward()
