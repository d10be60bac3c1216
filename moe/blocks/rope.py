"""Rotary position embedding (arXiv 2104.09864), with the halves paired as in the Hugging Face Llama models.

    angle_i = position * theta^(-2i/d), i = 0..d/2-1
    (x_i, x_{i+d/2}) turns by angle_i

Letters: d width of a head, c = d/2 pairs.
"""

import torch
from torch import Tensor


def rotation(position_S: Tensor, *, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return (cos, sin) of the angles, float32 [..., S, c].

    The frequencies are computed here and kept in no buffer, so that no cast of a model can round them. The
    angles are float32 in every model, as published checkpoints were trained.
    """
    exponent_c = torch.arange(0, head_dim, 2, device=position_S.device, dtype=torch.float32) / head_dim
    angle_Sc = position_S.to(torch.float32).unsqueeze(-1) * (1.0 / theta**exponent_c)
    return angle_Sc.cos(), angle_Sc.sin()


def rotate(x_BHSd: Tensor, cos_BSc: Tensor, sin_BSc: Tensor) -> Tensor:
    """Return the heads turned by their positions, dtype of x; computed in float32 or wider.

    `cos_BSc` and `sin_BSc` come from `rotation`; [S, c] serves every sequence of the batch.
    """
    cos_B1Sc, sin_B1Sc = cos_BSc.unsqueeze(-3), sin_BSc.unsqueeze(-3)
    first, second = x_BHSd.to(torch.promote_types(x_BHSd.dtype, torch.float32)).chunk(2, dim=-1)
    turned = torch.cat((first * cos_B1Sc - second * sin_B1Sc, second * cos_B1Sc + first * sin_B1Sc), dim=-1)
    return turned.to(x_BHSd.dtype)
