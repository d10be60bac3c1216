"""State of an engine as logical tensors: what a checkpoint holds, whatever the layout.

    model/<parameter>                               float32 master weights
    exp_avg/<parameter>, exp_avg_sq/<parameter>     AdamW moments, of what is trained
    buffer/<name>                                   router state (selection bias)

Expert tensors come as the rows of this rank's experts, with their place in the whole. Reading and writing go through
DeepSpeed's per-parameter calls and are collective: every rank walks the parameters in the same order.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from moe.checkpoint import Shard
from moe.experts import expert_places
from moe.train.adoption import KINDS, MOMENTS, Kind, is_expert_parameter, link_moments, read_full, write_full
from moe.train.engine import Engine


class Reader(Protocol):
    """Where state comes from: rows of logical tensors."""

    def read(self, name: str, *, offset: int = 0, length: int | None = None) -> Tensor: ...


def master_weights(engine: Engine) -> dict[str, Tensor]:
    """Return a copy of every trainable float32 weight this rank works with, by name. Collective."""
    named = engine.module.named_parameters()
    return {name: _get(engine, p, "model").detach().clone() for name, p in named if p.requires_grad}


def first_moments(engine: Engine) -> dict[str, Tensor | None]:
    """Return AdamW's first moment of every trainable parameter by name; None where it never updated. Collective."""
    if engine.zero_stage:
        link_moments(engine.zero_optimizer)
        return {name: _get(engine, p, "exp_avg") for name, p in engine.module.named_parameters() if p.requires_grad}
    state = engine.torch_optimizer.state
    return {name: state[p].get("exp_avg") for name, p in engine.module.named_parameters() if p.requires_grad}


def num_updates(engine: Engine) -> int:
    """Return how often AdamW has updated; all parameters share the count."""
    for state in engine.torch_optimizer.state.values():
        if "step" in state:
            return int(state["step"])
    return 0


def read_state(engine: Engine) -> Iterator[Shard]:
    """Yield the pieces this rank must store; together the ranks yield every logical row exactly once. Collective."""
    if num_updates(engine) == 0:
        _materialise_moments(engine, num_updates=0)
    if engine.zero_stage:
        link_moments(engine.zero_optimizer)
    places = expert_places(engine.module)
    groups = engine.groups
    for name, parameter in engine.module.named_parameters():
        is_expert = is_expert_parameter(parameter)
        is_owner = groups.edp_rank == 0 if is_expert else groups.rank == 0
        for kind in _kinds(parameter):
            tensor = _get(engine, parameter, kind)
            if is_owner:
                num_experts, first = places[name] if is_expert else (0, 0)
                shape = (num_experts, *tensor.shape[1:]) if is_expert else tuple(tensor.shape)
                yield Shard(name=f"{kind}/{name}", tensor=tensor, logical_shape=shape, offset=first)
    if groups.rank == 0:
        for name, buffer in _persistent_buffers(engine.module).items():
            yield Shard(name=f"buffer/{name}", tensor=buffer, logical_shape=tuple(buffer.shape))


@torch.no_grad()
def write_state(engine: Engine, reader: Reader, *, num_updates: int) -> None:
    """Set weights, moments, update count and buffers from `reader`. Collective."""
    _materialise_moments(engine, num_updates=num_updates)
    places = expert_places(engine.module)
    for name, parameter in engine.module.named_parameters():
        offset, length = (places[name][1], parameter.shape[0]) if is_expert_parameter(parameter) else (0, None)
        for kind in _kinds(parameter):
            value = reader.read(f"{kind}/{name}", offset=offset, length=length)
            _set(engine, parameter, kind, value.to(parameter.device))
    for name, buffer in _persistent_buffers(engine.module).items():
        buffer.copy_(reader.read(f"buffer/{name}"))


def _persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in parameters}


def _kinds(parameter: nn.Parameter) -> tuple[Kind, ...]:
    return KINDS if parameter.requires_grad else ("model",)


def _get(engine: Engine, parameter: nn.Parameter, kind: Kind) -> Tensor:
    if not parameter.requires_grad:
        # no optimizer holds it, so under bfloat16 this is all there is
        return parameter.detach().float() if parameter.dtype == torch.bfloat16 else parameter.detach()
    if engine.zero_stage:
        return read_full(parameter, kind)
    return parameter.detach() if kind == "model" else engine.torch_optimizer.state[parameter][kind]


def _set(engine: Engine, parameter: nn.Parameter, kind: Kind, value: Tensor) -> None:
    if kind == "model":
        # the working weight, which under ZeRO is a copy of the master
        parameter.data.copy_(value)
    if engine.zero_stage and parameter.requires_grad:
        write_full(parameter, kind, value)
    elif kind != "model":
        engine.torch_optimizer.state[parameter][kind].copy_(value)


def _materialise_moments(engine: Engine, *, num_updates: int) -> None:
    """Create the AdamW state that the first update would create."""
    for group in engine.torch_optimizer.param_groups:
        # under ZeRO these are the flat float32 partitions of this rank
        for parameter in group["params"]:
            engine.torch_optimizer.state[parameter] = {
                "step": torch.tensor(float(num_updates), device=parameter.device),
                **{kind: torch.zeros_like(parameter, requires_grad=False) for kind in MOMENTS},
            }
    if engine.zero_stage:
        link_moments(engine.zero_optimizer)
