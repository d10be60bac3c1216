"""Offsets past 2^31: strides and sorted positions that large, in memory of which only what is touched is taken.

The check for int32 overflow, on in all of these tests, names the operation that wraps; the numbers show the rest.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernel_runs import Tiled, allocated_by, overflow_checks, reserved, spread
from moe_kernels import combine
from moe_kernels.combine import TokenRows
from moe_kernels.experts import first_weights, second_weights
from moe_kernels.experts_down_bwd import down_bwd, row_dot_kernel
from moe_kernels.experts_up import up
from moe_kernels.grouped_gemm import Weights, grouped_matmul, grouped_matmul_bwd_weight, segment_sum
from moe_kernels.route import Schedule, schedule_rows
from moe_kernels.spec import ExpertSpec
from moe_kernels.testing import assert_same, make_case, run
from moe_kernels.tiles import table

FAR = 2**30  # a stride below 2^31, as those that fit int32: the product with an index of 2 does not
FIRST = 2**27  # a sorted position: times a width of 17 it is past 2^31


@pytest.fixture(autouse=True)
def checked() -> Iterator[None]:
    """Check every int32 operation."""
    with overflow_checks():
        yield


@triton.jit
def multiply_kernel(out_ptr, number):
    """Write number^2, computed in the type of the number."""
    tl.store(out_ptr, (number * number).to(tl.int64))


def test_the_interpreter_raises_where_an_int32_product_wraps() -> None:
    out = torch.zeros(1, dtype=torch.int64)
    multiply_kernel[(1,)](out, 40_000)
    assert out.item() == 1_600_000_000
    with pytest.raises(Exception, match="int32 overflow detected for operation mul"):
        multiply_kernel[(1,)](out, 100_000)


@pytest.mark.parametrize("weights", ["out_in", "in_out"])
def test_strides_of_inputs_may_lead_past_two_to_the_31(weights, tiles) -> None:
    spec = ExpertSpec(weights=weights)
    case = make_case("some_unused", T=3, D=24, F=24, E=3, K=3, dtype=torch.float16, spec=spec)
    # the middle stride alone leads there as well, and no two elements share an address
    strides = (FAR, 2**27 + 64, 1)
    far = replace(
        case,
        x_TD=spread(case.x_TD, FAR, 1),
        gate_up_E2FD=spread(case.gate_up_E2FD, *strides),
        down_EDF=spread(case.down_EDF, *strides),
    )
    assert_same(run(Tiled(tiles), far), run(Tiled(tiles), case))


def late(schedule: Schedule) -> Schedule:
    """Return the schedule with every row in use FIRST positions later, and nothing at the positions before."""

    def moved(tensor_N: Tensor) -> Tensor:
        moved_N = reserved([FIRST + tensor_N.numel()], torch.int32)
        moved_N[FIRST:] = tensor_N
        return moved_N

    return replace(
        schedule,
        offset_E1=schedule.offset_E1 + FIRST,
        row_N=moved(schedule.row_N),
        token_N=moved(schedule.token_N),
        position_N=torch.where(schedule.position_N < 0, -1, schedule.position_N + FIRST),
        tile_start_M=schedule.tile_start_M + FIRST,
    )


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_sorted_positions_may_lead_past_two_to_the_31(activation, tiles) -> None:
    spec = ExpertSpec(activation=activation)
    case = make_case("random", T=3, D=17, F=17, E=2, K=2, dtype=torch.float16, spec=spec, biases=True)
    near = schedule_rows(case.token_N, case.expert_N, 2, block_m=16)
    entry, rows = table()[tiles].tiles, TokenRows(fan_out=2)
    first, second = first_weights(case.gate_up_E2FD, spec), second_weights(case.down_EDF, spec)
    dy_TD, outputs = spread(case.dy_TD, FAR, 1), []
    with allocated_by(reserved):
        for plan in (near, late(near)):
            h_NH, a_NF = up(
                case.x_TD, first, plan, entry["up"], spec=spec, bias_EH=case.gate_up_bias_E2F, keep_hidden=True
            )
            y_ND = grouped_matmul(a_NF, second, plan, entry["matmul"], bias_EN=case.down_bias_ED)
            y_TD = combine.combine(y_ND, plan.position_N, rows, num_tokens=3, weight_N=case.weight_N)
            dh_NH, weighted_NF, partial_NP = down_bwd(
                dy_TD, second.transposed(), h_NH, case.weight_N, plan, entry["down_bwd"],
                spec=spec, bias_ED=case.down_bias_ED,
            )  # fmt: skip
            dweight_N = combine.weight_gradient(partial_NP, plan.position_N, dtype=torch.float32)
            dgate_up, ddown = torch.zeros_like(case.gate_up_E2FD), torch.zeros_like(case.down_EDF)
            grouped_matmul_bwd_weight(
                dh_NH, case.x_TD, first_weights(dgate_up, spec), plan, entry["weight_bwd"], gather_q=True
            )
            grouped_matmul_bwd_weight(
                dy_TD, weighted_NF, second_weights(ddown, spec), plan, entry["weight_bwd"], gather_p=True
            )
            sums = segment_sum(dh_NH, plan), segment_sum(dy_TD, plan, scale_N=case.weight_N)
            outputs.append((h_NH[-6:], a_NF[-6:], y_TD, dweight_N, dgate_up, ddown, *sums))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert outputs[0][2].count_nonzero() > 0


def test_weight_gradients_may_be_written_past_two_to_the_31() -> None:
    plan = schedule_rows(torch.arange(6), torch.arange(6) % 3, 3, block_m=16)
    p_RM, q_RN = torch.randn(6, 17, dtype=torch.float16), torch.randn(6, 8, dtype=torch.float16)
    outputs = [torch.zeros(3, 17, 8, dtype=torch.float16)]
    outputs.append(spread(outputs[0], FAR, 2**27 + 64, 1))
    for out in outputs:
        e, m, n = out.stride()
        weights = Weights(out, (3, 1, 17, 8), (e, 17 * m, m, n))
        grouped_matmul_bwd_weight(p_RM, q_RN, weights, plan, table()["interpreter"].tiles["weight_bwd"])
    assert torch.equal(outputs[0], outputs[1]) and outputs[0].count_nonzero() > 0


def test_parts_of_the_weights_gradient_may_lie_past_two_to_the_31() -> None:
    parts, position_N = 17, torch.tensor([FIRST + 2, -1, FIRST], dtype=torch.int32)
    partial_NP = reserved([FIRST + 3, parts], torch.float32)
    partial_NP[FIRST:] = torch.arange(3 * parts).view(3, parts)
    dweight_N = combine.weight_gradient(partial_NP, position_N, dtype=torch.float32)
    assert dweight_N.tolist() == [partial_NP[FIRST + 2].sum(), 0, partial_NP[FIRST].sum()]

    plan = late(schedule_rows(torch.arange(3), torch.zeros(3, dtype=torch.int64), 1, block_m=16))
    dy_TD, bias_ED = torch.ones(3, 2), torch.tensor([[2.0, 3.0]])
    row_dot_kernel[(1,)](
        dy_TD, bias_ED, partial_NP, plan.token_N, plan.offset_E1, plan.tile_expert_M, plan.tile_start_M,
        plan.num_tiles_1, 2, parts, D=2, BLOCK_M=16, BLOCK_D=16, ACC=tl.float32,
    )  # fmt: skip
    assert partial_NP[FIRST:, -1].tolist() == [5, 5, 5]
