"""Grouped products as public operations: rows by the weights of their experts, and rows by rows, expert by expert.

    grouped_mm(a, weight, routed)      y_r = weight_e a_r              M-ragged: each expert has rows of its own
    grouped_mm_rows(p, q, routed)      out_e = sum of p_r q_r^T        K-ragged: the sum runs over an expert's rows

e is the expert of sorted row r. Each is the other's gradient, so both are differentiable as often as you like. Rows
past the last one in use are zero in whatever comes back, and nothing of them is read.
"""

from typing import Any

import torch
from torch import Tensor

from moe_kernels import combine, grouped_gemm
from moe_kernels.experts import Routed
from moe_kernels.grouped_gemm import Weights
from moe_kernels.route import Schedule
from moe_kernels.tiles import table


def _seen(weight_ENK: Tensor) -> Weights:
    E, N, K = weight_ENK.shape
    e, n, k = weight_ENK.stride()
    return Weights(weight_ENK, (E, 1, N, K), (e, N * n, n, k))


def _cleared(y_RN: Tensor, plan: Schedule) -> Tensor:
    """Return y with zeros in the rows that are not in use, which the kernels leave unwritten."""
    position_R1 = torch.arange(y_RN.shape[0], device=y_RN.device).unsqueeze(1)
    return torch.where(position_R1 < plan.offset_E1[-1], y_RN, 0)


@torch.library.custom_op("moe_kernels::grouped_mm", mutates_args=())
def _grouped_mm(a_RK: Tensor, weight_ENK: Tensor, schedule: list[Tensor], tiles: str) -> Tensor:
    plan = Schedule.of(schedule)
    y_RN = grouped_gemm.grouped_matmul(a_RK.contiguous(), _seen(weight_ENK), plan, table()[tiles].tiles["matmul"])
    return _cleared(y_RN, plan)


@_grouped_mm.register_fake
def _(a_RK: Tensor, weight_ENK: Tensor, schedule: list[Tensor], tiles: str) -> Tensor:
    return a_RK.new_empty(schedule[1].shape[0], weight_ENK.shape[1])


@torch.library.custom_op("moe_kernels::grouped_mm_rows", mutates_args=())
def _grouped_mm_rows(p_RM: Tensor, q_RN: Tensor, schedule: list[Tensor], tiles: str) -> Tensor:
    plan = Schedule.of(schedule)
    out_EMN = p_RM.new_empty(plan.offset_E1.numel() - 1, p_RM.shape[1], q_RN.shape[1])
    grouped_gemm.grouped_matmul_bwd_weight(
        p_RM.contiguous(), q_RN.contiguous(), _seen(out_EMN), plan, table()[tiles].tiles["weight_bwd"]
    )
    return out_EMN


