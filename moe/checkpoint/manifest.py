"""The manifest: size and sha256 of every file of a checkpoint, and which rows of which tensor lie where.

The manifest comes from a disk, so nothing in it is believed before it is checked: its own checksum, its
types, its file names (none may lead out of the folder) and its index (every logical tensor covered exactly
once).
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = "moe-checkpoint"
VERSION = 1

# The names on the left are those of the safetensors format.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# One path component without a leading dot: it cannot leave the folder, and cannot be a hidden file.
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_Count = Annotated[int, Field(ge=0, lt=2**63)]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or cannot be trusted. The message names the file and the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """What a file of the checkpoint has to be."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    bytes: _Count
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PieceRecord:
    """Rows `offset` to `offset + rows` of a logical tensor are the tensor `key` of the file `file`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    file: str
    key: str
    offset: _Count
    rows: _Count


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRecord:
    """A logical tensor: dtype as safetensors spells it, unsharded shape, and the pieces that make it up."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    dtype: str
    shape: tuple[_Count, ...]
    pieces: tuple[PieceRecord, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything that manifest.json holds, but for its own checksum."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    step: _Count
    world_size: _Count  # ranks that wrote it; a reader may have any other number
    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]
    format: str = FORMAT
    version: int = VERSION


_PARSER = TypeAdapter(Manifest)  # built once: 10 ms


def num_rows(shape: tuple[int, ...]) -> int:
    """Return the length of dimension 0; a tensor without dimensions counts as one row."""
    return shape[0] if shape else 1


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the content of manifest.json: canonical JSON that carries its own sha256."""
    return _seal(asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Return the checked manifest of the checkpoint in `folder`. Raises CheckpointError if it is wrong."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a checkpoint: there is no such folder")
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint: {MANIFEST} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    manifest = _decode(raw, path)
    check_index(manifest, path)
    return manifest


def check_index(manifest: Manifest, path: Path) -> None:
    """Raise CheckpointError, naming `path`, unless files stay in the folder and cover every tensor once."""
    for name in manifest.files:
        if not _FILE_NAME.fullmatch(name):
            raise CheckpointError(f"{path}: {name!r} is not the name of a file inside the checkpoint; refused")
    if STATE not in manifest.files:
        raise CheckpointError(f"{path} does not list {STATE}")
    for name, record in manifest.tensors.items():
        _check_tensor(f"{path}: tensor {name!r}", record, manifest.files)


def _check_tensor(what: str, record: TensorRecord, files: dict[str, FileRecord]) -> None:
    if record.dtype not in DTYPES:
        raise CheckpointError(f"{what} has the unknown dtype {record.dtype!r}")
    if not record.pieces or (not record.shape and len(record.pieces) != 1):
        raise CheckpointError(f"{what} of shape {record.shape} is in {len(record.pieces)} pieces")
    end = 0
    for piece in sorted(record.pieces, key=lambda piece: (piece.offset, piece.rows)):
        if piece.file not in files:
            raise CheckpointError(f"{what} is said to be in {piece.file!r}, which is not listed")
        if piece.offset > end:
            raise CheckpointError(f"{what} lacks rows {end}..{piece.offset - 1}")
        if piece.offset < end:
            raise CheckpointError(f"{what} has row {piece.offset} twice")
        end += piece.rows
    if end != num_rows(record.shape):
        raise CheckpointError(f"{what} has {end} rows stored, and the shape {record.shape}")


def _seal(body: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(_canonical(body)).hexdigest()
    return _canonical({**body, "sha256": digest})


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def _decode(raw: bytes, path: Path) -> Manifest:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(body, dict):
        raise CheckpointError(f"{path} is damaged: it holds a {type(body).__name__}, not an object")
    body.pop("sha256", None)
    # It has to be the very text we would write: a flipped bit shows even in white space or a repeated key.
    if _seal(body) != raw:
        raise CheckpointError(f"{path} is damaged or was edited: its checksum does not match")
    if body.get("format") != FORMAT or body.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format {body.get('format')!r} version {body.get('version')!r}; this program reads "
            f"{FORMAT!r} version {VERSION}: use the release that wrote it"
        )
    try:
        return _PARSER.validate_json(_canonical(body), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path} is malformed: {field}: {first['msg']}") from error
