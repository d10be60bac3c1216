"""The definition of correct: a loop over the experts, differentiated by autograd. Any device, any dtype."""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.activation import activate, join_halves
from moe_kernels.backends import BACKENDS, PLAIN
from moe_kernels.shapes import check_shapes
from moe_kernels.spec import ExpertSpec


class NaiveBackend:
    """Each expert picks its rows, runs them, and adds the weighted results to their tokens."""

    def refusal(
        self, *, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...] = (), spec: ExpertSpec = PLAIN
    ) -> str | None:
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
        E, _, _ = check_shapes(x_TD, gate_up_E2FD, down_EDF, spec, gate_up_bias_E2F, down_bias_ED)
        accumulate = torch.promote_types(x_TD.dtype, torch.float32)
        y_TD = torch.zeros_like(x_TD, dtype=accumulate)
        # unbind, because the gradient of gate_up_E2FD[e] is a whole zero tensor [E, 2F, D] for every expert.
        # Experts without rows take part with zero rows, so that their gradient is zero and not None.
        gate_up_E, down_E = gate_up_E2FD.unbind(), down_EDF.unbind()
        gate_up_bias_E = [None] * E if gate_up_bias_E2F is None else gate_up_bias_E2F.unbind()
        down_bias_E = [None] * E if down_bias_ED is None else down_bias_ED.unbind()
        for expert in range(E):
            gate_up_HD, down_DF = gate_up_E[expert], down_E[expert]
            if spec.weights == "in_out":
                gate_up_HD, down_DF = gate_up_HD.mT, down_DF.mT
            row_n = (expert_N == expert).nonzero().squeeze(1)
            token_n = token_N[row_n]
            h_nH = F.linear(x_TD.index_select(0, token_n), gate_up_HD, gate_up_bias_E[expert])
            a_nF = activate(join_halves(h_nH, spec), spec)
            out_nD = F.linear(a_nF, down_DF, down_bias_E[expert])
            y_TD = y_TD.index_add(0, token_n, out_nD.to(accumulate) * weight_N[row_n, None])
        return y_TD.to(x_TD.dtype)


BACKENDS.register("naive")(NaiveBackend())
