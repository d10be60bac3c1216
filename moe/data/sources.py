"""A source: what stands in `data.sources`, opened. Built-in text, a user's text, or a user's token ids."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moe.data.corpus import BUILTINS, GENERATOR_VERSION, builtin_documents
from moe.data.documents import Documents
from moe.data.formats import check_readable, is_dataset_folder, read_documents, text_files
from moe.data.megatron import megatron_paths, open_megatron

PREFIX = "builtin:"
TOKEN_SUFFIXES = (".bin", ".idx")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Documents that can be read again and again, and what is known of them beforehand."""

    description: str
    licence: str
    inputs: list[Any]  # JSON values that change when the documents do; caches are keyed by them
    documents: Callable[[], Documents]
    wanted_bytes: int = 0  # of a built-in domain


def check_source(spec: str) -> None:
    """Raise ValueError, with the remedy, if `spec` is no source. Takes milliseconds: no text is read."""
    if spec.startswith(PREFIX):
        if spec.removeprefix(PREFIX) not in BUILTINS:
            raise ValueError(f"{spec!r} is unknown; built in are {', '.join(PREFIX + name for name in BUILTINS)}")
    elif is_tokenised(spec):
        megatron_paths(Path(spec))
    else:
        check_readable(Path(spec))


def is_tokenised(spec: str) -> bool:
    """Return whether a source holds token ids instead of text."""
    return Path(spec).suffix in TOKEN_SUFFIXES and not spec.startswith(PREFIX)


def open_source(spec: str, *, text_field: str, builtin_bytes: int) -> Source:
    """Return the source that `spec` means. Raises ValueError where `check_source` does."""
    check_source(spec)
    if spec.startswith(PREFIX):
        return _builtin(spec.removeprefix(PREFIX), builtin_bytes)
    path = Path(spec)
    if is_tokenised(spec):
        return Source(
            description=str(path.resolve()),
            licence="the user's own text",
            inputs=[_stamp(part, path.parent) for part in megatron_paths(path)],
            documents=lambda: open_megatron(path).documents(),
        )
    files = path.rglob("*") if is_dataset_folder(path) else text_files(path)
    root = path if path.is_dir() else path.parent
    return Source(
        description=str(path.resolve()),
        licence="the user's own text",
        inputs=[text_field, *(_stamp(file, root) for file in sorted(files) if file.is_file())],
        documents=partial(read_documents, path, text_field=text_field),
    )


def _builtin(name: str, num_bytes: int) -> Source:
    documents = cache(partial(builtin_documents, name, num_bytes))  # read once: it is small, and slow to collect
    builtin = BUILTINS[name]
    return Source(
        description=builtin.source,
        licence=builtin.licence,
        inputs=[
            PREFIX + name,
            GENERATOR_VERSION,
            num_bytes,
            *([list(sys.version_info[:3])] if builtin.reads_standard_library else []),
            *([package, version(package)] for package in builtin.packages),
        ],
        documents=lambda: iter(documents()),
        wanted_bytes=num_bytes,
    )


def _stamp(file: Path, root: Path) -> list[Any]:
    """Return path, size and time of change: what tells, without reading a file, that it is still the same."""
    status = file.stat()
    return [file.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns]
