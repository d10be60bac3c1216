"""Shapes of expert weights: what a spec asks for, checked before anything runs.

A wrong layout that happens to fit, as square weights the wrong way round or interleaved halves taken for
concatenated ones, cannot be seen here: that is why layouts are named in ExpertSpec and never guessed.
"""

from typing import NamedTuple

from torch import Tensor

from moe_kernels.spec import ExpertSpec


class Sizes(NamedTuple):
    """The number of experts, the width of a token, the hidden width of an expert."""

    E: int
    D: int
    F: int


def check_shapes(
    x_TD: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    spec: ExpertSpec,
    gate_up_bias_E2F: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
) -> Sizes:
    """Return the sizes of the layer: D from the tokens, E and F from the down weights.

    Raises:
        ValueError: a tensor has not the shape that these sizes and the spec ask of it.
    """
    is_out_in = spec.weights == "out_in"
    if x_TD.ndim != 2:
        raise ValueError(f"x is {list(x_TD.shape)}, not [T, D]; flatten all dimensions but the last")
    D = x_TD.shape[1]
    if down_EDF.ndim != 3 or down_EDF.shape[1 if is_out_in else 2] != D:
        raise ValueError(
            f"down is {list(down_EDF.shape)}, not {f'[E, {D}, F]' if is_out_in else f'[E, F, {D}]'}, as tokens of "
            f"width {D} and weights={spec.weights!r} ask; give it that shape or change weights in the spec"
        )
    E, F = down_EDF.shape[0], down_EDF.shape[2 if is_out_in else 1]
    H = spec.halves * F
    expected = {
        "gate_up": (gate_up_E2FD, [E, H, D] if is_out_in else [E, D, H]),
        "gate_up_bias": (gate_up_bias_E2F, [E, H]),
        "down_bias": (down_bias_ED, [E, D]),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)}, not {shape}, as E={E} and F={F} (from down), D={D} (from x), "
                f"activation={spec.activation!r} and weights={spec.weights!r} ask; reshape it or change the spec"
            )
    return Sizes(E, D, F)
