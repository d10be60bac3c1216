"""Reading a checkpoint: verify every byte first, then hand out rows of logical tensors of any layout."""

import hashlib
import json
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe.checkpoint.folder import list_checkpoints, step_of
from moe.checkpoint.manifest import (
    DTYPES,
    STATE,
    CheckpointError,
    FileRecord,
    Manifest,
    PieceRecord,
    TensorRecord,
    num_rows,
    read_manifest,
)


class CheckpointReader:
    """An opened, verified checkpoint. Its files stay open: removing the folder does not disturb a reader."""

    def __init__(self, *, path: Path, manifest: Manifest, state: dict[str, Any], files: dict[str, safe_open]) -> None:
        self.path = path
        self.state = state
        self.step = manifest.step
        self.names = frozenset(manifest.tensors)
        self._tensors = manifest.tensors
        self._files = files

    @classmethod
    def open(cls, path: Path, *, check_hashes: bool = True) -> "CheckpointReader":
        """Return a reader of the checkpoint in the folder `path`, after verifying all of it.

        `check_hashes=False` skips the sha256 of the files, not the rest: for a checkpoint that has been
        verified a moment ago, by `newest_checkpoint` or on another rank. Raises CheckpointError that names
        the file at fault and the newest good checkpoint beside it.
        """
        try:
            return _open(path, check_hashes=check_hashes)
        except CheckpointError as error:
            others = [other for other in list_checkpoints(path.parent) if other.name != path.name]
            good = newest_of(others, report=lambda _: None)
            offer = f"the newest good checkpoint beside it is {good}" if good else "no good one is beside it"
            raise CheckpointError(f"{error}; {offer}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the logical (unsharded) shape of the tensor `name`."""
        return self._record(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which the tensor `name` is stored."""
        return DTYPES[self._record(name).dtype]

    def read(self, name: str, *, offset: int = 0, length: int | None = None) -> Tensor:
        """Return rows `offset` to `offset + length` (default: to the end) of the tensor `name`, on the CPU.

        Only what holds these rows is read. A tensor without dimensions counts as one row. The result owns its
        memory. Raises CheckpointError for a name that is not there, ValueError for rows that are not.
        """
        record = self._record(name)
        total = num_rows(record.shape)
        length = total - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > total or (not record.shape and length != 1):
            raise ValueError(f"{length} rows from row {offset} of {name!r}: its shape is {record.shape}")
        # Always copied: what safetensors returns shares memory with every other read of the same piece.
        if not record.shape:
            piece = record.pieces[0]
            return self._files[piece.file].get_tensor(piece.key).clone()
        rows = torch.empty((length, *record.shape[1:]), dtype=DTYPES[record.dtype])
        for piece in record.pieces:
            first = max(offset, piece.offset)
            last = min(offset + length, piece.offset + piece.rows)
            if first < last:
                stored = self._files[piece.file].get_slice(piece.key)
                rows[first - offset : last - offset] = stored[first - piece.offset : last - piece.offset]
        return rows

    def _record(self, name: str) -> TensorRecord:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path} holds no tensor {name!r}, only {len(self._tensors)} others")
        return self._tensors[name]


def newest_checkpoint(checkpoints_dir: Path, *, report: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint in `checkpoints_dir` that verifies completely, None if there is none.

    Each damaged one on the way goes to `report` by name and is left where it is. Leftovers of interrupted
    saves are not checkpoints and are passed over.
    """
    return newest_of(list_checkpoints(checkpoints_dir), report=report)


def newest_of(paths: list[Path], *, report: Callable[[str], None]) -> Path | None:
    """Return the last of `paths` (oldest first) that verifies; damaged ones after it go to `report`."""
    for path in reversed(paths):
        try:
            _open(path, check_hashes=True)
        except CheckpointError as error:
            report(f"checkpoint {path.name} is skipped: {error}")
        else:
            return path
    return None


def hash_file(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal text. Raises CheckpointError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _open(path: Path, *, check_hashes: bool) -> CheckpointReader:
    manifest = read_manifest(path)
    if step_of(path) not in (None, manifest.step):
        raise CheckpointError(f"{path} holds step {manifest.step}: the folder was renamed")
    _check_files(path, manifest.files, check_hashes=check_hashes)
    state = _read_state(path / STATE)
    files = _open_tensors(path, manifest)
    return CheckpointReader(path=path, manifest=manifest, state=state, files=files)


def _check_files(path: Path, files: dict[str, FileRecord], *, check_hashes: bool) -> None:
    # The sizes of all files come first: that finds most damage without reading anything.
    for name, record in files.items():
        try:
            status = os.lstat(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name} is missing or unreadable: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path / name} is not a regular file; refused")
        if status.st_size != record.bytes:
            raise CheckpointError(f"{path / name} has {status.st_size} bytes instead of {record.bytes}")
    if not check_hashes:
        return
    # hashlib releases the interpreter lock, so the files are hashed in parallel.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        digests = pool.map(hash_file, [path / name for name in files])
        for (name, record), digest in zip(files.items(), digests, strict=True):
            if digest != record.sha256:
                raise CheckpointError(f"{path / name} is damaged: its sha256 does not match the manifest")


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not an object")
    return state


def _open_tensors(path: Path, manifest: Manifest) -> dict[str, safe_open]:
    """Return the open safetensors files by name, after holding their headers against the index."""
    files: dict[str, safe_open] = {}
    for name, record in manifest.tensors.items():
        for piece in record.pieces:
            place = f"{path / piece.file}: tensor {name!r}"
            try:
                if piece.file not in files:
                    files[piece.file] = safe_open(path / piece.file, framework="pt")
                _check_header(place, files[piece.file], record, piece)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{place} cannot be read: {error}") from error
    return files


def _check_header(place: str, file: safe_open, record: TensorRecord, piece: PieceRecord) -> None:
    stored = file.get_slice(piece.key)
    found = (stored.get_dtype(), tuple(stored.get_shape()))
    expected = (record.dtype, (piece.rows, *record.shape[1:]) if record.shape else ())
    if found != expected:
        raise CheckpointError(f"{place} has a piece that is {found}, where the manifest says {expected}")
