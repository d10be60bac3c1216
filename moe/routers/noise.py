"""Noise that is a function of what it belongs to, not of who draws it.

A stateful generator gives a token other noise on another rank, in another micro-batch or in a recompute. Here each
number is a hash of (seed, step, layer, token, column), so every layout draws the same. The mixing is the 32-bit
finaliser of MurmurHash3 (public domain, Appleby), applied once per key.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _mix(h: Tensor) -> Tensor:
    # int64 products wrap modulo 2**64, which leaves the low 32 bits right
    h = (h ^ (h >> 16)) & _MASK
    h = (h * 0x85EBCA6B) & _MASK
    h = (h ^ (h >> 13)) & _MASK
    h = (h * 0xC2B2AE35) & _MASK
    return (h ^ (h >> 16)) & _MASK


def uniform(position_T: Tensor, num_columns: int, *, key: tuple[int, ...]) -> Tensor:
    """Return float32 [T, num_columns] in [0, 1): a pure function of key, global token position and column."""
    h_T1 = torch.full_like(position_T, 0x9E3779B9).unsqueeze(1)
    for part in key:
        h_T1 = _mix(h_T1 ^ (part & _MASK))
    position_T1 = position_T.unsqueeze(1)
    h_T1 = _mix(_mix(h_T1 ^ (position_T1 & _MASK)) ^ (position_T1 >> 32))
    column_1C = torch.arange(num_columns, device=position_T.device).unsqueeze(0)
    # 24 bits fill a float32 exactly
    return (_mix(h_T1 ^ _mix(column_1C + 1)) >> 8).to(torch.float32) * 2.0**-24
