"""A chain of elementwise operations as one kernel on a GPU, where each one alone reads and writes everything again."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def fused_on_gpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `function` (tensors -> tensor), compiled by torch.compile where its first tensor is on a GPU.

    Elsewhere it runs as it stands, so a CPU computes to the bit what is written. The first call on a GPU takes some
    seconds. TORCH_COMPILE_DISABLE=1 in the environment switches compilation off.
    """
    compiled: Callable[..., Tensor] | None = None

    @functools.wraps(function)
    def call(first: Tensor, *others: Any) -> Tensor:
        nonlocal compiled
        # inside a model that is compiled as a whole it is part of that
        if not first.is_cuda or torch.compiler.is_compiling():
            return function(first, *others)
        if compiled is None:
            compiled = torch.compile(function)
        return compiled(first, *others)

    return call
