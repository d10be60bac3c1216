"""Adoption: how DeepSpeed 0.19 comes to drive an MoE layer that knows nothing of DeepSpeed.

DeepSpeed finds MoE layers by class only. So the class of each of our layers is swapped for a subclass that is also a
`deepspeed.moe.layer.MoE`; our own expert groups are entered in DeepSpeed's tables; and expert parameters are marked, so
that their gradients are summed over the ranks that hold copies of them and divided by the whole world.
"""

from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups as deepspeed_groups
from torch import nn

from moe.experts import Experts
from moe.layer import MoELayer
from moe.parallel.groups import ParallelGroups


class AdoptedMoELayer(MoELayer, MoE):
    """Our layer, our forward; DeepSpeed sees an MoE."""

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by the engine at start-up; the groups are there already."""


def adopt(model: nn.Module, groups: ParallelGroups) -> None:
    """Make DeepSpeed recognise every MoE layer and expert parameter of `model`. Call before deepspeed.initialize."""
    name = f"ep_size_{groups.ep_size}"  # DeepSpeed parses this form
    deepspeed_groups._get_expert_parallel_group_dict()[name] = groups.expert_group
    deepspeed_groups._get_expert_data_parallel_group_dict()[name] = groups.expert_data_group
    for module in model.modules():
        if type(module) is MoELayer:
            module.__class__ = AdoptedMoELayer
            module.num_experts = module.router.num_candidates  # type: ignore[assignment]
            module.num_local_experts = module.num_experts // groups.ep_size  # type: ignore[operator]
            module.expert_group_name = name
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
