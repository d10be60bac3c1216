"""The CPU default: one autograd.Function over the rows sorted by expert, dense products segment by segment.

For the backward pass it keeps x and H (the products before the activation, N x 2F) and nothing else of that
size. The gradient of a row's weight is <dy_t, Y_n> = <W2^T dy_t, A_n>, so the experts' outputs Y need not be
kept, and A = silu(gate) * up is computed again from H. The dataflow is SonicMoE's (Dao-AILab/sonic-moe).
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.backends import BACKENDS
from moe_kernels.grouping import group_rows


class SegmentsBackend:
    """Sorts the rows by expert and runs each expert's segment with dense products. CPU only."""

    def refusal(self, *, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...] = ()) -> str | None:
        if device.type != "cpu":
            return "it reads the segment bounds on the host and is written for CPUs; use 'auto' or 'naive'"
        return None

    def __call__(
        self,
        x_TD: Tensor,
        token_N: Tensor,
        expert_N: Tensor,
        weight_N: Tensor,
        gate_up_E2FD: Tensor,
        down_EDF: Tensor,
        *,
        fan_out: int | None,
    ) -> Tensor:
        grouping = group_rows(expert_N, gate_up_E2FD.shape[0])
        bounds = grouping.offsets_E1.tolist()
        row_R = grouping.order_N[: bounds[-1]]
        inputs = (x_TD, weight_N, gate_up_E2FD, down_EDF)
        is_training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        return _Segments.apply(*inputs, token_N[row_R], row_R, bounds, is_training)


BACKENDS.register("segments")(SegmentsBackend())


class _Segment(NamedTuple):
    """The rows start..stop-1 of one expert. Products run on `padded` rows, of which the last do not count."""

    expert: int
    start: int
    stop: int
    padded: int


