"""The definition of correct: a loop over the experts, differentiated by autograd. Any device, any dtype."""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.backends import BACKENDS


class NaiveBackend:
    """Each expert picks its rows, runs them, and adds the weighted results to their tokens."""

    def refusal(self, *, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...] = ()) -> str | None:
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
        accumulate = torch.promote_types(x_TD.dtype, torch.float32)
        y_TD = torch.zeros_like(x_TD, dtype=accumulate)
        # unbind, because the gradient of gate_up_E2FD[e] is a whole zero tensor [E, 2F, D] for every expert.
        # Experts without rows take part with zero rows, so that their gradient is zero and not None.
        experts = zip(gate_up_E2FD.unbind(), down_EDF.unbind(), strict=True)
        for expert, (gate_up_2FD, down_DF) in enumerate(experts):
            row_n = (expert_N == expert).nonzero().squeeze(1)
            token_n = token_N[row_n]
            gate_nF, up_nF = (x_TD.index_select(0, token_n) @ gate_up_2FD.mT).chunk(2, dim=1)
            out_nD = (F.silu(gate_nF) * up_nF) @ down_DF.mT
            y_TD = y_TD.index_add(0, token_n, out_nD.to(accumulate) * weight_N[row_n, None])
        return y_TD.to(x_TD.dtype)


BACKENDS.register("naive")(NaiveBackend())
