"""The grouped path of MegaBlocks (databricks/megablocks), for comparison: its grouped products, our sorting and sums.

MegaBlocks pins an older torch, so it lives in an environment of its own (docs/kernels.md says how to make one). Its
products take bfloat16 alone and row counts on the host, so every call waits for the device.
"""

import importlib.util

import torch
from torch import Tensor

from moe_kernels.activation import activate
from moe_kernels.backends import BACKENDS, PLAIN
from moe_kernels.grouping import group_rows
from moe_kernels.shapes import check_shapes
from moe_kernels.spec import ExpertSpec

PLAIN_LAYOUTS = ("concatenated", "out_in")


class MegaBlocksBackend:
    """Gathers the rows in expert order and multiplies them with MegaBlocks' grouped_gemm."""

    def refusal(
        self, *, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...] = (), spec: ExpertSpec = PLAIN
    ) -> str | None:
        if device.type != "cuda":
            return f"MegaBlocks runs on CUDA GPUs, not on {device.type!r}; use 'auto'"
        if dtype != torch.bfloat16:
            return "its grouped products take bfloat16; use 'auto'"
        if (spec.gate_up, spec.weights) != PLAIN_LAYOUTS:
            return f"it is adapted to weights {PLAIN_LAYOUTS} alone; use 'auto'"
        missing = [name for name in ("megablocks", "grouped_gemm") if importlib.util.find_spec(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)}; docs/kernels.md says how, in an environment of its own"
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
        sizes = check_shapes(x_TD, gate_up_E2FD, down_EDF, spec, gate_up_bias_E2F, down_bias_ED)
        reason = self.refusal(device=x_TD.device, dtype=x_TD.dtype, spec=spec)
        if reason is not None:
            raise ValueError(f"backend 'megablocks' cannot run on {x_TD.device.type} in {x_TD.dtype}: {reason}")
        from megablocks import grouped_gemm_util  # pyright: ignore

        gmm = grouped_gemm_util.ops.gmm
        grouping = group_rows(expert_N, sizes.E)
        # MegaBlocks reads row counts on the host: this waits for the device
        count_E = grouping.offsets_E1.diff().cpu()
        row_R = grouping.order_N[: int(count_E.sum())]
        token_R, expert_R = token_N[row_R], expert_N[row_R]
        h_RH = gmm(x_TD[token_R], gate_up_E2FD, count_E, trans_b=True)
        if gate_up_bias_E2F is not None:
            h_RH = h_RH + gate_up_bias_E2F[expert_R]
        y_RD = gmm(activate(h_RH, spec), down_EDF, count_E, trans_b=True)
        if down_bias_ED is not None:
            y_RD = y_RD + down_bias_ED[expert_R]
        weighted_RD = y_RD.float() * weight_N[row_R].unsqueeze(1)
        y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        return y_TD.index_add(0, token_R, weighted_RD).to(x_TD.dtype)


BACKENDS.register("megablocks")(MegaBlocksBackend())
