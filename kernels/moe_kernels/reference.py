"""The truth: the maths of an expert layer in the plainest PyTorch, one routed row at a time.

Slow on purpose. Tests and benchmarks compare every backend with it, so it shares no code with any of them: no
sorting, no grouping, no custom gradient, its own formulas. Run it in float64; autograd differentiates it.
"""

import math

import torch
from torch import Tensor

from moe_kernels.backends import PLAIN
from moe_kernels.spec import GPT_OSS_LIMIT, GPT_OSS_SLOPE, ExpertSpec


def activation(h_H: Tensor, spec: ExpertSpec) -> Tensor:
    """Return the activation [..., F] of the first product [..., H], its columns in the order spec.gate_up gives them.

    H is 2F, or F for relu2.
    """
    if spec.activation == "relu2":
        return torch.where(h_H > 0, h_H * h_H, 0)
    if spec.gate_up == "interleaved":
        gate_F, up_F = h_H[..., 0::2], h_H[..., 1::2]
    else:
        gate_F, up_F = h_H.chunk(2, dim=-1)
    if spec.activation == "swiglu":
        return gate_F * torch.sigmoid(gate_F) * up_F
    if spec.activation == "geglu":
        return gate_F * (1 + torch.erf(gate_F / math.sqrt(2))) / 2 * up_F
    gate_F = gate_F.clamp(max=GPT_OSS_LIMIT)
    up_F = up_F.clamp(min=-GPT_OSS_LIMIT, max=GPT_OSS_LIMIT)
    return (up_F + 1) * gate_F * torch.sigmoid(GPT_OSS_SLOPE * gate_F)


def experts(
    x_TD: Tensor,
    token_N: Tensor,
    expert_N: Tensor,
    weight_N: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    *,
    spec: ExpertSpec = PLAIN,
    gate_up_bias_E2F: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
) -> Tensor:
    """Return y_TD, y_t = sum over the rows n of token t: weight_n * (down(act(gate_up x_t + b1)) + b2).

    Rows with expert E are skipped. Shapes and meanings are those of ExpertsBackend (moe_kernels/backends).
    """
    x_T, gate_up_E, down_E = x_TD.unbind(), gate_up_E2FD.unbind(), down_EDF.unbind()
    y_T = [torch.zeros_like(x_D) for x_D in x_T]
    for token, expert, weight in zip(token_N.tolist(), expert_N.tolist(), weight_N, strict=True):
        if expert == len(gate_up_E):
            continue
        gate_up_HD, down_DF = gate_up_E[expert], down_E[expert]
        if spec.weights == "in_out":
            gate_up_HD, down_DF = gate_up_HD.T, down_DF.T
        h_H = gate_up_HD @ x_T[token]
        if gate_up_bias_E2F is not None:
            h_H = h_H + gate_up_bias_E2F[expert]
        out_D = down_DF @ activation(h_H, spec)
        if down_bias_ED is not None:
            out_D = out_D + down_bias_ED[expert]
        y_T[token] = y_T[token] + weight * out_D
    return torch.stack(y_T) if y_T else torch.zeros_like(x_TD)
