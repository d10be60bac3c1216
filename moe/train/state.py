"""State of an engine as logical tensors: what a checkpoint holds, whatever the layout.

    model/<parameter>                               float32 master weights
    exp_avg/<parameter>, exp_avg_sq/<parameter>     AdamW moments
    buffer/<name>                                   router state (selection bias)

Expert tensors come as the rows of this rank's experts, with their place in the whole. Reading and writing go through
DeepSpeed's per-parameter calls and are collective: every rank walks the parameters in the same order.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from moe.checkpoint import Shard
from moe.experts import expert_places
from moe.train.adoption import is_expert_parameter
from moe.train.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")


class Reader(Protocol):
    """Where state comes from: rows of logical tensors."""

    def read(self, name: str, *, offset: int = 0, length: int | None = None) -> Tensor: ...


def num_updates(engine: Engine) -> int:
    """Return how often AdamW has updated; all parameters share the count."""
    for state in engine.torch_optimizer.state.values():
        if "step" in state:
            return int(state["step"])
    return 0


def read_state(engine: Engine) -> Iterator[Shard]:
    """Yield the pieces this rank must store; together the ranks yield every logical row exactly once. Collective."""
    if num_updates(engine) == 0:
        raise ValueError("an engine that has not updated yet holds no moments to save")
    if engine.zero_stage:
        _link_moments(engine)
    places = expert_places(engine.module)
    groups = engine.groups
    for name, parameter in engine.module.named_parameters():
        is_expert = is_expert_parameter(parameter)
        is_owner = groups.edp_rank == 0 if is_expert else groups.rank == 0
        for kind in ("model", *MOMENTS):
            tensor = _get(engine, parameter, kind)
            if is_owner:
                num_experts, first = places[name] if is_expert else (0, 0)
                shape = (num_experts, *tensor.shape[1:]) if is_expert else tuple(tensor.shape)
                yield Shard(name=f"{kind}/{name}", tensor=tensor, logical_shape=shape, offset=first)
    if groups.rank == 0:
        for name, buffer in engine.module.named_buffers():
            if name in _persistent_buffers(engine.module):
                yield Shard(name=f"buffer/{name}", tensor=buffer.detach(), logical_shape=tuple(buffer.shape))


@torch.no_grad()
def write_state(engine: Engine, reader: Reader, *, num_updates: int) -> None:
    """Set weights, moments, update count and buffers from `reader`. Collective."""
    if engine.zero_stage:
        _materialise_moments(engine, num_updates)
    places = expert_places(engine.module)
    for name, parameter in engine.module.named_parameters():
        if is_expert_parameter(parameter):
            offset, length = places[name][1], parameter.shape[0]
        else:
            offset, length = 0, None
        values = {
            kind: reader.read(f"{kind}/{name}", offset=offset, length=length).to(parameter.device)
            for kind in ("model", *MOMENTS)
        }
        _set(engine, parameter, values, num_updates)
    for name, buffer in engine.module.named_buffers():
        if name in _persistent_buffers(engine.module):
            buffer.copy_(reader.read(f"buffer/{name}"))


def _persistent_buffers(module: nn.Module) -> frozenset[str]:
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return frozenset(name for name in module.state_dict() if name not in parameters)


def _get(engine: Engine, parameter: nn.Parameter, kind: str) -> Tensor:
    if engine.zero_stage == 0:
        return parameter.detach() if kind == "model" else engine.torch_optimizer.state[parameter][kind]
    value = (
        safe_get_full_fp32_param(parameter)
        if kind == "model"
        else safe_get_full_optimizer_state(parameter, kind)
    )
    assert value is not None, f"DeepSpeed holds no {kind} for a parameter of shape {tuple(parameter.shape)}"
    return value


def _set(engine: Engine, parameter: nn.Parameter, values: dict[str, Tensor], num_updates: int) -> None:
    parameter.data.copy_(values["model"])
    if engine.zero_stage:
        safe_set_full_fp32_param(parameter, values["model"])
        for kind in MOMENTS:
            safe_set_full_optimizer_state(parameter, values[kind], kind)
    else:
        engine.torch_optimizer.state[parameter] = {
            "step": torch.tensor(float(num_updates), device=parameter.device),
            **{kind: values[kind].to(parameter.dtype) for kind in MOMENTS},
        }


def _flat_partitions(engine: Engine) -> list[Tensor]:
    """Return the flat float32 tensors this rank updates: one a parameter group."""
    optimizer = engine.zero_optimizer
    # the bf16 stage-1 optimizer and the ZeRO optimizer name them differently
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return optimizer.single_partition_of_fp32_groups
    return optimizer.fp32_groups_flat_partition


def _link_moments(engine: Engine) -> None:
    """Point each parameter at its moments. With several groups DeepSpeed links only those of the first update."""
    engine.zero_optimizer._hp_optimizer_states_linked = False
    engine.zero_optimizer._lazy_init_hp_params_optimizer_state()


def _materialise_moments(engine: Engine, num_updates: int) -> None:
    """Create the moments that DeepSpeed would create in its first step."""
    for flat in _flat_partitions(engine):
        engine.torch_optimizer.state[flat] = {
            "step": torch.tensor(float(num_updates), device=flat.device),
            **{kind: torch.zeros_like(flat) for kind in MOMENTS},
        }
    _link_moments(engine)
