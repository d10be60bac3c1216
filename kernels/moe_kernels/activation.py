"""The activations of an expert in plain torch, forward and backward, and the order of their two halves.

Letters: N rows, F expert hidden width, H width of the product before the activation (2F where the activation is
gated, else F). The formulas are those in moe_kernels.spec; the backward ones follow torch where a derivative jumps:
a clamp passes the gradient at its limit, a relu does not at zero.
"""

import torch
from torch import Tensor
from torch.nn import functional

from moe_kernels.spec import GPT_OSS_LIMIT, GPT_OSS_SLOPE, ExpertSpec

SQRT_HALF = 0.7071067811865476
INV_SQRT_2PI = 0.3989422804014327


def split_halves(h_NH: Tensor, spec: ExpertSpec) -> tuple[Tensor, Tensor]:
    """Return views of the gate and the up columns of a gated product, which stand as spec.gate_up says."""
    if spec.gate_up == "interleaved":
        return h_NH[:, 0::2], h_NH[:, 1::2]
    gate_NF, up_NF = h_NH.chunk(2, dim=1)
    return gate_NF, up_NF


def join_halves(h_NH: Tensor, spec: ExpertSpec) -> Tensor:
    """Return h with its halves one after the other, [gate | up]: h itself unless they took turns."""
    if spec.gate_up == "interleaved" and spec.halves == 2:
        return torch.cat(split_halves(h_NH, spec), dim=1)
    return h_NH


def activate(h_NH: Tensor, spec: ExpertSpec, *, out_NF: Tensor | None = None) -> Tensor:
    """Return a_NF, the activation of h, in the dtype of h. Autograd differentiates it.

    Args:
        h_NH: the first product, its halves one after the other ([gate | up]) whatever spec.gate_up says.
        out_NF: where to write a instead, in any dtype; autograd must be off.
    """
    if spec.activation == "relu2":
        positive_NF = torch.relu(h_NH)
        return torch.mul(positive_NF, positive_NF, out=out_NF)
    gate_NF, up_NF = h_NH.chunk(2, dim=1)
    if spec.activation == "swiglu":
        return torch.mul(functional.silu(gate_NF), up_NF, out=out_NF)
    if spec.activation == "geglu":
        return torch.mul(functional.gelu(gate_NF), up_NF, out=out_NF)
    gate_NF, up_NF = gate_NF.clamp(max=GPT_OSS_LIMIT), up_NF.clamp(-GPT_OSS_LIMIT, GPT_OSS_LIMIT)
    return torch.mul(up_NF + 1, gate_NF * torch.sigmoid(GPT_OSS_SLOPE * gate_NF), out=out_NF)


def activate_backward(
    da_NF: Tensor, h_NH: Tensor, spec: ExpertSpec, *, out_NH: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (a_NF, dh_NH): the activation of h again, and the gradient of h.

    Args:
        da_NF: the gradient of the activation, in the dtype of h. It may carry the weight of each row.
        h_NH: as for activate.
        out_NH: where to write dh, in any dtype, its columns in the order spec.gate_up says. Without it dh is a new
            tensor whose halves stand one after the other, as those of h.
    """
    dh_NH = torch.empty_like(h_NH) if out_NH is None else out_NH
    if spec.activation == "relu2":
        positive_NF = torch.relu(h_NH)
        torch.mul(2 * da_NF, positive_NF, out=dh_NH)
        return positive_NF.square(), dh_NH
    gate_NF, up_NF = h_NH.chunk(2, dim=1)
    if spec.activation == "swiglu":
        sigmoid_NF = torch.sigmoid(gate_NF)
        curve_NF = curve_for_up_NF = gate_NF * sigmoid_NF
        slope_NF = (gate_NF - curve_NF).mul_(sigmoid_NF).add_(sigmoid_NF)
    elif spec.activation == "geglu":
        cdf_NF = 0.5 * (1 + torch.erf(SQRT_HALF * gate_NF))
        curve_NF = curve_for_up_NF = gate_NF * cdf_NF
        slope_NF = cdf_NF + gate_NF * INV_SQRT_2PI * torch.exp(-0.5 * gate_NF.square())
    else:
        is_gate_held_NF, is_up_held_NF = gate_NF > GPT_OSS_LIMIT, up_NF.abs() > GPT_OSS_LIMIT
        gate_NF, up_NF = gate_NF.clamp(max=GPT_OSS_LIMIT), up_NF.clamp(-GPT_OSS_LIMIT, GPT_OSS_LIMIT) + 1
        sigmoid_NF = torch.sigmoid(GPT_OSS_SLOPE * gate_NF)
        curve_NF = gate_NF * sigmoid_NF
        curve_for_up_NF = curve_NF.masked_fill(is_up_held_NF, 0)
        slope_NF = sigmoid_NF + GPT_OSS_SLOPE * curve_NF * (1 - sigmoid_NF)
        slope_NF.masked_fill_(is_gate_held_NF, 0)
    dgate_NF, dup_NF = dh_NH.chunk(2, dim=1) if out_NH is None else split_halves(out_NH, spec)
    torch.mul(slope_NF.mul_(up_NF), da_NF, out=dgate_NF)
    torch.mul(da_NF, curve_for_up_NF, out=dup_NF)
    return curve_NF.mul_(up_NF), dh_NH