@_grouped_mm_rows.register_fake
def _(p_RM: Tensor, q_RN: Tensor, schedule: list[Tensor], tiles: str) -> Tensor:
    return p_RM.new_empty(schedule[0].shape[0] - 1, p_RM.shape[1], q_RN.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    left, right, schedule, ctx.tiles = inputs
    ctx.save_for_backward(left, right, *schedule)


def _mm_backward(ctx: Any, dy_RN: Tensor) -> tuple[Any, ...]:
    a_RK, weight_ENK, *schedule = ctx.saved_tensors
    da_RK = _grouped_mm(dy_RN, weight_ENK.mT, schedule, ctx.tiles) if ctx.needs_input_grad[0] else None
    dweight_ENK = _grouped_mm_rows(dy_RN, a_RK, schedule, ctx.tiles) if ctx.needs_input_grad[1] else None
    return da_RK, dweight_ENK, [None] * len(schedule), None


def _rows_backward(ctx: Any, dout_EMN: Tensor) -> tuple[Any, ...]:
    p_RM, q_RN, *schedule = ctx.saved_tensors
    dp_RM = _grouped_mm(q_RN, dout_EMN, schedule, ctx.tiles) if ctx.needs_input_grad[0] else None
    dq_RN = _grouped_mm(p_RM, dout_EMN.mT, schedule, ctx.tiles) if ctx.needs_input_grad[1] else None
    return dp_RM, dq_RN, [None] * len(schedule), None


_grouped_mm.register_autograd(_mm_backward, setup_context=_save)
_grouped_mm_rows.register_autograd(_rows_backward, setup_context=_save)


@torch.library.custom_op("moe_kernels::grouped_mm_gather", mutates_args=())
def _grouped_mm_gather(
    x_TK: Tensor,
    weight_ENK: Tensor,
    schedule: list[Tensor],
    first_T1: Tensor | None,
    row_N: Tensor | None,
    fan_out: int | None,
    tiles: str,
) -> Tensor:
    plan, tile = Schedule.of(schedule), table()[tiles].tiles["matmul"]
    y_RN = grouped_gemm.grouped_matmul(x_TK.contiguous(), _seen(weight_ENK), plan, tile, gather_N=plan.token_N)
    return _cleared(y_RN, plan)


@_grouped_mm_gather.register_fake
def _(x_TK: Tensor, weight_ENK: Tensor, schedule: list[Tensor], *rest: Any) -> Tensor:
    return x_TK.new_empty(schedule[1].shape[0], weight_ENK.shape[1])


@torch.library.custom_op("moe_kernels::grouped_mm_gather_bwd", mutates_args=())
def _grouped_mm_gather_bwd(
    dy_RN: Tensor,
    x_TK: Tensor,
    weight_ENK: Tensor,
    schedule: list[Tensor],
    first_T1: Tensor | None,
    row_N: Tensor | None,
    fan_out: int | None,
    tiles: str,
) -> tuple[Tensor, Tensor]:
    plan, entry, dy_RN = Schedule.of(schedule), table()[tiles].tiles, dy_RN.contiguous()
    da_RK = grouped_gemm.grouped_matmul(dy_RN, _seen(weight_ENK).transposed(), plan, entry["matmul"])
    rows = combine.TokenRows(fan_out=fan_out, first_T1=first_T1, row_N=row_N)
    dx_TK = combine.combine(da_RK, plan.position_N, rows, num_tokens=x_TK.shape[0])
    dweight_ENK = torch.empty_like(weight_ENK, memory_format=torch.contiguous_format)
    grouped_gemm.grouped_matmul_bwd_weight(
        dy_RN, x_TK.contiguous(), _seen(dweight_ENK), plan, entry["weight_bwd"], gather_q=True
    )
    return dx_TK, dweight_ENK


@_grouped_mm_gather_bwd.register_fake
def _(dy_RN: Tensor, x_TK: Tensor, weight_ENK: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x_TK.new_empty(x_TK.shape), weight_ENK.new_empty(weight_ENK.shape)


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TK, weight_ENK, schedule, first_T1, row_N, ctx.fan_out, ctx.tiles = inputs
    ctx.save_for_backward(x_TK, weight_ENK, first_T1, row_N, *schedule)


def _gather_backward(ctx: Any, dy_RN: Tensor) -> tuple[Any, ...]:
    x_TK, weight_ENK, first_T1, row_N, *schedule = ctx.saved_tensors
    dx_TK, dweight_ENK = _grouped_mm_gather_bwd(
        dy_RN, x_TK, weight_ENK, schedule, first_T1, row_N, ctx.fan_out, ctx.tiles
    )
    return dx_TK, dweight_ENK, [None] * len(schedule), None, None, None, None


_grouped_mm_gather.register_autograd(_gather_backward, setup_context=_save_gather)


def grouped_mm(a: Tensor, weight_ENK: Tensor, routed: Routed, *, gather: bool = False) -> Tensor:
    """Return y_RN in expert order, in the dtype of a: y_r = weight_e a_r, summed in float32 (float64 for float64).

    Args:
        a: [N, K], the rows in expert order; with `gather`, [T, K], one row per token, read through the schedule.
        weight_ENK: any strides: pass [E, K, N] weights as their .mT.
        gather: read row r of `a` at its token. Differentiable once; without it, any number of times.

    Raises:
        ValueError: the widths differ, or without `gather` the number of rows is not that of the schedule.
    """
    if a.ndim != 2 or weight_ENK.ndim != 3 or a.shape[1] != weight_ENK.shape[2]:
        raise ValueError(f"a is {list(a.shape)} and weight {list(weight_ENK.shape)}; K, the last of each, must agree")
    schedule, rows = routed.schedule.tensors(), routed.rows
    if gather:
        return _grouped_mm_gather(a, weight_ENK, schedule, rows.first_T1, rows.row_N, rows.fan_out, routed.tiles)
    _check_rows("a", a, routed)
    return _grouped_mm(a, weight_ENK, schedule, routed.tiles)


def grouped_mm_rows(p_RM: Tensor, q_RN: Tensor, routed: Routed) -> Tensor:
    """Return out_EMN in the dtype of p: out_e = sum over the rows r of expert e of p_r q_r^T; zeros without rows.

    Raises:
        ValueError: p or q has not one row for every row of the schedule.
    """
    _check_rows("p", p_RM, routed)
    _check_rows("q", q_RN, routed)
    return _grouped_mm_rows(p_RM, q_RN, routed.schedule.tensors(), routed.tiles)


def _check_rows(name: str, rows: Tensor, routed: Routed) -> None:
    expected = routed.schedule.row_N.shape[0]
    if rows.ndim != 2 or rows.shape[0] != expected:
        raise ValueError(f"{name} is {list(rows.shape)}, not [{expected}, width], a row for each one of the schedule")
