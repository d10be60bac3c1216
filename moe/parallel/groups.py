"""Process groups of a run: data parallel over all ranks, expert parallel inside it.

Expert groups are consecutive ranks, expert-data groups are strided, as DeepSpeed lays them out:

    world 4, ep_size 2     expert groups [0 1] [2 3]     expert-data groups [0 2] [1 3]

Every rank holds different tokens. An expert group holds each expert once; an expert-data group holds copies of the
same experts.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import HashStore, ProcessGroup  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a recipe is laid out over ranks. Only `dtype` changes what is computed; the rest changes where."""

    __pydantic_config__ = {"extra": "forbid"}

    ep_size: int = 1  # ranks that share the experts of a layer
    zero_stage: Literal[0, 1, 2] = 1
    dtype: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: bool = False
    timeout_s: float = 600.0  # of one collective

    def validate(self, *, world_size: int) -> None:
        """Raise ValueError for a layout that `world_size` ranks cannot take."""
        check_ep_size(self.ep_size, world_size)
        if self.dtype == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "parallel.zero_stage = 0 keeps no float32 master weights, so bf16 updates would be lost; "
                "use parallel.zero_stage = 1 or 2 with bf16"
            )
        if self.timeout_s <= 0:
            raise ValueError(f"parallel.timeout_s = {self.timeout_s} must be positive")

    def stage_on(self, world_size: int) -> int:
        """Return the ZeRO stage that runs: one rank divides nothing, and takes the lowest that keeps its masters."""
        if world_size > 1:
            return self.zero_stage
        return min(self.zero_stage, 0 if self.dtype == "fp32" else 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelGroups:
    """This rank's place in the world, and the groups it talks to. A group of None is this process alone."""

    rank: int
    world_size: int
    ep_size: int
    ep_rank: int  # which share of the experts this rank holds
    edp_rank: int  # which copy of that share
    device: torch.device
    expert_group: ProcessGroup | None = None
    expert_data_group: ProcessGroup | None = None
    data_group: ProcessGroup | None = None

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> "ParallelGroups":
        """Return the groups of one process that talks to nobody."""
        return cls(rank=0, world_size=1, ep_size=1, ep_rank=0, edp_rank=0, device=torch.device(device))

    @classmethod
    def create(cls, *, ep_size: int, device: torch.device) -> "ParallelGroups":
        """Return the groups of this rank; collective over the initialised default process group.

        Raises:
            ValueError: `ep_size` does not divide the number of ranks.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        check_ep_size(ep_size, world_size)
        expert_group: ProcessGroup | None = None
        expert_data_group: ProcessGroup | None = None
        # every rank takes part in the creation of every group, in the same order
        for start in range(0, world_size, ep_size):
            group = _new_group(list(range(start, start + ep_size)))
            if start <= rank < start + ep_size:
                expert_group = group
        for first in range(ep_size):
            group = _new_group(list(range(first, world_size, ep_size)))
            if rank % ep_size == first:
                expert_data_group = group
        return cls(
            rank=rank,
            world_size=world_size,
            ep_size=ep_size,
            ep_rank=rank % ep_size,
            edp_rank=rank // ep_size,
            device=device,
            expert_group=expert_group,
            expert_data_group=expert_data_group,
            data_group=dist.group.WORLD,
        )


def _new_group(ranks: list[int]) -> ProcessGroup | None:
    group = dist.new_group(ranks)
    # torch returns a marker to ranks outside the group
    return group if isinstance(group, ProcessGroup) else None


def check_ep_size(ep_size: int, world_size: int) -> None:
    """Raise ValueError unless expert groups of `ep_size` ranks tile the world."""
    if ep_size < 1 or world_size % ep_size:
        divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
        raise ValueError(
            f"parallel.ep_size = {ep_size} does not divide the {world_size} ranks of this run; use one of {divisors}"
        )


def launched_world_size() -> int:
    """Return the number of ranks torchrun started, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """Return the rank torchrun gave this process, 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def start_process_group(*, timeout_s: float) -> torch.device:
    """Initialise torch.distributed and return this rank's device; one process needs neither torchrun nor a port."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    use_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return device
    backend = "nccl" if use_gpu else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if launched_world_size() > 1 or "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    return device
