"""Weights of a checkpoint into a model that is not being trained: for evaluation and sampling, on any layout."""

import torch
from torch import nn

from moe.checkpoint.load import CheckpointReader
from moe.checkpoint.manifest import CheckpointError
from moe.experts import expert_places


@torch.no_grad()
def load_weights(model: nn.Module, reader: CheckpointReader) -> None:
    """Fill the parameters and buffers of `model`; experts get the rows of this rank.

    Raises CheckpointError naming the first tensor that is missing or has another shape.
    """
    places = expert_places(model)
    for name, parameter in model.named_parameters():
        _, offset = places.get(name, (0, 0))
        length = parameter.shape[0] if name in places else None
        parameter.copy_(_read(reader, f"model/{name}", parameter, offset, length))
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, buffer in model.state_dict(keep_vars=True).items():
        if name not in parameters:
            buffer.copy_(_read(reader, f"buffer/{name}", buffer, 0, None))


def _read(reader: CheckpointReader, name: str, into: torch.Tensor, offset: int, length: int | None) -> torch.Tensor:
    if name not in reader.names:
        raise CheckpointError(f"{reader.path} holds no {name}; it is a checkpoint of another model")
    tensor = reader.read(name, offset=offset, length=length)
    if tensor.shape != into.shape:
        raise CheckpointError(
            f"{reader.path}: {name} is {tuple(tensor.shape)}, the model wants {tuple(into.shape)}; "
            "it is a checkpoint of another model"
        )
    return tensor
