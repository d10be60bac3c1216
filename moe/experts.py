"""Experts: the expert weights of this rank, and the backend that runs them.

Weights stand in Hugging Face order: `gate_up_proj` [E_local, 2F, D] (gate rows first), `down_proj` [E_local, D, F];
biases, where experts have any, are `gate_up_proj_bias` [E_local, 2F] and `down_proj_bias` [E_local, D]. An activation
without a gate has F in the place of 2F.
"""

import torch
from torch import Tensor, nn

from moe.parallel.dispatch import check_expert_split
from moe.parallel.groups import ParallelGroups
from moe.routing import Assignment
from moe_kernels.backends import resolve_backend
from moe_kernels.spec import Activation, ExpertSpec


class Experts(nn.Module):
    """The experts `first_expert` .. `first_expert + num_local_experts - 1` of a pool of `num_experts`.

    Raises ValueError if the pool cannot be split evenly over the expert group or the backend cannot run here.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        groups: ParallelGroups,
        backend: str,
        activation: Activation = "swiglu",
        has_bias: bool = False,
    ) -> None:
        super().__init__()
        check_expert_split(num_experts, groups.ep_size)
        self.num_experts = num_experts
        self.num_local_experts = num_experts // groups.ep_size
        self.first_expert = groups.ep_rank * self.num_local_experts
        self.spec = ExpertSpec(activation=activation)
        width = self.spec.halves * intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_local_experts, width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_local_experts, hidden_size, intermediate_size))
        # an absent bias is no parameter: names and counts show what is there
        self.gate_up_proj_bias = self.down_proj_bias = None
        if has_bias:
            self.gate_up_proj_bias = nn.Parameter(torch.empty(self.num_local_experts, width))
            self.down_proj_bias = nn.Parameter(torch.empty(self.num_local_experts, hidden_size))
        self._asked = backend
        self._widths = (hidden_size, intermediate_size)
        self._resolve(groups.device)

    def _resolve(self, device: torch.device) -> None:
        self._device_type = device.type
        self.backend, self._run = resolve_backend(
            self._asked, device, self.down_proj.dtype, widths=self._widths, spec=self.spec
        )

    def forward(self, x_RD: Tensor, assignment: Assignment) -> Tensor:
        """Return y_RD, the weighted sum of each row's local experts. `assignment` speaks of local expert ids."""
        if x_RD.device.type != self._device_type:
            self._resolve(x_RD.device)  # built for one device, moved to another
        return self._run(
            x_RD,
            assignment.token_N,
            assignment.expert_N,
            assignment.weight_N,
            self.gate_up_proj,
            self.down_proj,
            fan_out=assignment.fan_out,
            spec=self.spec,
            gate_up_bias_E2F=self.gate_up_proj_bias,
            down_bias_ED=self.down_proj_bias,
        )


def expert_places(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Return, for each expert parameter of `module` by name, (experts in its pool, first expert on this rank)."""
    return {
        f"{prefix}.{name}" if prefix else name: (experts.num_experts, experts.first_expert)
        for prefix, experts in module.named_modules()
        if isinstance(experts, Experts)
        for name, _ in experts.named_parameters()
    }
