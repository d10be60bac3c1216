"""The truth: the maths of an expert layer in the plainest PyTorch, one routed row at a time.

Slow on purpose. Tests and benchmarks compare every backend with it, so it shares no code with any of them: no
sorting, no grouping, no custom gradient. Run it in float64; autograd differentiates it.
"""

import torch
from torch import Tensor


def swiglu_expert(x_D: Tensor, gate_up_2FD: Tensor, down_DF: Tensor) -> Tensor:
    """Return down(silu(gate(x)) * up(x)) for one token and one expert, shape [D]."""
    gate_FD, up_FD = gate_up_2FD.chunk(2)
    gate_F = gate_FD @ x_D
    return down_DF @ (gate_F * torch.sigmoid(gate_F) * (up_FD @ x_D))


def experts(
    x_TD: Tensor,
    token_N: Tensor,
    expert_N: Tensor,
    weight_N: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
) -> Tensor:
    """Return y_TD, y_t = sum over the rows n of token t: weight_n * expert_n(x_t).

    Rows with expert E are skipped. Shapes and meanings are those of ExpertsBackend (moe_kernels/backends).
    """
    x_T, gate_up_E, down_E = x_TD.unbind(), gate_up_E2FD.unbind(), down_EDF.unbind()
    y_T = [torch.zeros_like(x_D) for x_D in x_T]
    for token, expert, weight in zip(token_N.tolist(), expert_N.tolist(), weight_N, strict=True):
        if expert < len(gate_up_E):
            y_T[token] = y_T[token] + weight * swiglu_expert(x_T[token], gate_up_E[expert], down_E[expert])
    return torch.stack(y_T) if y_T else torch.zeros_like(x_TD)
