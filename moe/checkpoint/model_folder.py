"""Folders of a model that no run of ours made: imported or upcycled.

model.json                     the ModelConfig
checkpoints/step_00000000/     weights alone
tokenizer/                     of the model it comes from, if it had one
"""

from collections.abc import Iterator
from pathlib import Path

from pydantic import TypeAdapter
from torch import Tensor

from moe.checkpoint.atomic import write_json_atomic
from moe.checkpoint.folder import list_checkpoints
from moe.checkpoint.load import CheckpointReader, newest_checkpoint
from moe.checkpoint.manifest import MANIFEST, CheckpointError
from moe.checkpoint.stream import Entry, save_stream
from moe.config import ModelConfig

MODEL = "model.json"
_CONFIG = TypeAdapter(ModelConfig)


def write_model(
    folder: Path, config: ModelConfig, entries: list[Entry], tensors: Iterator[Tensor], *, origin: str
) -> None:
    """Write configuration and weights of a model into a folder; tensors come one by one, in the order of entries."""
    model = _CONFIG.dump_python(config, mode="json")
    state = {"step": 0, "model": model, "origin": origin}
    save_stream(folder / "checkpoints", step=0, entries=entries, tensors=tensors, state=state)
    write_json_atomic(folder / MODEL, model)


def read_model_config(folder: Path) -> ModelConfig:
    """Return the configuration in a model folder. Raises CheckpointError if there is none, or it is damaged."""
    try:
        config = _CONFIG.validate_json((folder / MODEL).read_bytes())
        config.validate()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / MODEL} is no model configuration: {error}") from error
    return config


def open_model_folder(folder: Path, *, check_hashes: bool = True) -> tuple[ModelConfig, CheckpointReader]:
    """Return configuration and weights of a model folder. Raises CheckpointError for what is missing or damaged."""
    config = read_model_config(folder)
    checkpoints = list_checkpoints(folder / "checkpoints")
    if not checkpoints:
        raise CheckpointError(f"{folder} holds no checkpoint; import or upcycle it again")
    return config, CheckpointReader.open(checkpoints[-1], check_hashes=check_hashes)


def open_any_model(path: Path, *, check_hashes: bool = True) -> tuple[ModelConfig, CheckpointReader]:
    """Return configuration and weights of a model folder, a checkpoint, or the newest checkpoint of a run.

    Raises CheckpointError if `path` is none of these, or is damaged.
    """
    if (path / MODEL).exists():
        return open_model_folder(path, check_hashes=check_hashes)
    folder: Path | None = path
    if not (path / MANIFEST).exists():
        damaged: list[str] = []
        folder = newest_checkpoint(path / "checkpoints", report=damaged.append)
        if damaged:  # an older one is not what was asked for
            raise CheckpointError(f"{path}: {damaged[0]}; to start from an older checkpoint, name it")
        check_hashes = False  # or they would be compared a second time
    if folder is None:
        raise CheckpointError(f"{path} is no model folder, run or checkpoint")
    reader = CheckpointReader.open(folder, check_hashes=check_hashes)
    try:
        return _CONFIG.validate_python(reader.state["recipe"]["model"]), reader
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{folder} does not say what model it holds: {error}") from error
