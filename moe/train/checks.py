"""Checks of debug mode: copies of a parameter agree over the ranks, and every parameter moves.

A reduction over the wrong ranks, or one left out, trains on without an error; these checks make it one.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moe.parallel.groups import ParallelGroups
from moe.train.adoption import is_expert_parameter


class ReplicaError(RuntimeError):
    """Copies of one parameter differ between ranks."""


class UnmovedError(RuntimeError):
    """A trainable parameter is as it was before the first update."""


def check_replicas(model: nn.Module, groups: ParallelGroups) -> None:
    """Raise ReplicaError unless all copies of each parameter are equal to the bit. Collective."""
    named = list(model.named_parameters())
    for is_expert, group in ((False, groups.data_group), (True, groups.expert_data_group)):
        chosen = [(name, parameter) for name, parameter in named if is_expert_parameter(parameter) == is_expert]
        if group is None or not chosen:
            continue
        sums_N = torch.stack([_bit_sum(parameter.detach()) for _, parameter in chosen])
        for (name, _), is_equal in zip(chosen, _equal_over(sums_N, group), strict=True):
            if not is_equal:
                raise ReplicaError(
                    f"{name} differs between the ranks that hold copies of it (seen on rank {groups.rank}): its "
                    "gradient was reduced over the wrong ranks, or not at all"
                )


def _bit_sum(tensor: Tensor) -> Tensor:
    """Return an int64 that changes with every bit of `tensor`, its place included."""
    bits_N = tensor.reshape(-1).view(torch.int16 if tensor.element_size() == 2 else torch.int32).to(torch.int64)
    # int64 wraps around, on every rank alike
    return (bits_N * torch.arange(1, bits_N.numel() + 1, device=tensor.device)).sum()


def _equal_over(sums_N: Tensor, group: ProcessGroup) -> list[bool]:
    low_N, high_N = sums_N.clone(), sums_N.clone()
    dist.all_reduce(low_N, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high_N, op=dist.ReduceOp.MAX, group=group)
    return (low_N == high_N).tolist()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every trainable parameter."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def check_moved(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Raise UnmovedError naming the trainable parameters that an update left as in `before`."""
    unmoved = [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
    if unmoved:
        raise UnmovedError(f"{', '.join(unmoved)} did not move in the first update; no gradient reaches them")
