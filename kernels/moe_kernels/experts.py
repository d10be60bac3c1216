"""The fused expert MLP as torch operations, with shapes for tracing and gradients, so that torch.compile takes them.

    forward    up        H = x W1^T (rows gathered on load), A = act(H)          experts_up, one kernel
               down      Y = A W2^T                                              grouped_gemm
               combine   y_t = sum of weight * Y over the rows of t              combine
    backward   down_bwd  dA' = dy W2 (rows gathered on load), and behind it
                         dH = act'(H) weight dA', A' = weight act(H), <dA', A>   experts_down_bwd, one kernel
               dW2 = dy^T A', dX = dH W1, dW1 = dH^T x                           grouped_gemm, combine

Neither Y nor a gathered copy of x or dy is ever kept: x, H, the weights and the schedule are all the backward pass
needs. The dataflow is SonicMoE's (arXiv 2512.14080), here in portable Triton, without padding, host syncs or atomics:
shapes depend on T, N and E alone, so a CUDA graph can hold it and be replayed with other routing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_kernels import combine, launch, route
from moe_kernels.combine import TokenRows
from moe_kernels.experts_down_bwd import down_bwd
from moe_kernels.experts_up import up
from moe_kernels.grouped_gemm import Weights, grouped_matmul, grouped_matmul_bwd_weight, segment_sum
from moe_kernels.route import Schedule
from moe_kernels.spec import PLAIN, ExpertSpec
from moe_kernels.tiles import Tile, block_m_of, choose, table


@dataclass(frozen=True, kw_only=True, slots=True)
class Routed:
    """Rows by expert and by token, ready for kernels. `tiles` names the entry of tiles.json that made the schedule."""

    schedule: Schedule
    rows: TokenRows
    tiles: str


@torch.library.custom_op("moe_kernels::schedule_rows", mutates_args=())
def schedule_rows(
    token_N: Tensor, expert_N: Tensor, num_experts: int, block_m: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the tensors of a Schedule, in the order of its fields."""
    schedule = route.schedule_rows(token_N.contiguous(), expert_N.contiguous(), num_experts, block_m=block_m)
    return tuple(schedule.tensors())  # pyright: ignore[reportReturnType]


@schedule_rows.register_fake
def _(token_N: Tensor, expert_N: Tensor, num_experts: int, block_m: int) -> tuple[Tensor, ...]:
    num_rows = expert_N.numel()
    tiles = route.max_tiles(num_rows, num_experts, block_m)
    sizes = (num_experts + 1, num_rows, num_rows, num_rows, tiles, tiles, 1)
    return tuple(expert_N.new_empty(size, dtype=torch.int32) for size in sizes)


def route_rows(
    token_N: Tensor,
    expert_N: Tensor,
    *,
    num_tokens: int,
    num_experts: int,
    fan_out: int | None,
    itemsize: int,
    tiles: str | None = None,
) -> Routed:
    """Return the rows (token, expert), ordered for kernels whose elements have `itemsize` bytes.

    Args:
        fan_out: K if rows t*K..t*K+K-1 are those of token t; None if ragged.
        tiles: name of an entry of tiles.json; None chooses by device, itemsize and mean load.
    """
    if tiles is None:
        arch = launch.arch_of(expert_N.device)
        tiles = choose(arch=arch, itemsize=itemsize, num_rows=expert_N.numel(), num_experts=num_experts)
    tensors = schedule_rows(token_N, expert_N, num_experts, block_m_of(tiles))
    rows = combine.rows_of_tokens(token_N, expert_N, num_tokens=num_tokens, num_experts=num_experts, fan_out=fan_out)
    return Routed(schedule=Schedule.of(tensors), rows=rows, tiles=tiles)


def first_weights(gate_up_E2FD: Tensor, spec: ExpertSpec) -> Weights:
    """Return the first weight, in whatever layout, as [E, halves, F, D]."""
    e, n, k = gate_up_E2FD.stride()
    E, outputs, D = gate_up_E2FD.shape
    if spec.weights == "in_out":
        outputs, D, n, k = D, outputs, k, n
    F = outputs // spec.halves
    return Weights(gate_up_E2FD, (E, spec.halves, F, D), (e, n, 2 * n, k) if spec.is_interleaved else (e, F * n, n, k))


def whole_weights(gate_up_ED2F: Tensor) -> Weights:
    """Return a first weight [E, D, 2F] as [E, 1, D, 2F]: gate and up outputs together, in the order of memory."""
    E, D, outputs = gate_up_ED2F.shape
    e, n, k = gate_up_ED2F.stride()
    return Weights(gate_up_ED2F, (E, 1, D, outputs), (e, D * n, n, k))


def second_weights(down_EDF: Tensor, spec: ExpertSpec) -> Weights:
    """Return the second weight, in whatever layout, as [E, 1, D, F]."""
    E, D, F = down_EDF.shape
    e, n, k = down_EDF.stride()
    if spec.weights == "in_out":
        D, F, n, k = F, D, k, n
    return Weights(down_EDF, (E, 1, D, F), (e, D * n, n, k))


