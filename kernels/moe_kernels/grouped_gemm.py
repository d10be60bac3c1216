"""Products of rows grouped by expert: rows x weights (M-ragged), and rows x rows for weights' gradients (K-ragged).

The kernels are here, and the functions that launch them on a Schedule; grouped_ops.py makes public operations of
them. What SonicMoE (arXiv 2512.14080) found holds: gathering operand rows while they are loaded is almost free,
scattering them while they are stored is not. So rows are gathered on load and stored in expert order.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels import launch
from moe_kernels.parts import load_segment, split_columns, tile_place
from moe_kernels.route import Schedule
from moe_kernels.tiles import Tile


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights [E, ...] of a product x W^T, seen as [E, halves, N, K]: any layout is a choice of strides.

    `halves` splits the output columns (gate and up) or, in the gradient of x, the summed ones.
    """

    tensor: Tensor
    shape: tuple[int, int, int, int]  # E, halves, N, K
    strides: tuple[int, int, int, int]

    @property
    def is_k_inner(self) -> bool:
        """Whether the summed index runs fastest in memory."""
        return self.strides[3] == 1

    def transposed(self) -> "Weights":
        """Return the same weights with N and K swapped: what x's gradient is multiplied by."""
        E, halves, N, K = self.shape
        e, half, n, k = self.strides
        return Weights(self.tensor, (E, halves, K, N), (e, half, k, n))

    def can_be_described(self) -> bool:
        """Return whether TMA can read them: one index with stride 1, the others whole 16 bytes apart."""
        *outer, n, k = self.strides
        if 1 not in (n, k) or 1 in outer:
            return False
        return launch.can_describe(self.tensor, strides=(*outer, max(n, k)))

    def describe(self, block: tuple[int, int, int, int]) -> Any:
        """Return a TMA descriptor for blocks [1, halves, N, K], its last two dimensions in the order of memory."""
        order = (0, 1, 2, 3) if self.is_k_inner else (0, 1, 3, 2)
        pick = [[values[i] for i in order] for values in (self.shape, self.strides, block)]
        return launch.describe(self.tensor, *pick)


