"""Dense models that upcycling starts from: a folder of transformers, a model folder, a run or a checkpoint of ours."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe.checkpoint import CheckpointError, open_any_model
from moe.checkpoint.stream import Entry
from moe.config import ModelConfig
from moe.convert import ConversionError
from moe.convert.hf import open_source
from moe.model import Model
from moe.parallel.groups import ParallelGroups
from moe.upcycle import DenseLayer

EMBEDDING = "model/embed_tokens.weight"


@dataclass(frozen=True, kw_only=True)
class DenseModel:
    """A dense model on disk. Tensors have the names of a checkpoint, `model/layers.0.feed_forward.up_proj.weight`."""

    path: Path
    config: ModelConfig
    kind: str  # whose folder it is
    dtypes: dict[str, torch.dtype]
    tensor: Callable[[str], Tensor]
    tokenizer_dir: Path

    def feed_forward(self, index: int) -> DenseLayer:
        """Return the weights of one layer's feed-forward in float32."""
        prefix = f"model/layers.{index}.feed_forward."
        gate, up, down = (self.tensor(f"{prefix}{name}_proj.weight").float() for name in ("gate", "up", "down"))
        return DenseLayer(gate_FD=gate, up_FD=up, down_DF=down)


def open_dense(path: Path) -> DenseModel:
    """Return a dense model. Of a folder of transformers reads headers only; one of ours is held against its hashes.

    Raises ConversionError for a folder that holds no model, one with experts, or a damaged one.
    """
    if (path / "config.json").is_file():
        source = open_source(path)
        model = DenseModel(
            path=path,
            config=source.config,
            kind=source.folder.family.model_type,
            dtypes={entry.name: entry.dtype for entry in source.entries},
            tensor=source.tensor,
            tokenizer_dir=path,
        )
    else:
        try:
            config, reader = open_any_model(path)
        except CheckpointError as error:
            raise ConversionError(f"{error}; nor is it a folder of transformers, which has a config.json") from error
        names = [name for name in reader.names if name.startswith("model/")]
        # a checkpoint lies in RUN/checkpoints/step_x, a tokenizer in RUN/tokenizer
        root = path if (path / "checkpoints").is_dir() else path.parent.parent
        model = DenseModel(
            path=path,
            config=config,
            kind="a model of ours",
            dtypes={name: reader.dtype(name) for name in names},
            tensor=reader.read,
            tokenizer_dir=root / "tokenizer",
        )
    if model.config.num_experts:
        raise ConversionError(
            f"{path} has experts already ({model.config.num_experts} a layer); upcycling starts from a dense model"
        )
    return model


def check_alike(first: DenseModel, other: DenseModel) -> None:
    """Raise ConversionError naming the fields in which two models differ: their weights could not be mixed."""
    differences = other.config.differences(first.config)
    if differences:
        raise ConversionError(f"{other.path} is another architecture than {first.path}: {'; '.join(differences)}")


def entries_of(config: ModelConfig, like: DenseModel) -> list[Entry]:
    """Return the tensors of a model with the widths of `like`, each in the dtype that it has there."""
    with torch.device("meta"):
        model = Model(config, groups=ParallelGroups.single())
    return [
        Entry(
            name=f"model/{name}",
            dtype=like.dtypes.get(f"model/{name}", like.dtypes[EMBEDDING]),
            shape=tuple(parameter.shape),
        )
        for name, parameter in model.named_parameters()
    ]
