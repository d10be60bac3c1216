"""torch.nn.functional.grouped_mm on the sorted rows, differentiated by autograd; no host sync.

grouped_mm refuses float64 and rows that do not start at multiples of 16 bytes, and leaves the rows past its
last group unwritten. Those are the unused rows: they read zeros, and what comes of them is never looked at.
Sums over rows use index_add, which on CUDA adds in no fixed order unless torch's deterministic mode is on.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.backends import BACKENDS
from moe_kernels.grouping import group_rows

ALIGNMENT = 16  # bytes, of every row grouped_mm touches
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TorchGroupedBackend:
    """Gathers the rows in expert order, runs two grouped products, sums per token. The default on CUDA."""

    def refusal(self, *, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...] = ()) -> str | None:
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
    ) -> Tensor:
        reason = self.refusal(device=x_TD.device, dtype=x_TD.dtype, widths=tuple(down_EDF.shape[1:]))
        if reason is not None:
            raise ValueError(f"backend 'torch_grouped' cannot run in {x_TD.dtype}: {reason}")
        num_tokens, num_experts = x_TD.shape[0], gate_up_E2FD.shape[0]
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        grouping = group_rows(expert_N, num_experts)
        ends_E = grouping.offsets_E1[1:].to(torch.int32)
        unused_N = expert_N == num_experts
        # A row of zeros stands after the last token: unused rows read it and add to it, and it is cut off.
        # Thus what grouped_mm leaves unwritten, in the forward or the backward pass, reaches no token.
        token_N = token_N.masked_fill(unused_N, num_tokens).index_select(0, grouping.order_N)
        weight_N1 = weight_N.masked_fill(unused_N, 0).index_select(0, grouping.order_N).unsqueeze(1)
        x_ND = F.pad(x_TD, (0, 0, 0, 1)).index_select(0, token_N)
        gate_NF, up_NF = F.grouped_mm(x_ND, gate_up_E2FD.mT, offs=ends_E).chunk(2, dim=1)
        y_ND = F.grouped_mm(F.silu(gate_NF) * up_NF, down_EDF.mT, offs=ends_E)
        y_T1D = x_TD.new_zeros(num_tokens + 1, x_TD.shape[1], dtype=wide)
        return y_T1D.index_add(0, token_N, y_ND.to(wide) * weight_N1)[:num_tokens].to(x_TD.dtype)


BACKENDS.register("torch_grouped")(TorchGroupedBackend())
