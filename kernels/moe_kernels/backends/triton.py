"""Our Triton kernels: fused, ragged, without padding, host syncs or atomics, equal to the bit from run to run.

The kernels are in the files beside this folder, experts.py first. For the backward pass x, H
and the schedule are kept. bfloat16 and float16 are summed in float32; float32 follows torch's switch for TF32.
"""

import importlib.util

import torch
from torch import Tensor

from moe_kernels import launch
from moe_kernels.backends import BACKENDS, PLAIN
from moe_kernels.shapes import check_shapes
from moe_kernels.spec import ExpertSpec

# read once: torch.compile cannot look through find_spec
HAS_TRITON = importlib.util.find_spec("triton") is not None
INSTALL = "pip install 'triton>=3.6,<3.8' (3.3 runs too, without TMA)"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OLDEST_GPU = (8, 0)


# torch.compile takes what it returns as it is
@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


class TritonBackend:
    """The fused expert MLP in Triton. The default on CUDA; runs on a CPU in Triton's interpreter, for tests."""

    def refusal(
        self, *, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...] = (), spec: ExpertSpec = PLAIN
    ) -> str | None:
        if device.type == "cpu":
            if not launch.is_interpreted():
                return "Triton compiles for GPUs; use backend 'segments', or TRITON_INTERPRET=1 to test (very slow)"
            if dtype == torch.bfloat16:
                return "Triton's interpreter computes wrongly in bfloat16; use float32, float16 or float64 there"
        elif device.type == "cuda":
            if dtype not in DTYPES:
                return f"it takes {', '.join(str(known) for known in DTYPES)} on a GPU; use backend 'naive'"
            is_nvidia = torch.cuda.is_available() and torch.version.hip is None
            if is_nvidia and _capability(device) < OLDEST_GPU:
                return "it needs an NVIDIA GPU of compute capability 8.0 or later; use backend 'naive'"
        else:
            return f"it runs on CUDA devices, not on {device.type!r}; use backend 'naive'"
        if not HAS_TRITON:
            return f"the package triton is not installed: {INSTALL}"
        return None

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
        # imported here: a machine without Triton can still read the registry
        from moe_kernels.experts import experts, route_rows

        sizes = check_shapes(x_TD, gate_up_E2FD, down_EDF, spec, gate_up_bias_E2F, down_bias_ED)
        reason = self.refusal(device=x_TD.device, dtype=x_TD.dtype, spec=spec)
        if reason is not None:
            raise ValueError(f"backend 'triton' cannot run on {x_TD.device.type} in {x_TD.dtype}: {reason}")
        routed = route_rows(
            token_N,
            expert_N,
            num_tokens=x_TD.shape[0],
            num_experts=sizes.E,
            fan_out=fan_out,
            itemsize=x_TD.element_size(),
        )
        return experts(
            x_TD,
            weight_N,
            gate_up_E2FD,
            down_EDF,
            routed,
            spec=spec,
            gate_up_bias_E2F=gate_up_bias_E2F,
            down_bias_ED=down_bias_ED,
        )


BACKENDS.register("triton")(TritonBackend())
