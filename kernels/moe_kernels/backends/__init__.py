"""Backends: the ways to run all experts of a layer on its routed rows. One file, one way.

A new backend is one file here that registers an instance of its class; tests and benchmarks walk BACKENDS.
"""

from typing import Protocol

import torch
from torch import Tensor

from moe_kernels.registry import Registry

# What "auto" means, by device type. A choice by table, never by trying and falling back.
AUTO = {"cpu": "segments", "cuda": "torch_grouped"}


class ExpertsBackend(Protocol):
    """y_t = sum over the rows n of token t: weight_n * down_e(silu(gate_e(x_t)) * up_e(x_t)), e = expert_n.

    Rows may come in any order and a token may own any number of them, one expert twice included. Nothing of
    an unused row (expert_n == E) is read: its token and weight may hold anything, and its weight gets a
    gradient of zero. Gradients flow to x, weight, gate_up and down; an expert without rows gets exact zeros,
    not None. Inputs and incoming gradients are never written to.
    """

    def refusal(self, *, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...] = ()) -> str | None:
        """Return why this backend cannot run there, with the remedy, or None if it can.

        Args:
            widths: the sizes D and F of the layer, if they are known.
        """
        ...

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
    ) -> Tensor:
        """Return y_TD, in the dtype of x; rows are weighted and summed in float32 or wider.

        Args:
            x_TD: tokens. The expert weights have the same dtype.
            token_N: int64, 0..T-1, which token a row reads and adds to.
            expert_N: int64, 0..E; E marks an unused row.
            weight_N: float32 (float64 for float64 tokens).
            gate_up_E2FD: gate rows first, then up rows: the layout of Hugging Face.
            fan_out: K if rows t*K..t*K+K-1 are those of token t, unused ones included; None if ragged.
        """
        ...


BACKENDS: Registry[ExpertsBackend] = Registry("backend", package=__name__)


def resolve_backend(
    name: str, device: torch.device, dtype: torch.dtype, *, widths: tuple[int, ...] = ()
) -> tuple[str, ExpertsBackend]:
    """Return the name and the backend that `name` stands for ("auto" picks by device type, see AUTO).

    Args:
        widths: the sizes D and F of the layer, if they are known.

    Raises:
        ValueError: the name is unknown, or that backend cannot run on this device, dtype or these widths.
    """
    chosen = name
    if name == "auto":
        if device.type not in AUTO:
            raise ValueError(f"backend 'auto' knows {', '.join(AUTO)}, not {device.type!r}; name a backend instead")
        chosen = AUTO[device.type]
    if chosen not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown; known are auto, {', '.join(BACKENDS)}")
    backend = BACKENDS[chosen]
    reason = backend.refusal(device=device, dtype=dtype, widths=widths)
    if reason is not None:
        raise ValueError(f"backend {chosen!r} cannot run on {device.type} in {dtype}: {reason}")
    return chosen, backend
