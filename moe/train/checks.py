"""Checks of debug mode: copies of a parameter agree over the ranks, and every parameter moves.

A reduction over the wrong ranks, or one left out, trains on without an error; these checks make it one.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moe.parallel.groups import ParallelGroups
from moe.train.adoption import is_expert_parameter
from moe.train.engine import Engine
from moe.train.state import first_moments, master_weights


class ReplicaError(RuntimeError):
    """Copies of one parameter differ between ranks."""


class UnmovedError(RuntimeError):
    """A trainable parameter is as it was before the first update."""


def check_replicas(model: nn.Module, groups: ParallelGroups) -> None:
    """Raise ReplicaError on all ranks unless all copies of each parameter are equal to the bit. Collective."""
    if groups.data_group is None:
        return
    named = list(model.named_parameters())
    is_expert_N = torch.tensor([is_expert_parameter(parameter) for _, parameter in named], device=groups.device)
    sums_N = torch.stack([_bit_sum(parameter.detach()) for _, parameter in named])
    # every rank makes the same calls; what is no copy of one another is masked
    differs_N = torch.zeros_like(is_expert_N)
    for mask_N, group in ((~is_expert_N, groups.data_group), (is_expert_N, groups.expert_data_group)):
        if group is not None:
            differs_N |= mask_N & ~_is_equal_over(sums_N, group)
    # other ranks may hold copies of other experts: all must hear of it, or they would wait for those that raise
    verdict_N = differs_N.int()
    dist.all_reduce(verdict_N, op=dist.ReduceOp.MAX, group=groups.data_group)
    names = [name for (name, _), differs in zip(named, verdict_N.tolist(), strict=True) if differs]
    if names:
        raise ReplicaError(
            f"{', '.join(names)} differs between the ranks that hold copies of it: its gradient was reduced over the "
            "wrong ranks, or not at all"
        )


def _bit_sum(tensor: Tensor) -> Tensor:
    """Return an int64 that changes with every bit of `tensor`, its place included."""
    bits_N = tensor.reshape(-1).view(torch.int16 if tensor.element_size() == 2 else torch.int32).to(torch.int64)
    # int64 wraps around, on every rank alike
    return (bits_N * torch.arange(1, bits_N.numel() + 1, device=tensor.device)).sum()


def _is_equal_over(sums_N: Tensor, group: ProcessGroup) -> Tensor:
    low_N, high_N = sums_N.clone(), sums_N.clone()
    dist.all_reduce(low_N, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high_N, op=dist.ReduceOp.MAX, group=group)
    return low_N == high_N


def snapshot(engine: Engine) -> dict[str, Tensor]:
    """Return a copy of every trainable float32 weight. Collective."""
    return master_weights(engine)


def check_moved(engine: Engine, before: dict[str, Tensor]) -> None:
    """Raise UnmovedError on all ranks, naming the parameters that an update left as in `before`. Collective.

    Weights are compared in float32: a first small step is lost in the bfloat16 copy. A parameter that moved by weight
    decay alone counts as unmoved: its first moment is zero, so no gradient has ever reached it.
    """
    after, moments = master_weights(engine), first_moments(engine)
    moved_N = torch.tensor(
        [
            moment is not None and bool(moment.any()) and not torch.equal(after[name], before[name])
            for name, moment in moments.items()
        ],
        dtype=torch.int32,
        device=engine.groups.device,
    )
    if engine.groups.data_group is not None:
        # the experts of one rank may all be idle; those of all ranks may not
        dist.all_reduce(moved_N, op=dist.ReduceOp.MAX, group=engine.groups.data_group)
    unmoved = [name for name, is_moved in zip(moments, moved_N.tolist(), strict=True) if not is_moved]
    if unmoved:
        raise UnmovedError(f"{', '.join(unmoved)} did not move in the first update; no gradient reaches them")
