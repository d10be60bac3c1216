"""The parts of a decoder layer as formulas in float64: what the tests of moe.blocks compare with."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = x.double(), weight.double()
    return x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight


def turn(x_BHSd: Tensor, position_BS: Tensor, theta: float) -> Tensor:
    """Rotary embedding as multiplication of complex numbers."""
    x = x_BHSd.double()
    half = x.shape[-1] // 2
    frequency = torch.tensor([theta ** (-2 * i / x.shape[-1]) for i in range(half)], dtype=torch.float64)
    angle = position_BS.double()[:, None, :, None] * frequency
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), dim=-1)
