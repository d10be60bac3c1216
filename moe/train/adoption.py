"""Adoption: how DeepSpeed 0.19 comes to drive an MoE layer that knows nothing of DeepSpeed.

DeepSpeed finds MoE layers by class only. So the class of each of our layers is swapped for a subclass that is also a
`deepspeed.moe.layer.MoE`; our own expert groups are entered in DeepSpeed's tables; and expert parameters are marked, so
that their gradients are summed over the ranks that hold copies of them and divided by the whole world.
"""

from typing import Any, Literal

from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from moe.experts import Experts
from moe.layer import MoELayer
from moe.parallel.groups import ParallelGroups

Kind = Literal["model", "exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")
KINDS: tuple[Kind, ...] = ("model", *MOMENTS)


class AdoptedMoELayer(MoELayer, MoE):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Our layer, our forward; DeepSpeed sees an MoE."""

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by the engine at start-up; the groups are there already."""


def adopt(model: nn.Module, groups: ParallelGroups) -> None:
    """Make DeepSpeed recognise every MoE layer and expert parameter of `model`. Call before deepspeed.initialize.

    Where no expert is trained, DeepSpeed is shown no MoE layer: it insists on optimizer groups for their experts.
    """
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    are_trained = any(parameter.requires_grad for module in experts for parameter in module.parameters())
    name = f"ep_size_{groups.ep_size}"  # DeepSpeed parses this form
    deepspeed_groups._get_expert_parallel_group_dict()[name] = groups.expert_group
    deepspeed_groups._get_expert_data_parallel_group_dict()[name] = groups.expert_data_group
    for module in model.modules():
        if type(module) is MoELayer and are_trained:
            module.__class__ = AdoptedMoELayer
            num_experts = module.router.num_candidates
            vars(module).update(
                num_experts=num_experts, num_local_experts=num_experts // groups.ep_size, expert_group_name=name
            )
        elif isinstance(module, Experts):
            for parameter in module.parameters():
                parameter.allreduce = False  # type: ignore[attr-defined]
                parameter.group_name = name  # type: ignore[attr-defined]


def is_expert_parameter(parameter: nn.Parameter) -> bool:
    """Return whether `adopt` marked the parameter: held by the ranks of one expert-data group only."""
    return not getattr(parameter, "allreduce", True)


def split_expert_groups(parameter_groups: list[dict]) -> list[dict]:
    """Return the optimizer groups with expert parameters in groups of their own, as ZeRO demands."""
    # no cap on the size of a group: a cap would make the groups, and so the flat buffers, depend on it
    return split_params_into_different_moe_groups_for_optimizer(parameter_groups, max_group_size=2**62)


def link_moments(zero_optimizer: Any) -> None:
    """Point each parameter at its moments. With several groups DeepSpeed links only those of the first update."""
    zero_optimizer._hp_optimizer_states_linked = False
    zero_optimizer._lazy_init_hp_params_optimizer_state()


def read_full(parameter: nn.Parameter, kind: Kind) -> Tensor:
    """Return the float32 master weight or moment of a parameter under ZeRO 1 or 2, whole. Collective."""
    if kind == "model":
        value = safe_get_full_fp32_param(parameter)
    else:
        value = safe_get_full_optimizer_state(parameter, kind)
    assert value is not None, f"DeepSpeed holds no {kind} for a parameter of shape {tuple(parameter.shape)}"
    return value


def write_full(parameter: nn.Parameter, kind: Kind, value: Tensor) -> None:
    """Set what `read_full` returns; each rank keeps its share."""
    if kind == "model":
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)
