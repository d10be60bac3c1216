"""Checkpoints: named logical tensors on disk, complete or absent, readable into any layout, without pickle.

All but weights.py knows nothing of engines or models. Whoever saves hands over `Shard`s, pieces of logical tensors
along dimension 0; whoever loads asks for rows of a logical tensor, however it was cut. docs/checkpoints.md
describes the files.
"""

from moe.checkpoint.atomic import write_json_atomic, write_text_atomic
from moe.checkpoint.folder import list_checkpoints, remove_leftovers
from moe.checkpoint.load import CheckpointReader, newest_checkpoint
from moe.checkpoint.lock import RunLock, RunLockedError
from moe.checkpoint.manifest import CheckpointError
from moe.checkpoint.model_folder import open_any_model, open_model_folder, read_model_config
from moe.checkpoint.retention import prune
from moe.checkpoint.save import Gather, save_checkpoint
from moe.checkpoint.shards import Shard
from moe.checkpoint.weights import load_weights

__all__ = [
    "CheckpointError",
    "CheckpointReader",
    "Gather",
    "RunLock",
    "RunLockedError",
    "Shard",
    "list_checkpoints",
    "load_weights",
    "newest_checkpoint",
    "open_any_model",
    "open_model_folder",
    "prune",
    "read_model_config",
    "remove_leftovers",
    "save_checkpoint",
    "write_json_atomic",
    "write_text_atomic",
]
