"""The CPU default: one autograd.Function over the rows sorted by expert, dense products segment by segment.

For the backward pass it keeps x and H (the products before the activation, N x 2F) and nothing else of that
size; with saved="X" it keeps x alone and computes H again. The gradient of a row's weight is
<dy_t, Y_n> = <W2^T dy_t, A_n> + <dy_t, b2>, so the experts' outputs Y need not be kept, and A is computed again
from H. The dataflow is SonicMoE's (Dao-AILab/sonic-moe).

Letters as in moe_kernels.activation, and: n rows of one segment, p the same rows padded, P of the longest one, R rows
in use.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.activation import activate, activate_backward, join_halves
from moe_kernels.backends import BACKENDS, PLAIN
from moe_kernels.grouping import group_rows
from moe_kernels.shapes import check_shapes
from moe_kernels.spec import ExpertSpec

# Numbers per thread in one step of what is not a product: longer temporaries leave the caches, and glibc hands them
# back to the system, which clears their pages anew. The activation backward of 2,000 rows, F = 256, in ms of CPU time
# at once / as 8 blocks of 256 rows: float32 2.9 / 1.3, bfloat16 10.2 / 1.6 (EPYC, 1 thread, torch 2.13, 2026-11).
# Cut at 2**16, where segments of 128 to 256 rows are already cut, forward passes were 3 to 5 % slower.
BLOCK = 2**18


class SegmentsBackend:
    """Sorts the rows by expert and runs each expert's segment with dense products. CPU only."""

    def refusal(
        self, *, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...] = (), spec: ExpertSpec = PLAIN
    ) -> str | None:
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
        spec: ExpertSpec = PLAIN,
        gate_up_bias_E2F: Tensor | None = None,
        down_bias_ED: Tensor | None = None,
    ) -> Tensor:
        E, _, _ = check_shapes(x_TD, gate_up_E2FD, down_EDF, spec, gate_up_bias_E2F, down_bias_ED)
        grouping = group_rows(expert_N, E)
        bounds = grouping.offsets_E1.tolist()
        row_R = grouping.order_N[: bounds[-1]]
        inputs = (x_TD, weight_N, gate_up_E2FD, down_EDF, gate_up_bias_E2F, down_bias_ED)
        is_training = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
        return _Segments.apply(*inputs, token_N[row_R], row_R, bounds, spec, is_training)


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


def _each(segments: list[_Segment], *tensors_R: Tensor) -> Iterable[tuple[Any, ...]]:
    """Return every segment with its own rows of the tensors."""
    counts = [segment.stop - segment.start for segment in segments]
    return zip(segments, *(tensor.split(counts) for tensor in tensors_R), strict=True)


def _blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Return tensors of as many rows, cut alike into blocks of rows that stay in the caches of the threads."""
    step = max(1, BLOCK * torch.get_num_threads() // tensors[0].shape[1])
    if tensors[0].shape[0] <= step:
        return (tensors,)
    return zip(*(tensor.split(step) for tensor in tensors), strict=True)


def _gather(rows_TD: Tensor, token_n: Tensor, out_pD: Tensor) -> Tensor:
    """Write the rows of `token_n` to the top of out_pD, zeros below, and return out_pD."""
    count = token_n.numel()
    if count == out_pD.shape[0]:
        return torch.index_select(rows_TD, 0, token_n, out=out_pD)
    torch.index_select(rows_TD, 0, token_n, out=out_pD[:count])
    out_pD[count:].zero_()
    return out_pD


def _out_in(weight_E: Tensor, spec: ExpertSpec) -> Tensor:
    """Return a view of expert weights or of their gradient as [E, outputs, inputs]."""
    return weight_E if spec.weights == "out_in" else weight_E.mT


def _product(in_pI: Tensor, weight_OI: Tensor, bias_EO: Tensor | None, expert: int, out_pO: Tensor) -> Tensor:
    """Write the product of one expert's weight, plus its bias, to out_pO, rounded once, and return out_pO."""
    if bias_EO is None:
        return torch.mm(in_pI, weight_OI.mT, out=out_pO)
    return torch.addmm(bias_EO[expert], in_pI, weight_OI.mT, out=out_pO)


