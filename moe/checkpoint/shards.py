"""Shards: the pieces of logical tensors that one rank brings to a checkpoint, and how they fit together."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe.checkpoint.manifest import DTYPES, CheckpointError, PieceRecord, TensorRecord, num_rows

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One rank's piece of a logical tensor: its rows `offset` to `offset + len(tensor)`, with all columns."""

    name: str  # of the logical tensor: "model/layers.0.moe.experts.gate_up_proj", "exp_avg/..."
    tensor: Tensor  # any device, any strides; unchanged until the save returns
    logical_shape: tuple[int, ...]  # of the whole tensor
    offset: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Pieces:
    """What one rank writes: tensors by their key in its file, and their index as plain JSON."""

    tensors: dict[str, Tensor]  # on the CPU, contiguous, no two sharing memory
    index: list[dict[str, Any]]  # name, dtype, shape, key, offset, rows of each


def collect(shards: Iterable[Shard]) -> Pieces:
    """Return the shards of one rank, on the CPU. Raises ValueError for one that is no part of its tensor."""
    pieces = Pieces(tensors={}, index=[])
    addresses: set[int] = set()
    for shard in shards:
        _check(shard)
        rows = num_rows(tuple(shard.tensor.shape))
        if rows == 0 and num_rows(shard.logical_shape) > 0:
            continue  # this rank has no part of the tensor
        key = shard.name if shard.offset == 0 else f"{shard.name}@{shard.offset}"
        if key in pieces.tensors:
            raise ValueError(f"one rank brings two pieces that would be stored as {key!r}")
        pieces.tensors[key] = _own(shard.tensor.detach().cpu().contiguous(), addresses)
        pieces.index.append(
            {
                "name": shard.name,
                "dtype": _DTYPE_NAMES[shard.tensor.dtype],
                "shape": list(shard.logical_shape),
                "key": key,
                "offset": shard.offset,
                "rows": rows,
            }
        )
    return pieces


def merge(index_of_file: dict[str, list[dict[str, Any]]]) -> dict[str, TensorRecord]:
    """Return the logical tensors made up by the pieces of all files. CheckpointError if they disagree."""
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    records: dict[str, list[PieceRecord]] = {}
    for file, index in index_of_file.items():
        for piece in index:
            name, kind = piece["name"], (piece["dtype"], tuple(piece["shape"]))
            if kinds.setdefault(name, kind) != kind:
                raise CheckpointError(f"the pieces of {name!r} disagree: {kinds[name]}, but {kind} in {file}")
            record = PieceRecord(file=file, key=piece["key"], offset=piece["offset"], rows=piece["rows"])
            records.setdefault(name, []).append(record)
    return {
        name: TensorRecord(dtype=dtype, shape=shape, pieces=tuple(records[name]))
        for name, (dtype, shape) in kinds.items()
    }


def _check(shard: Shard) -> None:
    shape, part = tuple(shard.logical_shape), tuple(shard.tensor.shape)
    if shard.name in ("", "__metadata__"):
        raise ValueError(f"{shard.name!r} cannot be the name of a tensor: safetensors keeps it for itself")
    if len(part) != len(shape) or part[1:] != shape[1:]:
        raise ValueError(f"{shard.name!r}: a piece of shape {part} is no part of the shape {shape}")
    if shard.offset < 0 or shard.offset + num_rows(part) > num_rows(shape):
        raise ValueError(f"{shard.name!r}: {num_rows(part)} rows from {shard.offset} are outside of {shape}")
    if shard.tensor.dtype not in _DTYPE_NAMES:
        known = ", ".join(str(dtype) for dtype in _DTYPE_NAMES)
        raise ValueError(f"{shard.name!r} is {shard.tensor.dtype}, which checkpoints do not store: only {known}")


def _own(tensor: Tensor, addresses: set[int]) -> Tensor:
    """Return `tensor`, copied if its memory is part of something larger or already in `addresses`.

    A view of a few rows would keep the whole tensor alive until the save; safetensors refuses tied weights.
    """
    storage = tensor.untyped_storage()
    if storage.nbytes() != tensor.nbytes or (storage.nbytes() > 0 and storage.data_ptr() in addresses):
        return tensor.clone()
    addresses.add(storage.data_ptr())
    return tensor