@torch.library.custom_op("moe_kernels::experts_fwd", mutates_args=())
def experts_fwd(
    x_TD: Tensor,
    weight_N: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    gate_up_bias_E2F: Tensor | None,
    down_bias_ED: Tensor | None,
    schedule: list[Tensor],
    first_T1: Tensor | None,
    row_N: Tensor | None,
    fan_out: int | None,
    spec: str,
    tiles: str,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """Return (y_TD, H [N, halves * F] in expert order, or [0] if it is not kept)."""
    plan, form, entry = Schedule.of(schedule), ExpertSpec.parse(spec), table()[tiles].tiles
    h_NH, a_NF = up(
        x_TD,
        first_weights(gate_up_E2FD, form),
        plan,
        entry["up"],
        spec=form,
        bias_EH=gate_up_bias_E2F,
        keep_hidden=keep_hidden,
    )
    down = second_weights(down_EDF, form)
    y_ND = grouped_matmul(a_NF, down, plan, entry["matmul"], bias_EN=down_bias_ED)
    rows = TokenRows(fan_out=fan_out, first_T1=first_T1, row_N=row_N)
    return combine.combine(y_ND, plan.position_N, rows, num_tokens=x_TD.shape[0], weight_N=weight_N), h_NH


@experts_fwd.register_fake
def _(x_TD: Tensor, weight_N: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    spec, _, keep_hidden = rest[-3:]
    F = down_EDF.shape[2] if ExpertSpec.parse(spec).weights == "out_in" else down_EDF.shape[1]
    num_hidden = ExpertSpec.parse(spec).halves * F
    hidden = x_TD.new_empty((weight_N.shape[0], num_hidden) if keep_hidden else (0,))
    return torch.empty_like(x_TD, memory_format=torch.contiguous_format), hidden


@torch.library.custom_op("moe_kernels::experts_bwd", mutates_args=("gate_up_sum_E2FD", "down_sum_EDF"))
def experts_bwd(
    dy_TD: Tensor,
    x_TD: Tensor,
    weight_N: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    gate_up_bias_E2F: Tensor | None,
    down_bias_ED: Tensor | None,
    h_NH: Tensor,
    schedule: list[Tensor],
    first_T1: Tensor | None,
    row_N: Tensor | None,
    fan_out: int | None,
    spec: str,
    tiles: str,
    needs: list[bool],
    gate_up_sum_E2FD: Tensor | None,
    down_sum_EDF: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, gate_up, down and the two biases, [0] where `needs` says no.

    Given gate_up_sum or down_sum (float32), that weight's gradient is added to it, and [0] is returned in its place.
    """
    plan, form, entry = Schedule.of(schedule), ExpertSpec.parse(spec), table()[tiles].tiles
    needs_x, needs_weight, needs_gate_up, needs_down, needs_gate_up_bias, needs_down_bias = needs
    dx, dweight, dgate_up, ddown, dgate_up_bias, ddown_bias = (dy_TD.new_empty(0) for _ in range(6))
    first, second = first_weights(gate_up_E2FD, form), second_weights(down_EDF, form)
    dy_TD = dy_TD.contiguous()
    if form.saved == "X":
        h_NH, _ = up(
            x_TD, first, plan, entry["up"], spec=form, bias_EH=gate_up_bias_E2F, keep_hidden=True, keep_activated=False
        )
    dh_NH, a_NF, partial_NP = down_bwd(
        dy_TD, second.transposed(), h_NH, weight_N, plan, entry["down_bwd"], spec=form, bias_ED=down_bias_ED
    )
    if needs_weight:
        dweight = combine.weight_gradient(partial_NP, plan.position_N, dtype=weight_N.dtype)
    if needs_down:
        ddown = down_sum_EDF if down_sum_EDF is not None else _like(down_EDF)
        _down_gradient(dy_TD, a_NF, ddown, plan, entry["weight_bwd"], form, accumulate=down_sum_EDF is not None)
    if needs_down_bias:
        ddown_bias = segment_sum(dy_TD, plan, scale_N=weight_N)
    del a_NF, partial_NP
    if needs_x:
        # before dW1 is there: the rows of dX are the largest tensor of all, and gone once they are summed
        back = whole_weights(gate_up_E2FD) if form.is_paired else first.transposed()
        dx_ND = grouped_matmul(dh_NH, back, plan, entry["matmul"])
        rows = TokenRows(fan_out=fan_out, first_T1=first_T1, row_N=row_N)
        dx = combine.combine(dx_ND, plan.position_N, rows, num_tokens=x_TD.shape[0])
        del dx_ND
    if needs_gate_up:
        dgate_up, adds = gate_up_sum_E2FD, gate_up_sum_E2FD is not None
        dgate_up = _like(gate_up_E2FD) if dgate_up is None else dgate_up
        _gate_up_gradient(x_TD, dh_NH, dgate_up, plan, entry["weight_bwd"], form, accumulate=adds)
    if needs_gate_up_bias:
        dgate_up_bias = segment_sum(dh_NH, plan)
        if form.is_interleaved and not form.is_paired:
            dgate_up_bias = dgate_up_bias.unflatten(1, (2, -1)).mT.flatten(1)
    if gate_up_sum_E2FD is not None:
        dgate_up = dy_TD.new_empty(0)
    if down_sum_EDF is not None:
        ddown = dy_TD.new_empty(0)
    return dx, dweight, dgate_up, ddown, dgate_up_bias, ddown_bias


def _down_gradient(
    dy_TD: Tensor, a_NF: Tensor, out: Tensor, plan: Schedule, tile: Tile, spec: ExpertSpec, *, accumulate: bool
) -> None:
    """Write dW2 = dy^T A' to `out`; the operand whose columns run fastest in memory goes last."""
    weights = second_weights(out, spec)
    if spec.weights == "out_in":
        grouped_matmul_bwd_weight(dy_TD, a_NF, weights, plan, tile, gather_p=True, accumulate=accumulate)
    else:
        weights = weights.transposed()
        grouped_matmul_bwd_weight(a_NF, dy_TD, weights, plan, tile, gather_q=True, accumulate=accumulate)


def _gate_up_gradient(
    x_TD: Tensor, dh_NH: Tensor, out: Tensor, plan: Schedule, tile: Tile, spec: ExpertSpec, *, accumulate: bool
) -> None:
    """Write dW1 = dH^T x to `out`; dH's columns already stand in the order of [E, D, 2F] where that is the layout."""
    if spec.weights == "out_in":
        weights = first_weights(out, spec)
        grouped_matmul_bwd_weight(dh_NH, x_TD, weights, plan, tile, gather_q=True, accumulate=accumulate)
    else:
        weights = whole_weights(out)
        grouped_matmul_bwd_weight(x_TD, dh_NH, weights, plan, tile, gather_p=True, accumulate=accumulate)


def _like(weight: Tensor) -> Tensor:
    """Return an empty gradient for `weight`, contiguous whatever the weight is."""
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@experts_bwd.register_fake
def _(dy_TD: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    x_TD, weight_N, gate_up, down, gate_up_bias, down_bias = rest[:6]
    needs, sums = rest[-3], (None, None, *rest[-2:], None, None)
    tensors = (x_TD, weight_N, gate_up, down, gate_up_bias, down_bias)
    return tuple(
        _like(tensor) if is_needed and total is None else dy_TD.new_empty(0)
        for tensor, is_needed, total in zip(tensors, needs, sums, strict=True)
    )


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, gate_up, down, gate_up_bias, down_bias, schedule, first_T1, row_N, fan_out, spec, tiles, _ = inputs
    biases = (gate_up_bias, down_bias)
    ctx.save_for_backward(x, weight, gate_up, down, *biases, output[1], first_T1, row_N, *schedule)
    ctx.fan_out, ctx.spec, ctx.tiles = fan_out, spec, tiles
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy_TD: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    x, weight, gate_up, down, gate_up_bias, down_bias, h_NH, first_T1, row_N, *schedule = ctx.saved_tensors
    if dy_TD is None:
        return (None,) * 13
    needs = list(ctx.needs_input_grad[:6])
    gradients = experts_bwd(
        dy_TD, x, weight, gate_up, down, gate_up_bias, down_bias, h_NH,
        schedule, first_T1, row_N, ctx.fan_out, ctx.spec, ctx.tiles, needs, None, None,
    )  # fmt: skip
    wanted = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    return (*wanted, [None] * len(schedule), *(None,) * 6)


experts_fwd.register_autograd(_backward, setup_context=_save)


def experts(
    x_TD: Tensor,
    weight_N: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    routed: Routed,
    *,
    spec: ExpertSpec = PLAIN,
    gate_up_bias_E2F: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
) -> Tensor:
    """Return y_TD: y_t = sum over the rows n of token t: weight_n * expert_n(x_t), in the dtype of x.

    Differentiable in x, weight, both expert weights and both biases, once. Deterministic to the bit. For the backward
    pass it keeps x, H (4 N F bytes in bfloat16; nothing with spec.saved == "X"), the weights and the schedule.
    Under autocast tokens, expert weights and biases are cast; weight_N stays in float32.
    """
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_TD, gate_up_E2FD, down_EDF = (tensor.to(dtype) for tensor in (x_TD, gate_up_E2FD, down_EDF))
        gate_up_bias_E2F = None if gate_up_bias_E2F is None else gate_up_bias_E2F.to(dtype)
        down_bias_ED = None if down_bias_ED is None else down_bias_ED.to(dtype)
    if x_TD.stride(-1) != 1:
        x_TD = x_TD.contiguous()
    leaves = (x_TD, weight_N, gate_up_E2FD, down_EDF, gate_up_bias_E2F, down_bias_ED)
    is_training = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
    rows = routed.rows
    y_TD, _ = experts_fwd(
        x_TD, weight_N.contiguous(), gate_up_E2FD, down_EDF,
        None if gate_up_bias_E2F is None else gate_up_bias_E2F.contiguous(),
        None if down_bias_ED is None else down_bias_ED.contiguous(),
        routed.schedule.tensors(), rows.first_T1, rows.row_N, rows.fan_out, spec.name, routed.tiles,
        is_training and spec.saved == "H",
    )  # fmt: skip
    return y_TD