@triton.jit(do_not_specialize=["num_steps"])
def grouped_matmul_fwd_kernel(
    a_ptr,
    a_desc,
    weight_ptr,
    weight_desc,
    bias_ptr,
    y_ptr,
    gather_ptr,
    offset_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    num_tiles_ptr,
    num_steps,
    stride_a,
    stride_expert,
    stride_half,
    stride_n,
    stride_k,
    N: tl.constexpr,
    K: tl.constexpr,
    HALVES: tl.constexpr,
    GATHER: tl.constexpr,
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
    """y[r, n] = bias[e, n] + sum over half and k: a[row of r, half * K + k] * weight[e, half, n, k].

    e is the expert of sorted position r; the row is gather[r], or r itself. HALVES splits the sum.
    """
    num_m = tl.load(num_tiles_ptr)
    NUM_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    NUM_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    lane_m = tl.arange(0, BLOCK_M)
    lane_k = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), num_m * NUM_N, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = tile_place(tile, num_m, NUM_N)
        expert = tl.load(tile_expert_ptr + tile_m)
        start = tl.load(tile_start_ptr + tile_m)
        stop = tl.load(offset_ptr + expert + 1)
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        # rows past the segment read its last row again: no mask in the loop, and never a neighbour's or a stray row
        row = tl.minimum(start + lane_m, stop - 1)
        if GATHER:
            row = tl.load(gather_ptr + row)
        a_row_ptr = a_ptr + row.to(tl.int64)[:, None] * stride_a
        weight_row_ptr = weight_ptr + expert.to(tl.int64) * stride_expert
        weight_row_ptr += column.to(tl.int64)[None, :] * stride_n
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        # a bound the compiler does not know: it would unroll short loops, 24 times at F = 768
        for step in range(0, num_steps):
            half = step // NUM_K
            k = step % NUM_K * BLOCK_K
            is_k = lane_k < K - k
            if USE_TMA and not GATHER:
                # two dimensions: a reshaped box would go to the product through registers. Where K is no multiple of
                # BLOCK_K the box takes columns of the next half along; the weights of those are read as zeros
                a = a_desc.load([start, half * K + k])
            elif K % BLOCK_K == 0:
                a = tl.load(a_row_ptr + (half * K + k + lane_k)[None, :])
            else:
                a = tl.load(a_row_ptr + (half * K + k + lane_k)[None, :], mask=is_k[None, :], other=0.0)
            if USE_TMA and IS_K_INNER:
                b = weight_desc.load([expert, half, tile_n * BLOCK_N, k]).reshape(BLOCK_N, BLOCK_K).T
            elif USE_TMA:
                b = weight_desc.load([expert, half, k, tile_n * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
            else:
                b_ptr = weight_row_ptr + half.to(tl.int64) * stride_half + (k + lane_k).to(tl.int64)[:, None] * stride_k
                if K % BLOCK_K == 0 and N % BLOCK_N == 0:
                    b = tl.load(b_ptr)
                else:
                    b = tl.load(b_ptr, mask=is_k[:, None] & (column < N)[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
        pieces = split_columns(acc, SUB_TILES)
        WIDTH: tl.constexpr = BLOCK_N // SUB_TILES
        is_row = start + lane_m < stop
        y_row_ptr = y_ptr + (start + lane_m).to(tl.int64)[:, None] * N
        for i in tl.static_range(SUB_TILES):
            column = tile_n * BLOCK_N + i * WIDTH + tl.arange(0, WIDTH)
            y = pieces[i]
            if bias_ptr is not None:
                bias = tl.load(bias_ptr + expert.to(tl.int64) * N + column, mask=column < N, other=0.0)
                y += bias.to(ACC)[None, :]
            mask = is_row[:, None] & (column < N)[None, :]
            tl.store(y_row_ptr + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def grouped_matmul(
    a_RK: Tensor,
    weights: Weights,
    schedule: Schedule,
    tile: Tile,
    *,
    gather_N: Tensor | None = None,
    bias_EN: Tensor | None = None,
) -> Tensor:
    """Return y [N rows, N columns] in expert order and in the dtype of a; rows past the last one in use are rubbish.

    Args:
        a_RK: [rows, halves * K], its last dimension contiguous.
        gather_N: int32, sorted position -> row of a; None if a stands in expert order already.
    """
    _, halves, N, K = weights.shape
    y_RN = a_RK.new_empty(schedule.row_N.numel(), N)
    if not y_RN.numel():
        return y_RN
    use_tma = tile.use_tma and weights.can_be_described() and launch.can_describe(a_RK, strides=(a_RK.stride(0),))
    a_desc = weight_desc = None
    if use_tma:
        weight_desc = weights.describe((1, 1, tile.block_n, tile.block_k))
        if gather_N is None:
            strides = [a_RK.stride(0), 1]
            a_desc = launch.describe(a_RK, list(a_RK.shape), strides, [tile.block_m, tile.block_k])
    num_tiles = schedule.tile_expert_M.numel() * launch.cdiv(N, tile.block_n)
    grouped_matmul_fwd_kernel[(launch.num_programs(a_RK.device, num_tiles, tile.per_sm),)](
        a_RK, a_desc, weights.tensor, weight_desc, bias_EN, y_RN, gather_N,
        schedule.offset_E1, schedule.tile_expert_M, schedule.tile_start_M, schedule.num_tiles_1,
        halves * launch.cdiv(K, tile.block_k), a_RK.stride(0), *weights.strides,
        N=N, K=K, HALVES=halves, GATHER=gather_N is not None, IS_K_INNER=weights.is_k_inner,
        USE_TMA=use_tma, FLATTEN=tile.flatten, SUB_TILES=tile.sub_tiles,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        **launch.formats(a_RK.dtype), **tile.launch_options(),
    )  # fmt: skip
    return y_RN


@triton.jit
def steps_of_program(offset_ptr, num_experts, PER_EXPERT: tl.constexpr, BLOCK_K: tl.constexpr, BINS: tl.constexpr):
    """Return how many steps of BLOCK_K rows the tiles program, program + programs, ... have: one or more each."""
    expert = tl.arange(0, BINS)
    is_expert = expert < num_experts
    start = tl.load(offset_ptr + expert, mask=is_expert, other=0)
    stop = tl.load(offset_ptr + expert + 1, mask=is_expert, other=0)
    steps = tl.maximum(tl.cdiv(stop - start, BLOCK_K), 1)
    # tiles below the first one of the next expert that are mine, less those below the first one of this expert
    before = tl.cdiv(tl.maximum(expert * PER_EXPERT - tl.program_id(0), 0), tl.num_programs(0))
    until = tl.cdiv(tl.maximum((expert + 1) * PER_EXPERT - tl.program_id(0), 0), tl.num_programs(0))
    return tl.sum(tl.where(is_expert, (until - before) * steps, 0))


@triton.jit(do_not_specialize=["num_experts"])
def grouped_matmul_bwd_weight_kernel(
    p_ptr,
    p_desc,
    q_ptr,
    q_desc,
    out_ptr,
    gather_ptr,
    offset_ptr,
    num_experts,
    stride_p,
    stride_q,
    stride_expert,
    stride_half,
    stride_m,
    M: tl.constexpr,
    N: tl.constexpr,
    HALVES: tl.constexpr,
    GATHER_P: tl.constexpr,
    GATHER_Q: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    USE_TMA: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[e, half, m, n] = sum over the rows r of expert e: p[r, half * M + m] * q[r, n]; zeros for an empty expert.

    One of p and q may be gathered. Sums run over a segment in order, so a result depends on its expert's rows alone.
    """
    NUM_M: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    NUM_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    PER_EXPERT: tl.constexpr = HALVES * NUM_M * NUM_N
    num_programs = tl.num_programs(0)
    lane_k = tl.arange(0, BLOCK_K)
    lane_m = tl.arange(0, BLOCK_M)
    lane_n = tl.arange(0, BLOCK_N)
    # one loop over the steps of all tiles of this program, so that the first loads of a tile are on their way while
    # the one before it is finished and stored; `flatten` of tl.range cannot join loops of which the inner one differs
    tile = tl.program_id(0) - num_programs
    step = 0
    num_steps = 0
    half = 0
    expert = 0
    start = 0
    stop = 0
    first_m = 0
    first_n = 0
    token = lane_k
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for _ in range(0, steps_of_program(offset_ptr, num_experts, PER_EXPERT, BLOCK_K, BINS)):
        step = tl.where(step + 1 >= num_steps, 0, step + 1)
        if step == 0:
            tile += num_programs
            expert = tile // PER_EXPERT
            within = tile % PER_EXPERT
            half = within // (NUM_M * NUM_N)
            first_m = within // NUM_N % NUM_M * BLOCK_M
            first_n = within % NUM_N * BLOCK_N
            start = tl.load(offset_ptr + expert)
            stop = tl.load(offset_ptr + expert + 1)
            num_steps = tl.maximum(tl.cdiv(stop - start, BLOCK_K), 1)
            token = start + lane_k
            if GATHER_P or GATHER_Q:
                token = tl.load(gather_ptr + token, mask=token < stop, other=0)
        r = start + step * BLOCK_K
        # both operands are masked: the next expert's rows must not count, and 0 * NaN is NaN
        is_k = (r + lane_k < stop)[:, None]
        row_p = r + lane_k
        row_q = row_p
        if GATHER_P:
            row_p = token
        if GATHER_Q:
            row_q = token
        if USE_TMA and not GATHER_P:
            p = load_segment(p_desc, start, stop - start, step * BLOCK_K, half * M + first_m)
        else:
            p_place = p_ptr + (half * M + first_m + lane_m)[None, :] + row_p.to(tl.int64)[:, None] * stride_p
            p = tl.load(p_place, mask=is_k & (first_m + lane_m < M)[None, :], other=0.0)
        if USE_TMA and not GATHER_Q:
            q = load_segment(q_desc, start, stop - start, step * BLOCK_K, first_n)
        else:
            q_place = q_ptr + (first_n + lane_n)[None, :] + row_q.to(tl.int64)[:, None] * stride_q
            q = tl.load(q_place, mask=is_k & (first_n + lane_n < N)[None, :], other=0.0)
        if GATHER_P or GATHER_Q:
            # one step ahead: looked up in the step that uses them, tokens would take a stage of the pipeline
            following = r + BLOCK_K + lane_k
            token = tl.load(gather_ptr + following, mask=following < stop, other=0)
        acc = tl.dot(p.T, q, acc, input_precision=PRECISION, out_dtype=ACC)
        if step == num_steps - 1:
            m = first_m + lane_m
            n = first_n + lane_n
            out_row_ptr = out_ptr + expert.to(tl.int64) * stride_expert + half.to(tl.int64) * stride_half
            place = out_row_ptr + m.to(tl.int64)[:, None] * stride_m + n[None, :]
            mask = (m < M)[:, None] & (n < N)[None, :]
            if ACCUMULATE:
                acc += tl.load(place, mask=mask, other=0.0).to(ACC)
            tl.store(place, acc.to(out_ptr.dtype.element_ty), mask=mask)
            acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)


def grouped_matmul_bwd_weight(
    p_RM: Tensor,
    q_RN: Tensor,
    out: Weights,
    schedule: Schedule,
    tile: Tile,
    *,
    gather_p: bool = False,
    gather_q: bool = False,
    accumulate: bool = False,
) -> None:
    """Write out[e, half, m, n] = sum over e's rows: p[r, half * M + m] * q[r, n], or add it if `accumulate`.

    `gather_p` or `gather_q`: that operand is indexed by token and not in expert order. out's last stride is 1.
    """
    E, halves, M, N = out.shape
    assert out.strides[3] == 1
    if not out.tensor.numel():
        return
    # a box that crosses M reads columns of the next half, or zeros: those rows of the product are not stored
    contiguous = [rows for rows, is_gathered in ((p_RM, gather_p), (q_RN, gather_q)) if not is_gathered]
    use_tma = tile.use_tma and all(launch.can_describe(rows, strides=(rows.stride(0),)) for rows in contiguous)
    p_desc = q_desc = None
    if use_tma and not gather_p:
        p_desc = launch.describe_segments(p_RM, [tile.block_k, tile.block_m])
    if use_tma and not gather_q:
        q_desc = launch.describe_segments(q_RN, [tile.block_k, tile.block_n])
    num_tiles = E * halves * launch.cdiv(M, tile.block_m) * launch.cdiv(N, tile.block_n)
    # without a loop over tiles the hardware deals them out as programs end, which evens out ragged sums
    grid = launch.num_programs(p_RM.device, num_tiles, tile.per_sm) if tile.flatten else num_tiles
    grouped_matmul_bwd_weight_kernel[(grid,)](
        p_RM, p_desc, q_RN, q_desc, out.tensor, schedule.token_N, schedule.offset_E1, E,
        p_RM.stride(0), q_RN.stride(0), *out.strides[:3],
        M=M, N=N, HALVES=halves, GATHER_P=gather_p, GATHER_Q=gather_q, ACCUMULATE=accumulate,
        USE_TMA=use_tma, BINS=triton.next_power_of_2(E),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        **launch.formats(p_RM.dtype), **tile.launch_options(),
    )  # fmt: skip


@triton.jit
def segment_sum_kernel(
    a_ptr,
    scale_ptr,
    row_ptr,
    token_ptr,
    offset_ptr,
    out_ptr,
    stride_a,
    W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[e, w] = sum over the rows r of expert e: a[r, w], or scale[row] * a[token, w]; in order, unmeasured."""
    expert = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    start = tl.load(offset_ptr + expert)
    stop = tl.load(offset_ptr + expert + 1)
    acc = tl.zeros((BLOCK_R, BLOCK_W), ACC)
    for begin in range(start, stop, BLOCK_R):
        position = begin + tl.arange(0, BLOCK_R)
        is_row = position < stop
        row = position
        if scale_ptr is not None:
            row = tl.load(token_ptr + position, mask=is_row, other=0)
        mask = is_row[:, None] & (column < W)[None, :]
        a = tl.load(a_ptr + row.to(tl.int64)[:, None] * stride_a + column[None, :], mask=mask, other=0.0).to(ACC)
        if scale_ptr is not None:
            routed = tl.load(row_ptr + position, mask=is_row, other=0)
            a = a * tl.load(scale_ptr + routed, mask=is_row, other=0.0).to(ACC)[:, None]
        acc += a
    place = out_ptr + expert.to(tl.int64) * W + column
    tl.store(place, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=column < W)


def segment_sum(a_RW: Tensor, schedule: Schedule, *, scale_N: Tensor | None = None) -> Tensor:
    """Return [E, W], the sum of each expert's rows of a; with `scale_N`, of its tokens' rows times their weights."""
    E, W = schedule.offset_E1.numel() - 1, a_RW.shape[1]
    out_EW = torch.empty(E, W, dtype=a_RW.dtype, device=a_RW.device)
    block_w = min(128, triton.next_power_of_2(W))
    segment_sum_kernel[(E, launch.cdiv(W, block_w))](
        a_RW, scale_N, schedule.row_N, schedule.token_N, schedule.offset_E1, out_EW, a_RW.stride(0),
        W=W, BLOCK_R=16, BLOCK_W=block_w, ACC=launch.formats(a_RW.dtype)["ACC"],
    )  # fmt: skip
    return out_EW
