"""Prepared data on disk: a folder of token files, a tokenizer and a manifest that vouches for them.

Per domain and part: `NAME.train.tokens` (little-endian uint16, or uint32 for more than 65536 tokens),
`NAME.train.starts` (int64, where each document starts, and the end) and `NAME.train.counts` (int64, how
often each token occurs). The manifest holds size and sha256 of every file. On opening, sizes are always
compared, contents up to HASH_LIMIT bytes: what is larger is a corpus that took long to build and would take
long to read at every start.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

Packing = Literal["concatenate", "pad"]

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
FORMAT = 1  # of the folder; raise it when older folders can no longer be read
HASH_LIMIT = 64 * 2**20
PARTS = ("train", "validation")


class DamagedDataError(ValueError):
    """A folder of prepared data that does not hold what its manifest says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFile:
    """The tokens of one part of a domain, memory-mapped. Every document ends with the end-of-text token."""

    tokens: np.ndarray  # uint16 or uint32
    starts: np.ndarray  # int64, one more than there are documents; the last is the end
    counts: np.ndarray  # int64, occurrences of each token of the vocabulary
    num_bytes: int  # of the text in UTF-8; 0 where the data came as token ids

    @property
    def num_tokens(self) -> int:
        """Tokens, those that end documents included."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Documents."""
        return len(self.starts) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """One kind of text."""

    name: str
    index: int  # in PreparedData.domains
    weight: float
    share: float  # of the training sequences, 0..1
    packing: Packing
    eos_token_id: int
    train: TokenFile
    validation: TokenFile


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedData:
    """Tokenised text, ready to be batched."""

    directory: Path
    tokenizer_dir: Path  # AutoTokenizer loads it
    vocab_size: int
    eos_token_id: int
    fingerprint: str  # equal for the same token ids in the same order, wherever and whenever they were built
    domains: tuple[Domain, ...]  # by name


class TokenWriter:
    """Writes one part of a domain, document by document, within a `with` block."""

    def __init__(self, folder: Path, stem: str, *, vocab_size: int) -> None:
        self._folder, self._stem = folder, stem
        self._dtype = token_dtype(vocab_size)
        self._starts = array("q", [0])
        self._count_V = np.zeros(vocab_size, np.int64)
        self._num_bytes = 0

    def __enter__(self) -> "TokenWriter":
        self._file = (self._folder / f"{self._stem}.tokens").open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, token_N: np.ndarray, *, num_bytes: int) -> None:
        """Append a document. The ids must be 0..vocab_size-1."""
        self._file.write(token_N.astype(self._dtype).tobytes())
        self._starts.append(self._starts[-1] + len(token_N))
        np.add.at(self._count_V, token_N, 1)
        self._num_bytes += num_bytes

    def finish(self) -> dict[str, int]:
        """Write what is left to write. Returns what the manifest says of the part."""
        _sync(self._file)
        for kind, values in (("starts", np.array(self._starts)), ("counts", self._count_V)):
            with (self._folder / f"{self._stem}.{kind}").open("wb") as file:
                file.write(values.astype("<i8").tobytes())
                _sync(file)
        return {"bytes": self._num_bytes, "documents": len(self._starts) - 1, "tokens": self._starts[-1]}


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type in which ids below `vocab_size` are stored."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of a finished folder: `content`, every file with size and sha256, the fingerprint.

    Args:
        content: vocab_size, eos_token_id, and domains by name, with what is known of each.
    """
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"format": FORMAT, "fingerprint": _fingerprint(content, files), **content, "files": files}
    manifest["checksum"] = _checksum(manifest)
    with (folder / MANIFEST).open("wb") as file:
        file.write(json.dumps(manifest, indent=2).encode())
        _sync(file)


def open_prepared(folder: Path, *, weights: Mapping[str, float], packing: Packing = "concatenate") -> PreparedData:
    """Open a folder that `prepare` built, after comparing it with its manifest.

    Args:
        weights: by domain, 1 where missing.
        packing: how its documents are to become sequences.

    Raises DamagedDataError, with the file, if one is missing, has another size or other content.
    """
    manifest = _read_manifest(folder)
    _check_files(folder, manifest["files"])
    weight_of = {name: float(weights.get(name, 1.0)) for name in sorted(manifest["domains"])}
    total = sum(weight_of.values())
    domains = tuple(
        Domain(
            name=name,
            index=index,
            weight=weight,
            share=weight / total,
            packing=packing,
            eos_token_id=manifest["eos_token_id"],
            train=_open_tokens(folder, name, "train", manifest),
            validation=_open_tokens(folder, name, "validation", manifest),
        )
        for index, (name, weight) in enumerate(weight_of.items())
    )
    return PreparedData(
        directory=folder,
        tokenizer_dir=folder / TOKENIZER,
        vocab_size=manifest["vocab_size"],
        eos_token_id=manifest["eos_token_id"],
        fingerprint=manifest["fingerprint"],
        domains=domains,
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DamagedDataError(f"{path} is missing: {folder} is no finished folder of prepared data") from error
    except ValueError as error:
        raise DamagedDataError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.pop("checksum", None) != _checksum(manifest):
        raise DamagedDataError(f"{path} is damaged: it does not match its own checksum")
    if manifest["format"] != FORMAT:
        raise DamagedDataError(f"{path} has format {manifest['format']}; this version reads format {FORMAT}")
    return manifest


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name, known in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise DamagedDataError(f"{path} is missing")
        if size != known["bytes"]:
            raise DamagedDataError(f"{path} is damaged: {size} bytes, written were {known['bytes']}")
        if size <= HASH_LIMIT and _sha256(path) != known["sha256"]:
            raise DamagedDataError(f"{path} is damaged: its content is not what was written (sha256 differs)")


def _open_tokens(folder: Path, name: str, part: str, manifest: Mapping[str, Any]) -> TokenFile:
    stem = folder / f"{name}.{part}"
    return TokenFile(
        tokens=np.memmap(f"{stem}.tokens", dtype=token_dtype(manifest["vocab_size"]), mode="r"),
        starts=np.memmap(f"{stem}.starts", dtype="<i8", mode="r"),
        counts=np.memmap(f"{stem}.counts", dtype="<i8", mode="r"),
        num_bytes=manifest["domains"][name][part]["bytes"],
    )


def _fingerprint(content: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a hash of the token ids of all domains, and of nothing else."""
    names: Iterable[str] = sorted(content["domains"])
    stems = [f"{name}.{part}.{kind}" for name in names for part in PARTS for kind in ("tokens", "starts")]
    facts = [
        content["vocab_size"],
        content["eos_token_id"],
        [[stem, files[stem]["sha256"]] for stem in stems],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(file: BinaryIO) -> None:
    """Bring a file to the disk, so that the folder cannot be renamed into place before its content is there."""
    file.flush()
    os.fsync(file.fileno())
