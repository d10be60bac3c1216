"""Sums over the rows of a token, one program per token, in the order the rows came: deterministic, without atomics.

`combine` adds weighted rows up to tokens, forward with the experts' outputs and backward with the gradients of x.
`weight_gradient` gives every row the gradient of its weight from the partial sums the down_bwd kernel left.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels import launch

UNROLLED = 32  # up to this fan-out the rows of a token are loaded without a loop, so that loads overlap


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRows:
    """Which rows each token owns: rows t * fan_out .. of token t, or a list where the number differs (int32)."""

    fan_out: int | None
    first_T1: Tensor | None = None  # the rows of token t stand at row_N[first_T1[t] : first_T1[t + 1]]
    row_N: Tensor | None = None


def rows_of_tokens(
    token_N: Tensor, expert_N: Tensor, *, num_tokens: int, num_experts: int, fan_out: int | None
) -> TokenRows:
    """Return the rows of each token, unused ones left out if the list is ragged. No host sync."""
    if fan_out:
        return TokenRows(fan_out=fan_out)
    owner_N = torch.where((expert_N >= 0) & (expert_N < num_experts), token_N, num_tokens)
    sorted_N, row_N = torch.sort(owner_N, stable=True)
    tokens_T1 = torch.arange(num_tokens + 1, device=token_N.device, dtype=sorted_N.dtype)
    first_T1 = torch.searchsorted(sorted_N, tokens_T1, out_int32=True)
    return TokenRows(fan_out=None, first_T1=first_T1, row_N=row_N.to(torch.int32))


@triton.jit
def add_row(acc, y_ptr, weight_ptr, position_ptr, row, column, is_column, D: tl.constexpr, ACC: tl.constexpr):
    """Return acc plus the weighted row. An unused row adds nothing, and nothing of it is read."""
    position = tl.load(position_ptr + row)
    is_used = position >= 0
    y = tl.load(y_ptr + position.to(tl.int64) * D + column, mask=is_column & is_used, other=0.0).to(ACC)
    if weight_ptr is not None:
        y = y * tl.load(weight_ptr + row, mask=is_used, other=0.0).to(ACC)
    return acc + y


@triton.jit
def combine_fwd_kernel(
    y_ptr,
    weight_ptr,
    position_ptr,
    first_ptr,
    row_ptr,
    out_ptr,
    D: tl.constexpr,
    FAN_OUT: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[t] = sum over the rows of token t, in order: weight[row] * y[position of row]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column = column < D
    acc = tl.zeros((BLOCK_D,), ACC)
    if FAN_OUT is None:
        for slot in range(tl.load(first_ptr + token), tl.load(first_ptr + token + 1)):
            row = tl.load(row_ptr + slot).to(tl.int64)
            acc = add_row(acc, y_ptr, weight_ptr, position_ptr, row, column, is_column, D, ACC)
    elif UNROLL:
        for k in tl.static_range(FAN_OUT):
            row = token * FAN_OUT + k
            acc = add_row(acc, y_ptr, weight_ptr, position_ptr, row, column, is_column, D, ACC)
    else:
        for k in range(FAN_OUT):
            row = token * FAN_OUT + k
            acc = add_row(acc, y_ptr, weight_ptr, position_ptr, row, column, is_column, D, ACC)
    tl.store(out_ptr + token * D + column, acc.to(out_ptr.dtype.element_ty), mask=is_column)


def combine(
    y_RD: Tensor, position_N: Tensor, rows: TokenRows, *, num_tokens: int, weight_N: Tensor | None = None
) -> Tensor:
    """Return [T, D] in the dtype of y: each token's rows of y, weighted if `weight_N` is given, summed in float32."""
    D = y_RD.shape[1]
    out_TD = y_RD.new_empty(num_tokens, D)
    if not out_TD.numel():
        return out_TD
    if not y_RD.shape[0]:
        return out_TD.zero_()
    block_d = min(1024, triton.next_power_of_2(D))
    combine_fwd_kernel[(num_tokens, launch.cdiv(D, block_d))](
        y_RD, weight_N, position_N, rows.first_T1, rows.row_N, out_TD,
        D=D, FAN_OUT=rows.fan_out, UNROLL=(rows.fan_out or 0) <= UNROLLED, BLOCK_D=block_d,
        ACC=launch.formats(y_RD.dtype)["ACC"], num_warps=4,
    )  # fmt: skip
    return out_TD


@triton.jit(do_not_specialize=["num_rows"])
def weight_gradient_kernel(
    partial_ptr, position_ptr, out_ptr, num_rows, PARTS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """out[row] = sum over parts, in order: partial[position of row, part]; 0 for an unused row."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(position_ptr + row, mask=row < num_rows, other=-1)
    total = tl.zeros((BLOCK,), ACC)
    for part in range(PARTS):
        total += tl.load(partial_ptr + position.to(tl.int64) * PARTS + part, mask=position >= 0, other=0.0)
    tl.store(out_ptr + row, total.to(out_ptr.dtype.element_ty), mask=row < num_rows)


def weight_gradient(partial_RP: Tensor, position_N: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return [N], the gradient of every row's weight: the sum of its partial sums; 0 for an unused row."""
    num_rows = position_N.numel()
    out_N = torch.empty(num_rows, dtype=dtype, device=position_N.device)
    if num_rows:
        acc = tl.float64 if partial_RP.dtype == torch.float64 else tl.float32
        weight_gradient_kernel[(launch.cdiv(num_rows, 256),)](
            partial_RP, position_N, out_N, num_rows, PARTS=partial_RP.shape[1], BLOCK=256, ACC=acc
        )
    return out_N