def _weight_gradient(dout_pO: Tensor, in_pI: Tensor, gradient_E: Tensor, expert: int, spec: ExpertSpec) -> None:
    """Write the gradient of one expert's weight, [outputs, inputs] or the other way round, as the weight lies."""
    left_pA, right_pB = (dout_pO, in_pI) if spec.weights == "out_in" else (in_pI, dout_pO)
    torch.mm(left_pA.mT, right_pB, out=gradient_E[expert])


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
        gate_up_bias_E2F: Tensor | None,
        down_bias_ED: Tensor | None,
        token_R: Tensor,
        row_R: Tensor,
        bounds: list[int],
        spec: ExpertSpec,
        is_training: bool,
    ) -> Tensor:
        segments = _cut(bounds, x_TD.dtype)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        weight_R1 = weight_N[row_R].unsqueeze(1)
        first_EHD, second_EDF = _out_in(gate_up_E2FD, spec), _out_in(down_EDF, spec)
        longest = max((segment.padded for segment in segments), default=0)
        x_PD, y_PD = x_TD.new_empty(longest, x_TD.shape[1]), x_TD.new_empty(longest, x_TD.shape[1])
        a_PF = x_TD.new_empty(longest, second_EDF.shape[2])
        # A padded product runs past the end of its segment, and the next segment writes over that: H holds
        # R rows and a short tail, without gaps. Where nobody needs H, all segments share its first rows.
        keeps_h = is_training and spec.saved == "H"
        h_end = max((segment.start + segment.padded for segment in segments), default=0)
        h_RH = x_TD.new_empty(h_end if keeps_h else longest, first_EHD.shape[1])
        y_TD = torch.zeros(x_TD.shape, dtype=wide, device=x_TD.device)
        first_OI, second_OI = first_EHD.unbind(), second_EDF.unbind()
        for (expert, start, stop, padded), token_n, weight_n1 in _each(segments, token_R, weight_R1):
            h_start = start if keeps_h else 0
            h_pH, a_pF, y_pD = h_RH[h_start : h_start + padded], a_PF[:padded], y_PD[:padded]
            x_pD = _gather(x_TD, token_n, x_PD[:padded])
            _product(x_pD, first_OI[expert], gate_up_bias_E2F, expert, h_pH)
            for h_bH, a_bF in _blocks(h_pH, a_pF):
                activate(join_halves(h_bH, spec).to(wide), spec, out_NF=a_bF)
            _product(a_pF, second_OI[expert], down_bias_ED, expert, y_pD)
            # the same order on every run: experts ascending, and within a segment CPU torch adds in row order
            for y_bD, token_b, weight_b1 in _blocks(y_pD[: stop - start], token_n, weight_n1):
                y_TD.index_add_(0, token_b, y_bD.to(wide).mul_(weight_b1))
        if is_training:
            inputs = (x_TD, weight_N, gate_up_E2FD, down_EDF, gate_up_bias_E2F, down_bias_ED)
            ctx.save_for_backward(*inputs, h_RH if keeps_h else None, token_R, row_R)
            ctx.bounds, ctx.spec = bounds, spec
        return y_TD.to(x_TD.dtype)

    @staticmethod
    @once_differentiable  # which hides the names of the arguments from pyright
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy_TD: Tensor
    ) -> tuple[Tensor | None, ...]:
        x_TD, weight_N, gate_up_E2FD, down_EDF, gate_up_bias_E2F, down_bias_ED, h_RH, token_R, row_R = ctx.saved_tensors
        spec, bounds = ctx.spec, ctx.bounds
        segments = _cut(bounds, x_TD.dtype)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        weight_R1 = weight_N[row_R].unsqueeze(1)
        first_EHD, second_EDF = _out_in(gate_up_E2FD, spec), _out_in(down_EDF, spec)
        longest = max((segment.padded for segment in segments), default=0)
        D, F = second_EDF.shape[1:]
        x_PD, dy_PD = x_TD.new_empty(longest, D), x_TD.new_empty(longest, D)
        a_PF, da_PF = x_TD.new_empty(longest, F), x_TD.new_empty(longest, F)
        h_PH, dh_PH = (x_TD.new_empty(longest, spec.halves * F) for _ in range(2))
        needs_x, _, *needs_parameters = ctx.needs_input_grad[:6]
        parameters = (gate_up_E2FD, down_EDF, gate_up_bias_E2F, down_bias_ED)
        dx_TD = torch.zeros(x_TD.shape, dtype=wide, device=x_TD.device) if needs_x else None
        dparameters = [
            _new_gradient(parameter_E, bounds) if needs else None
            for parameter_E, needs in zip(parameters, needs_parameters, strict=True)
        ]
        dgate_up_E, ddown_E, dgate_up_bias_EH, ddown_bias_ED = dparameters
        dweight_R = torch.empty(row_R.numel(), dtype=wide, device=x_TD.device)
        first_OI, second_OI = first_EHD.unbind(), second_EDF.unbind()
        for (expert, start, stop, padded), token_n, weight_n1, dweight_n in _each(
            segments, token_R, weight_R1, dweight_R
        ):
            count = stop - start
            x_pD, a_pF, dh_pH = x_PD[:padded], a_PF[:padded], dh_PH[:padded]
            if h_RH is None:
                _gather(x_TD, token_n, x_pD)
                h_nH = _product(x_pD, first_OI[expert], gate_up_bias_E2F, expert, h_PH[:padded])[:count]
            else:
                h_nH = h_RH[start:stop]
            dy_pD = _gather(dy_TD, token_n, dy_PD[:padded])
            # W2^T dy, without the row's weight: what the weight's own gradient is made of
            da_pF = torch.mm(dy_pD, second_OI[expert], out=da_PF[:padded])
            for h_bH, da_bF, weight_b1, a_bF, dh_bH, dweight_b in _blocks(
                h_nH, da_pF[:count], weight_n1, a_pF[:count], dh_pH[:count], dweight_n
            ):
                da_bF = da_bF.to(wide)
                again_bF, _ = activate_backward(da_bF * weight_b1, join_halves(h_bH, spec).to(wide), spec, out_NH=dh_bH)
                torch.sum(da_bF.mul_(again_bF), 1, out=dweight_b)
                torch.mul(again_bF, weight_b1, out=a_bF)
            if down_bias_ED is not None:
                dweight_n += dy_pD[:count].to(wide) @ down_bias_ED[expert].to(wide)
            # rows past the segment must be zero, as the products below sum over the rows
            if padded > count:
                a_pF[count:] = 0
                dh_pH[count:] = 0
            if ddown_E is not None:
                _weight_gradient(dy_pD, a_pF, ddown_E, expert, spec)
            if ddown_bias_ED is not None:
                ddown_bias_ED[expert] = dy_pD[:count].to(wide).mT @ weight_n1.squeeze(1)
            if dgate_up_bias_EH is not None:
                dgate_up_bias_EH[expert] = dh_pH[:count].sum(0, dtype=wide)
            if dgate_up_E is not None:
                x_pD = x_pD if h_RH is None else _gather(x_TD, token_n, x_pD)
                _weight_gradient(dh_pH, x_pD, dgate_up_E, expert, spec)
            if dx_TD is not None:
                torch.mm(dh_pH, first_OI[expert], out=x_pD)
                for dx_bD, token_b in _blocks(x_pD[:count], token_n):
                    dx_TD.index_add_(0, token_b, dx_bD.to(wide))
        dweight_N = torch.zeros_like(weight_N)
        dweight_N[row_R] = dweight_R.to(weight_N.dtype)
        dx_TD = None if dx_TD is None else dx_TD.to(x_TD.dtype)
        return dx_TD, dweight_N, *dparameters, None, None, None, None, None
