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

    @functools.wraps(function)
    def call(first: Tensor, *others: Any) -> Tensor:
        # inside a model that is compiled as a whole it is part of that
        if not first.is_cuda or torch.compiler.is_compiling():
            return function(first, *others)
        return _compiled(function)(first, *others)

    return call


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # when it is first called, not when it is defined: importing the compiler takes a second
    return torch.compile(function)
