"""Backends: the ways to run all experts of a layer on its routed rows. One file, one way.

A new backend is one file here that registers an instance of its class; tests and benchmarks walk BACKENDS.
"""

import logging
from typing import Protocol

import torch
from torch import Tensor

from moe_kernels.registry import Registry
from moe_kernels.spec import PLAIN, ExpertSpec

LOGGER = logging.getLogger(__name__)

# What "auto" means, by device type: the first that does not refuse. Refusals are rules, nothing is tried out.
AUTO = {"cpu": ("segments",), "cuda": ("triton", "torch_grouped", "naive")}


class ExpertsBackend(Protocol):
    """y_t = sum over the rows n of token t: weight_n * (down_e(act(gate_up_e x_t + b1_e)) + b2_e), e = expert_n.

    The spec names the activation `act` and the layout of the weights; the biases b1 and b2 may be left out.

    Rows may come in any order and a token may own any number of them, one expert twice included. Nothing of
    an unused row (expert_n == E) is read: its token and weight may hold anything, and its weight gets a
    gradient of zero. Gradients flow to x, weight, gate_up, down and both biases; an expert without rows gets
    exact zeros, not None. Inputs and incoming gradients are never written to.
    """

    def refusal(
        self, *, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...] = (), spec: ExpertSpec = PLAIN
    ) -> str | None:
        """Return why this backend cannot run there, with the remedy, or None if it can.

        Args:
            widths: the sizes D and F of the layer, if they are known.
            spec: what the experts compute and how their weights lie.
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
        spec: ExpertSpec = PLAIN,
        gate_up_bias_E2F: Tensor | None = None,
        down_bias_ED: Tensor | None = None,
    ) -> Tensor:
        """Return y_TD, in the dtype of x; rows are weighted and summed in float32 or wider.

        Args:
            x_TD: tokens. The expert weights and biases have the same dtype.
            token_N: int64, 0..T-1, which token a row reads and adds to.
            expert_N: int64, 0..E; E marks an unused row.
            weight_N: float32 (float64 for float64 tokens).
            gate_up_E2FD: [E, 2F, D], gate rows first, then up rows: the layout of Hugging Face. The spec may say
                otherwise: rows that take turns, [E, D, 2F], or F in the place of 2F for relu2.
            down_EDF: [E, D, F], or [E, F, D] if the spec says so.
            fan_out: K if rows t*K..t*K+K-1 are those of token t, unused ones included; None if ragged.
            gate_up_bias_E2F: b1, in the order of the outputs of gate_up; width F for relu2.
            down_bias_ED: b2.

        Raises:
            ValueError: a weight or bias has not the shape the spec asks for, or the backend cannot run here.
        """
        ...


BACKENDS: Registry[ExpertsBackend] = Registry("backend", package=__name__)


def resolve_backend(
    name: str, device: torch.device, dtype: torch.dtype, *, widths: tuple[int, ...] = (), spec: ExpertSpec = PLAIN
) -> tuple[str, ExpertsBackend]:
    """Return the name and the backend that `name` stands for; "auto" picks by AUTO, and logs what and why.

    Args:
        widths: the sizes D and F of the layer, if they are known.
        spec: what the experts compute and how their weights lie.

    Raises:
        ValueError: the name is unknown, or that backend cannot run this spec on this device, dtype or these widths.
    """
    if name == "auto":
        if device.type not in AUTO:
            raise ValueError(f"backend 'auto' knows {', '.join(AUTO)}, not {device.type!r}; name a backend instead")
        candidates = AUTO[device.type]
    elif name in BACKENDS:
        candidates = (name,)
    else:
        raise ValueError(f"backend {name!r} is unknown; known are auto, {', '.join(BACKENDS)}")
    refusals = {}
    for candidate in candidates:
        if candidate not in BACKENDS:
            # a copy beside an exported model leaves out what needs more than torch
            refusals[candidate] = "its file is not here"
            continue
        reason = BACKENDS[candidate].refusal(device=device, dtype=dtype, widths=widths, spec=spec)
        if reason is None:
            passed = "".join(f"; not {other}: {why}" for other, why in refusals.items())
            LOGGER.info("backend %r on %s in %s is %s%s", name, device.type, dtype, candidate, passed)
            return candidate, BACKENDS[candidate]
        refusals[candidate] = reason
    where = f"cannot run on {device.type} in {dtype}"
    raise ValueError("; ".join(f"backend {other!r} {where}: {why}" for other, why in refusals.items()))