def padded_rows(count: int, dtype: torch.dtype) -> int:
    """Return how many rows the products of a segment of `count` rows run on: `count`, or more in bfloat16.

    oneDNN compiles a kernel for every row count it has not met, and routing makes new counts at every step.
    So counts are rounded up to multiples of 16, above 128 of an eighth of the power of two they lie under.
    """
    # GFLOP/s of the first pass over 192 fresh counts (forward, dX and dW products, weights 512 x 256, in the last two
    # columns 512 x 512; per second of CPU time; EPYC with avx512_bf16 and without AMX, 1 thread, torch 2.13, 2026-11):
    #   counts from..to               1..24   20..90   60..200   150..380   400..2000
    #   bfloat16, as they are            26       44        65        139         163
    #   bfloat16, rounded up             46      110       143        175         177
    #   float32 (MKL), as they are       41       73        79         91          88
    #   float32, multiples of 16         30       63        76         89          84
    if dtype != torch.bfloat16:
        return count
    step = 16
    while step * 8 < count:
        step *= 2
    return -(-count // step) * step


def _cut(bounds: list[int], dtype: torch.dtype) -> list[_Segment]:
    """Return the segments that have rows, in order."""
    return [
        _Segment(expert, start, stop, padded_rows(stop - start, dtype))
        for expert, (start, stop) in enumerate(pairwise(bounds))
        if start < stop
    ]


def _gather(rows_TD: Tensor, token_n: Tensor, out_PD: Tensor) -> Tensor:
    """Write the rows of `token_n` to the top of out_PD, zeros below, and return out_PD."""
    count = token_n.numel()
    torch.index_select(rows_TD, 0, token_n, out=out_PD[:count])
    out_PD[count:].zero_()
    return out_PD


def _gate_up(h_n2F: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gate_nF, up_nF = h_n2F.to(dtype).chunk(2, dim=1)
    return gate_nF, up_nF


def _new_gradient(weight_E: Tensor, bounds: list[int]) -> Tensor:
    """Return an empty buffer for the gradient of expert weights, zero already where an expert has no rows."""
    gradient_E = torch.empty(weight_E.shape, dtype=weight_E.dtype, device=weight_E.device)
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        if start == stop:
            gradient_E[expert].zero_()
    return gradient_E


class _Segments(torch.autograd.Function):
    """The whole layer, forward and backward.

    The R rows in use are sorted by expert: row_R says which of the N they are, token_R which of x they read,
    and expert e owns those from bounds[e] to bounds[e + 1].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_N: Tensor,
        gate_up_E2FD: Tensor,
        down_EDF: Tensor,
        token_R: Tensor,
        row_R: Tensor,
        bounds: list[int],
        is_training: bool,
    ) -> Tensor:
        segments = _cut(bounds, x_TD.dtype)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        weight_R1 = weight_N[row_R].unsqueeze(1)
        longest = max((segment.padded for segment in segments), default=0)
        x_PD, y_PD = x_TD.new_empty(longest, x_TD.shape[1]), x_TD.new_empty(longest, x_TD.shape[1])
        a_PF = x_TD.new_empty(longest, down_EDF.shape[2])
        # A padded product runs past the end of its segment, and the next segment writes over that: H holds
        # R rows and a short tail, without gaps. Where nobody needs H, all segments share its first rows.
        h_end = max((segment.start + segment.padded for segment in segments), default=0)
        h_R2F = x_TD.new_empty(h_end if is_training else longest, gate_up_E2FD.shape[1])
        y_TD = torch.zeros(x_TD.shape, dtype=wide, device=x_TD.device)
        for expert, start, stop, padded in segments:
            h_start = start if is_training else 0
            h_p2F = h_R2F[h_start : h_start + padded]
            torch.mm(_gather(x_TD, token_R[start:stop], x_PD[:padded]), gate_up_E2FD[expert].mT, out=h_p2F)
            gate_pF, up_pF = _gate_up(h_p2F, wide)
            a_PF[:padded] = gate_pF * torch.sigmoid(gate_pF) * up_pF
            torch.mm(a_PF[:padded], down_EDF[expert].mT, out=y_PD[:padded])
            # the same order on every run: experts ascending, and within a segment CPU torch adds in row order
            y_TD.index_add_(0, token_R[start:stop], y_PD[: stop - start] * weight_R1[start:stop])
        if is_training:
            ctx.save_for_backward(x_TD, weight_N, gate_up_E2FD, down_EDF, h_R2F, token_R, row_R)
            ctx.bounds = bounds
        return y_TD.to(x_TD.dtype)

    @staticmethod
    @once_differentiable  # which hides the names of the arguments from pyright
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy_TD: Tensor
    ) -> tuple[Tensor | None, ...]:
        x_TD, weight_N, gate_up_E2FD, down_EDF, h_R2F, token_R, row_R = ctx.saved_tensors
        needs_x, _, needs_gate_up, needs_down = ctx.needs_input_grad[:4]
        segments = _cut(ctx.bounds, x_TD.dtype)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        weight_R1 = weight_N[row_R].unsqueeze(1)
        longest = max((segment.padded for segment in segments), default=0)
        D, F = down_EDF.shape[1:]
        x_PD, dy_PD = x_TD.new_empty(longest, D), x_TD.new_empty(longest, D)
        a_PF, da_PF, dh_P2F = (x_TD.new_empty(longest, width) for width in (F, F, 2 * F))
        dx_TD = torch.zeros(x_TD.shape, dtype=wide, device=x_TD.device) if needs_x else None
        dgate_up_E2FD = _new_gradient(gate_up_E2FD, ctx.bounds) if needs_gate_up else None
        ddown_EDF = _new_gradient(down_EDF, ctx.bounds) if needs_down else None
        dweight_N = torch.zeros_like(weight_N)
        for expert, start, stop, padded in segments:
            count, token_n, weight_n1 = stop - start, token_R[start:stop], weight_R1[start:stop]
            dy_pD = _gather(dy_TD, token_n, dy_PD[:padded])
            # W2^T dy, without the row's weight: what the weight's own gradient is made of
            da_nF = torch.mm(dy_pD, down_EDF[expert], out=da_PF[:padded])[:count].to(wide)
            gate_nF, up_nF = _gate_up(h_R2F[start:stop], wide)
            sigmoid_nF = torch.sigmoid(gate_nF)
            silu_nF = gate_nF * sigmoid_nF
            a_nF = silu_nF * up_nF
            dweight_N[row_R[start:stop]] = (da_nF * a_nF).sum(1).to(weight_N.dtype)
            da_nF = da_nF * weight_n1
            # rows past the segment must be zero, as the products below sum over the rows
            a_PF[:count] = a_nF * weight_n1
            a_PF[count:padded] = 0
            dh_P2F[:count, :F] = da_nF * up_nF * (sigmoid_nF + silu_nF * (1 - sigmoid_nF))
            dh_P2F[:count, F:] = da_nF * silu_nF
            dh_P2F[count:padded] = 0
            if ddown_EDF is not None:
                torch.mm(dy_pD.mT, a_PF[:padded], out=ddown_EDF[expert])
            if dgate_up_E2FD is not None:
                x_pD = _gather(x_TD, token_n, x_PD[:padded])
                torch.mm(dh_P2F[:padded].mT, x_pD, out=dgate_up_E2FD[expert])
            if dx_TD is not None:
                dx_pD = torch.mm(dh_P2F[:padded], gate_up_E2FD[expert], out=x_PD[:padded])
                dx_TD.index_add_(0, token_n, dx_pD[:count].to(wide))
        dx_TD = None if dx_TD is None else dx_TD.to(x_TD.dtype)
        return dx_TD, dweight_N, dgate_up_E2FD, ddown_EDF, None, None, None, None
