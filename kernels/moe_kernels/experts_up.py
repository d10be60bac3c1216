"""The first product of the expert MLP with the activation behind it: H = x W1^T, rows gathered on load, and A = act(H).

H and A are stored in expert order. A is made of H as it is stored, so that the backward pass, which has H alone, finds
the very same A again.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels import launch
from moe_kernels.grouped_gemm import Weights
from moe_kernels.parts import activate, halve, split_columns, tile_place
from moe_kernels.route import Schedule
from moe_kernels.spec import ExpertSpec
from moe_kernels.tiles import Tile


@triton.jit
def load_up_weights(
    weight_ptr,
    weight_desc,
    expert,
    column,
    k,
    stride_expert,
    stride_half,
    stride_n,
    stride_k,
    F: tl.constexpr,
    D: tl.constexpr,
    HALVES: tl.constexpr,
    IS_K_INNER: tl.constexpr,
    IS_PAIRED: tl.constexpr,
    USE_TMA: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return [BLOCK_K, HALVES * WIDTH] of the first weight: columns column .. column + WIDTH - 1 of every half.

    The halves follow one another, or take turns if IS_PAIRED.
    """
    if USE_TMA and IS_PAIRED:
        weight = weight_desc.load([expert, k, HALVES * column]).reshape(BLOCK_K, HALVES * WIDTH)
    elif USE_TMA and IS_K_INNER:
        weight = weight_desc.load([expert, 0, column, k]).reshape(HALVES * WIDTH, BLOCK_K).T
    elif USE_TMA:
        weight = weight_desc.load([expert, k, 0, column]).reshape(BLOCK_K, HALVES * WIDTH)
    else:
        lane = tl.arange(0, HALVES * WIDTH)
        if IS_PAIRED:
            # gate and up stand side by side: one run of columns, which loads 16 bytes at a time
            output = HALVES * column + lane
            is_output = output < HALVES * F
            place = output.to(tl.int64) * stride_half
        else:
            n = column + lane % WIDTH
            is_output = n < F
            place = (lane // WIDTH).to(tl.int64) * stride_half + n.to(tl.int64) * stride_n
        lane_k = k + tl.arange(0, BLOCK_K)
        ptr = weight_ptr + expert.to(tl.int64) * stride_expert + lane_k.to(tl.int64)[:, None] * stride_k
        if D % BLOCK_K == 0 and F % WIDTH == 0:
            weight = tl.load(ptr + place[None, :])
        else:
            weight = tl.load(ptr + place[None, :], mask=(lane_k < D)[:, None] & is_output[None, :], other=0.0)
    return weight


@triton.jit
def split_halves(acc, HALVES: tl.constexpr, IS_PAIRED: tl.constexpr):
    """Return (gate, up) of a product whose columns hold both; the product twice where there is no gate."""
    if HALVES == 1:
        return acc, acc
    elif IS_PAIRED:
        return acc.reshape(acc.shape[0], acc.shape[1] // 2, 2).split()
    else:
        return halve(acc)


@triton.jit
def experts_fwd_up_kernel(
    x_ptr,
    weight_ptr,
    weight_desc,
    bias_ptr,
    hidden_ptr,
    activated_ptr,
    token_ptr,
    offset_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    num_tiles_ptr,
    stride_x,
    stride_expert,
    stride_half,
    stride_n,
    stride_k,
    bias_stride_half,
    bias_stride_n,
    D: tl.constexpr,
    F: tl.constexpr,
    HALVES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORE_HIDDEN: tl.constexpr,
    STORE_ACTIVATED: tl.constexpr,
    IS_K_INNER: tl.constexpr,
    IS_PAIRED: tl.constexpr,
    USE_TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    SUB_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """H[r] = W1_e x[token of r] + b1_e, [R, HALVES * F] with the gate first, and A = act(H) of H as it is stored.

    One accumulator holds gate and up columns side by side: two would be fed by two products that wait for each other.
    """
    num_m = tl.load(num_tiles_ptr)
    WIDTH: tl.constexpr = BLOCK_N // HALVES
    NUM_N: tl.constexpr = (F + WIDTH - 1) // WIDTH
    lane_m = tl.arange(0, BLOCK_M)
    lane_k = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), num_m * NUM_N, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = tile_place(tile, num_m, NUM_N)
        expert = tl.load(tile_expert_ptr + tile_m)
        start = tl.load(tile_start_ptr + tile_m)
        stop = tl.load(offset_ptr + expert + 1)
        token = tl.load(token_ptr + tl.minimum(start + lane_m, stop - 1))
        x_row_ptr = x_ptr + token.to(tl.int64)[:, None] * stride_x
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for k in range(0, D, BLOCK_K):
            if D % BLOCK_K == 0:
                x = tl.load(x_row_ptr + (k + lane_k)[None, :])
            else:
                x = tl.load(x_row_ptr + (k + lane_k)[None, :], mask=(lane_k < D - k)[None, :], other=0.0)
            weight = load_up_weights(
                weight_ptr, weight_desc, expert, tile_n * WIDTH, k, stride_expert, stride_half, stride_n, stride_k,
                F, D, HALVES, IS_K_INNER, IS_PAIRED, USE_TMA, WIDTH, BLOCK_K,
            )  # fmt: skip
            acc = tl.dot(x, weight, acc, input_precision=PRECISION, out_dtype=ACC)
        if IS_PAIRED:
            pieces = split_columns(acc, SUB_TILES)
        else:
            gate, up = split_halves(acc, HALVES, False)
            gates = split_columns(gate, SUB_TILES)
            ups = split_columns(up, SUB_TILES)
        row = (start + lane_m).to(tl.int64)
        for i in tl.static_range(SUB_TILES):
            if IS_PAIRED:
                gate, up = split_halves(pieces[i], HALVES, True)
            else:
                gate = gates[i]
                up = ups[i]
            column = tile_n * WIDTH + i * (WIDTH // SUB_TILES) + tl.arange(0, WIDTH // SUB_TILES)
            if bias_ptr is not None:
                bias_row_ptr = bias_ptr + expert.to(tl.int64) * HALVES * F + column * bias_stride_n
                gate += tl.load(bias_row_ptr, mask=column < F, other=0.0).to(ACC)[None, :]
                if HALVES == 2:
                    up += tl.load(bias_row_ptr + bias_stride_half, mask=column < F, other=0.0).to(ACC)[None, :]
            # rounded first, and A made of what was stored: the backward pass finds the very same A again
            gate = gate.to(activated_ptr.dtype.element_ty)
            up = up.to(activated_ptr.dtype.element_ty)
            mask = (row < stop)[:, None] & (column < F)[None, :]
            if STORE_HIDDEN:
                place = hidden_ptr + row[:, None] * (HALVES * F) + column[None, :]
                tl.store(place, gate, mask=mask)
                if HALVES == 2:
                    tl.store(place + F, up, mask=mask)
            if STORE_ACTIVATED:
                a = activate(gate.to(ACC), up.to(ACC), ACTIVATION)
                place = activated_ptr + row[:, None] * F + column[None, :]
                tl.store(place, a.to(activated_ptr.dtype.element_ty), mask=mask)


def up(
    x_TD: Tensor,
    weights: Weights,
    schedule: Schedule,
    tile: Tile,
    *,
    spec: ExpertSpec,
    bias_EH: Tensor | None,
    keep_hidden: bool,
    keep_activated: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return (H [N, halves * F], gate first, and A [N, F]) in expert order; one not kept comes back empty, [0].

    Args:
        weights: the first weight as [E, halves, F, D].
    """
    E, halves, F, D = weights.shape
    num_rows = schedule.row_N.numel()
    h_NH = x_TD.new_empty((num_rows, halves * F) if keep_hidden else 0)
    a_NF = x_TD.new_empty((num_rows, F) if keep_activated else 0)
    if not num_rows:
        return h_NH, a_NF
    width = tile.block_n // halves
    weight_desc = None
    if tile.use_tma and spec.is_paired:
        shape, strides = [E, D, 2 * F], [weights.strides[0], weights.strides[3], weights.strides[1]]
        if strides[2] == 1 and launch.can_describe(weights.tensor, strides=tuple(strides[:2])):
            weight_desc = launch.describe(weights.tensor, shape, strides, [1, tile.block_k, tile.block_n])
    elif tile.use_tma and weights.can_be_described():
        # [E, halves, F, D] where D is innermost, else [E, D, halves, F]
        order = (0, 1, 2, 3) if weights.is_k_inner else (0, 3, 1, 2)
        block = (1, halves, width, tile.block_k)
        pick = [[values[i] for i in order] for values in (weights.shape, weights.strides, block)]
        weight_desc = launch.describe(weights.tensor, *pick)
    num_tiles = schedule.tile_expert_M.numel() * launch.cdiv(F, width)
    experts_fwd_up_kernel[(launch.num_programs(x_TD.device, num_tiles, tile.per_sm),)](
        x_TD, weights.tensor, weight_desc, bias_EH, h_NH, a_NF, schedule.token_N, schedule.offset_E1,
        schedule.tile_expert_M, schedule.tile_start_M, schedule.num_tiles_1,
        x_TD.stride(0), *weights.strides, *((1, 2) if spec.is_interleaved else (F, 1)),
        D=D, F=F, HALVES=halves, ACTIVATION=spec.activation, STORE_HIDDEN=keep_hidden, STORE_ACTIVATED=keep_activated,
        IS_K_INNER=weights.is_k_inner, IS_PAIRED=spec.is_paired, USE_TMA=weight_desc is not None, FLATTEN=tile.flatten,
        SUB_TILES=tile.sub_tiles,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        **launch.formats(x_TD.dtype), **tile.launch_options(),
    )  # fmt: skip
    return h_NH, a_NF
