"""Agreement between ranks on small Python values: results of rank 0 for all, values of all for all."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from moe.parallel.groups import ParallelGroups

T = TypeVar("T")


def on_first_rank(groups: ParallelGroups, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its result on every rank; if it raises, every rank raises the same. Collective.

    The result must be small and picklable; it travels between the ranks of one run only.
    """
    if groups.data_group is None or groups.world_size == 1:
        return work()
    outcome: list[Any] = [None, None]
    if groups.rank == 0:
        try:
            outcome[0] = work()
        except Exception as error:  # noqa: BLE001 - raised below, on every rank
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, group=groups.data_group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def all_gather(groups: ParallelGroups, value: T) -> list[T]:
    """Return the small picklable `value` of every rank, in rank order. Collective."""
    if groups.data_group is None or groups.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * groups.world_size
    dist.all_gather_object(gathered, value, group=groups.data_group)
    return gathered
