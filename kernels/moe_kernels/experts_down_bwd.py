"""The gradient in front of the activation: dy W2, rows gathered on load; behind it dH, weighted A, parts of dweight.

<dA'_r, A_r> = <W2^T dy, A_r> = <dy, Y_r> is the gradient of a row's weight. It is summed here column block by column
block, each into a place of its own (combine.weight_gradient adds them in order), so Y need not be kept.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels import launch
from moe_kernels.grouped_gemm import Weights
from moe_kernels.parts import activate, activate_backward, split_columns, tile_place
from moe_kernels.route import Schedule
from moe_kernels.spec import ExpertSpec
from moe_kernels.tiles import Tile

WIDEST_GPT_OSS = 128  # columns of a tile: its clamps take registers, and 256 columns spill


@triton.jit
def experts_bwd_down_kernel(
    dy_ptr,
    weight_ptr,
    weight_desc,
    hidden_ptr,
    row_weight_ptr,
    dhidden_ptr,
    weighted_ptr,
    partial_ptr,
    row_ptr,
    token_ptr,
    offset_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    num_tiles_ptr,
    stride_dy,
    stride_expert,
    stride_half,
    stride_n,
    stride_k,
    dh_stride_half,
    dh_stride_n,
    num_parts,
    D: tl.constexpr,
    F: tl.constexpr,
    HALVES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_K_INNER: tl.constexpr,
    USE_TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    SUB_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dH, the weighted A and one part of each row's <W2^T dy, A>, from dy, W2, H and the rows' weights.

    The epilogue goes by pieces of the columns: in one piece it spills over a thousand bytes of registers on sm_90.
    """
    num_m = tl.load(num_tiles_ptr)
    NUM_N: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    lane_m = tl.arange(0, BLOCK_M)
    lane_k = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), num_m * NUM_N, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = tile_place(tile, num_m, NUM_N)
        expert = tl.load(tile_expert_ptr + tile_m)
        start = tl.load(tile_start_ptr + tile_m)
        stop = tl.load(offset_ptr + expert + 1)
        token = tl.load(token_ptr + tl.minimum(start + lane_m, stop - 1))
        dy_row_ptr = dy_ptr + token.to(tl.int64)[:, None] * stride_dy
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        weight_row_ptr = weight_ptr + expert.to(tl.int64) * stride_expert + column.to(tl.int64)[None, :] * stride_n
        position = (start + lane_m).to(tl.int64)
        is_row = position < stop
        hidden_row_ptr = hidden_ptr + position[:, None] * (HALVES * F)
        WIDTH: tl.constexpr = BLOCK_N // SUB_TILES
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for k in range(0, D, BLOCK_K):
            if D % BLOCK_K == 0:
                dy = tl.load(dy_row_ptr + (k + lane_k)[None, :])
            else:
                dy = tl.load(dy_row_ptr + (k + lane_k)[None, :], mask=(lane_k < D - k)[None, :], other=0.0)
            if USE_TMA and IS_K_INNER:
                weight = weight_desc.load([expert, 0, tile_n * BLOCK_N, k]).reshape(BLOCK_N, BLOCK_K).T
            elif USE_TMA:
                weight = weight_desc.load([expert, 0, k, tile_n * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
            elif D % BLOCK_K == 0 and F % BLOCK_N == 0:
                weight = tl.load(weight_row_ptr + (k + lane_k).to(tl.int64)[:, None] * stride_k)
            else:
                place = weight_row_ptr + (k + lane_k).to(tl.int64)[:, None] * stride_k
                weight = tl.load(place, mask=(lane_k < D - k)[:, None] & (column < F)[None, :], other=0.0)
            acc = tl.dot(dy, weight, acc, input_precision=PRECISION, out_dtype=ACC)
        row = tl.load(row_ptr + position, mask=is_row, other=0)
        row_weight = tl.load(row_weight_ptr + row, mask=is_row, other=0.0).to(ACC)[:, None]
        pieces = split_columns(acc, SUB_TILES)
        part = tl.zeros((BLOCK_M,), ACC)
        for i in tl.static_range(SUB_TILES):
            column = tile_n * BLOCK_N + i * WIDTH + tl.arange(0, WIDTH)
            mask = is_row[:, None] & (column < F)[None, :]
            gate = tl.load(hidden_row_ptr + column[None, :], mask=mask, other=0.0).to(ACC)
            up = gate
            if HALVES == 2:
                up = tl.load(hidden_row_ptr + F + column[None, :], mask=mask, other=0.0).to(ACC)
            a = activate(gate, up, ACTIVATION)
            part += tl.sum(tl.where(mask, pieces[i] * a, 0.0), axis=1)
            dgate, dup = activate_backward(pieces[i] * row_weight, gate, up, ACTIVATION)
            place = dhidden_ptr + position[:, None] * (HALVES * F) + column[None, :] * dh_stride_n
            tl.store(place, dgate.to(dhidden_ptr.dtype.element_ty), mask=mask)
            if HALVES == 2:
                tl.store(place + dh_stride_half, dup.to(dhidden_ptr.dtype.element_ty), mask=mask)
            place = weighted_ptr + position[:, None] * F + column[None, :]
            tl.store(place, (a * row_weight).to(weighted_ptr.dtype.element_ty), mask=mask)
        tl.store(partial_ptr + position * num_parts + tile_n, part, mask=is_row)


@triton.jit
def row_dot_kernel(
    dy_ptr,
    bias_ptr,
    partial_ptr,
    token_ptr,
    offset_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    num_tiles_ptr,
    stride_dy,
    num_parts,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """The last part of each row's weight gradient: <dy, b2_e>. One program per row tile."""
    tile = tl.program_id(0)
    if tile < tl.load(num_tiles_ptr):
        expert = tl.load(tile_expert_ptr + tile)
        position = tl.load(tile_start_ptr + tile) + tl.arange(0, BLOCK_M)
        is_row = position < tl.load(offset_ptr + expert + 1)
        token = tl.load(token_ptr + position, mask=is_row, other=0).to(tl.int64)
        total = tl.zeros((BLOCK_M,), ACC)
        for begin in range(0, D, BLOCK_D):
            column = begin + tl.arange(0, BLOCK_D)
            mask = is_row[:, None] & (column < D)[None, :]
            dy = tl.load(dy_ptr + token[:, None] * stride_dy + column[None, :], mask=mask, other=0.0).to(ACC)
            bias = tl.load(bias_ptr + expert.to(tl.int64) * D + column, mask=column < D, other=0.0).to(ACC)
            total += tl.sum(dy * bias[None, :], axis=1)
        tl.store(partial_ptr + position.to(tl.int64) * num_parts + num_parts - 1, total, mask=is_row)


def down_bwd(
    dy_TD: Tensor,
    weights: Weights,
    h_NH: Tensor,
    row_weight_N: Tensor,
    schedule: Schedule,
    tile: Tile,
    *,
    spec: ExpertSpec,
    bias_ED: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dH [N, halves * F], weighted A [N, F], parts of the weights' gradient [N, P]) in expert order.

    Args:
        weights: the second weight as [E, 1, F, D]: what dy is multiplied by.
        spec: where it is paired, gate and up columns of dH take turns, as the outputs of the first weight do.
    """
    _, _, F, D = weights.shape
    num_rows = schedule.row_N.numel()
    halves = h_NH.shape[1] // F
    if spec.activation == "gpt_oss" and tile.block_n > WIDEST_GPT_OSS:
        tile = replace(tile, block_n=WIDEST_GPT_OSS)
    num_blocks = launch.cdiv(F, tile.block_n)
    num_parts = num_blocks + (bias_ED is not None)
    wide = torch.promote_types(dy_TD.dtype, torch.float32)
    dh_NH = torch.empty_like(h_NH)
    a_NF = dy_TD.new_empty(num_rows, F)
    partial_NP = torch.empty(num_rows, num_parts, dtype=wide, device=dy_TD.device)
    if not num_rows:
        return dh_NH, a_NF, partial_NP
    use_tma = tile.use_tma and weights.can_be_described()
    weight_desc = weights.describe((1, 1, tile.block_n, tile.block_k)) if use_tma else None
    tiles = (schedule.offset_E1, schedule.tile_expert_M, schedule.tile_start_M, schedule.num_tiles_1)
    formats = launch.formats(dy_TD.dtype)
    num_tiles = schedule.tile_expert_M.numel() * num_blocks
    experts_bwd_down_kernel[(launch.num_programs(dy_TD.device, num_tiles, tile.per_sm),)](
        dy_TD, weights.tensor, weight_desc, h_NH, row_weight_N, dh_NH, a_NF, partial_NP,
        schedule.row_N, schedule.token_N, *tiles,
        dy_TD.stride(0), *weights.strides, *((1, 2) if spec.is_paired else (F, 1)), num_parts,
        D=D, F=F, HALVES=halves, ACTIVATION=spec.activation, IS_K_INNER=weights.is_k_inner, USE_TMA=use_tma,
        FLATTEN=tile.flatten, SUB_TILES=tile.sub_tiles,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        **formats, **tile.launch_options(),
    )  # fmt: skip
    if bias_ED is not None:
        block_d = min(64, triton.next_power_of_2(D))
        row_dot_kernel[(schedule.tile_expert_M.numel(),)](
            dy_TD, bias_ED, partial_NP, schedule.token_N, *tiles, dy_TD.stride(0), num_parts,
            D=D, BLOCK_M=tile.block_m, BLOCK_D=block_d, ACC=formats["ACC"],
        )  # fmt: skip
    return dh_NH, a_NF, partial_NP
