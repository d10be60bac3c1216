"""torch.nn.functional.grouped_mm on the sorted rows, differentiated by autograd; no host sync.

grouped_mm refuses float64 and rows that do not start at multiples of 16 bytes, and leaves the rows past its
last group unwritten. Those are the unused rows: they read zeros, and what comes of them is never looked at.
Sums over rows use index_add, which on CUDA adds in no fixed order unless torch's deterministic mode is on.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.activation import activate, join_halves
from moe_kernels.backends import BACKENDS, PLAIN
from moe_kernels.grouping import group_rows
from moe_kernels.shapes import check_shapes
from moe_kernels.spec import ExpertSpec

ALIGNMENT = 16  # bytes, of every row grouped_mm touches
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TorchGroupedBackend:
    """Gathers the rows in expert order, runs two grouped products, sums per token. The default on CUDA."""

    def refusal(
        self, *, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...] = (), spec: ExpertSpec = PLAIN
    ) -> str | None:
        if dtype not in DTYPES:
            known = ", ".join(str(known) for known in DTYPES)
            return f"grouped_mm takes {known}; use backend 'naive', or 'segments' on a CPU"
        multiple = ALIGNMENT // dtype.itemsize
        for width in widths:
            if width % multiple:
                return (
                    f"grouped_mm wants rows of whole {ALIGNMENT} bytes, but a width is {width}; "
                    f"use a multiple of {multiple}, or backend 'naive', or 'segments' on a CPU"
                )
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
        E, D, hidden = check_shapes(x_TD, gate_up_E2FD, down_EDF, spec, gate_up_bias_E2F, down_bias_ED)
        reason = self.refusal(device=x_TD.device, dtype=x_TD.dtype, widths=(D, hidden), spec=spec)
        if reason is not None:
            raise ValueError(f"backend 'torch_grouped' cannot run in {x_TD.dtype}: {reason}")
        num_tokens = x_TD.shape[0]
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        grouping = group_rows(expert_N, E)
        ends_E = grouping.offsets_E1[1:].to(torch.int32)
        unused_N = expert_N == E
        # A row of zeros stands after the last token: unused rows read it and add to it, and it is cut off.
        # Thus what grouped_mm leaves unwritten, in the forward or the backward pass, reaches no token.
        token_N = token_N.masked_fill(unused_N, num_tokens).index_select(0, grouping.order_N)
        weight_N1 = weight_N.masked_fill(unused_N, 0).index_select(0, grouping.order_N).unsqueeze(1)
        expert_N = expert_N.index_select(0, grouping.order_N)
        # grouped_mm takes [E, in, out], as strided as .mT makes it
        is_out_in = spec.weights == "out_in"
        gate_up_EDH = gate_up_E2FD.mT if is_out_in else gate_up_E2FD
        down_EFD = down_EDF.mT if is_out_in else down_EDF
        x_ND = F.pad(x_TD, (0, 0, 0, 1)).index_select(0, token_N)
        h_NH = _add_bias(F.grouped_mm(x_ND, gate_up_EDH, offs=ends_E), gate_up_bias_E2F, expert_N).to(x_TD.dtype)
        a_NF = activate(join_halves(h_NH, spec), spec)
        y_ND = _add_bias(F.grouped_mm(a_NF, down_EFD, offs=ends_E), down_bias_ED, expert_N)
        y_T1D = x_TD.new_zeros(num_tokens + 1, D, dtype=wide)
        return y_T1D.index_add(0, token_N, y_ND.to(wide) * weight_N1)[:num_tokens].to(x_TD.dtype)


def _add_bias(out_NO: Tensor, bias_EO: Tensor | None, expert_N: Tensor) -> Tensor:
    """Return out plus each row's bias, in float32, or out itself if there is no bias. `expert_N` is sorted.

    In float32 because CUDA sums the gradient row after row in the dtype the bias is selected in, and a bfloat16 sum
    of ones ends at 256. Unused rows select a row behind the last bias, so that what comes back for them is cut off.
    """
    if bias_EO is None:
        return out_NO
    return out_NO + F.pad(bias_EO.float(), (0, 0, 0, 1)).index_select(0, expert_N)


BACKENDS.register("torch_grouped")(TorchGroupedBackend())
