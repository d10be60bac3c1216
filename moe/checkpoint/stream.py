"""Writing tensors one by one, for models that do not fit in memory: a safetensors file, and a checkpoint of such files.

A safetensors file is the length of a JSON header (8 bytes), the header, and the bytes of the tensors in its order
(github.com/huggingface/safetensors). The library writes it from tensors that are all in memory; here only one is.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.checkpoint.atomic import encode_json, fsync_file, fsync_folder, write_durable
from moe.checkpoint.folder import checkpoint_name
from moe.checkpoint.load import hash_file
from moe.checkpoint.manifest import (
    DTYPES,
    MANIFEST,
    STATE,
    FileRecord,
    Manifest,
    PieceRecord,
    TensorRecord,
    check_index,
    encode_manifest,
    num_rows,
)

CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A tensor that is going to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return prod(self.shape) * self.dtype.itemsize


def split_entries(entries: Iterable[Entry], *, limit_bytes: int) -> Iterator[list[Entry]]:
    """Yield the entries in order, in groups of at most `limit_bytes`; one that is larger stands alone."""
    group: list[Entry] = []
    for entry in entries:
        if group and sum(other.bytes for other in group) + entry.bytes > limit_bytes:
            yield group
            group = []
        group.append(entry)
    if group:
        yield group


def write_file(path: Path, entries: list[Entry], tensors: Iterator[Tensor], *, metadata: dict[str, str]) -> FileRecord:
    """Write a safetensors file and flush it to the disk; return its size and sha256.

    Takes one tensor per entry from `tensors` and holds one at a time. Raises ValueError for one that is not as its
    entry says.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for entry in entries:
        span = [end, end + entry.bytes]
        header[entry.name] = {"dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        end = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            file.write(part)
            digest.update(part)
        for entry in entries:
            tensor = next(tensors)
            if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
                raise ValueError(f"{entry.name} is {tensor.dtype} {tuple(tensor.shape)}, not as planned: {entry}")
            raw: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            file.write(raw)
            digest.update(raw)
            del tensor, raw  # or it would stay while the next one is made
    fsync_file(path)
    return FileRecord(bytes=path.stat().st_size, sha256=digest.hexdigest())


def save_stream(
    checkpoints_dir: Path,
    *,
    step: int,
    entries: list[Entry],
    tensors: Iterator[Tensor],
    state: dict[str, Any],
    file_bytes: int = 2 << 30,
) -> Path:
    """Write a checkpoint from tensors that come one by one, in the order of `entries`; return its folder.

    As save_checkpoint, it appears complete or not at all, and is read by the same reader. One process.
    """
    final = checkpoints_dir / checkpoint_name(step)
    temporary = final.with_name(f".tmp-{final.name}")
    checkpoints_dir.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        files, index = {}, {}
        for number, group in enumerate(split_entries(entries, limit_bytes=file_bytes)):
            name = f"rank_{number:05d}.safetensors"
            files[name] = write_file(temporary / name, group, tensors, metadata={})
            for entry in group:
                piece = PieceRecord(file=name, key=entry.name, offset=0, rows=num_rows(entry.shape))
                index[entry.name] = TensorRecord(dtype=CODES[entry.dtype], shape=entry.shape, pieces=(piece,))
        content = encode_json(state)
        write_durable(temporary / STATE, content)
        files[STATE] = FileRecord(bytes=len(content), sha256=hash_file(temporary / STATE))
        manifest = Manifest(step=step, world_size=1, files=files, tensors=index)
        check_index(manifest, final)
        write_durable(temporary / MANIFEST, encode_manifest(manifest))
        fsync_folder(temporary)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(checkpoints_dir)
    return final
