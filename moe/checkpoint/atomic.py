"""Writes that survive a crash: a reader finds the old content or the new one, never a part of either.

The order is the whole trick: write beside the target, flush the bytes to the disk, rename, flush the folder
that holds the name. Without the first flush a power cut can leave the new name with no bytes behind it;
without the last the rename itself may be lost.
"""

import json
import os
from pathlib import Path
from typing import Any


def fsync_file(path: Path) -> None:
    """Flush the bytes of the file at `path` to the disk, whoever wrote them."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """Flush the names inside the folder `path` to the disk: files made, renamed or removed there."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durable(path: Path, content: bytes) -> None:
    """Write `content` to `path` and flush it to the disk. Not atomic: for files that nobody reads yet."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def encode_json(value: Any) -> bytes:
    """Return `value` as JSON text that reads back as an equal value.

    Raises ValueError where it would not: NaN and infinity are not JSON, tuples come back as lists, and keys
    that are not strings come back as strings, which a resumed run would notice only much later. Raises
    TypeError for objects that JSON does not know.
    """
    content = json.dumps(value, indent=1, allow_nan=False).encode()
    if json.loads(content) != value:
        raise ValueError(
            "the value would read back from JSON as another one: turn tuples into lists, keys into strings"
        )
    return content


def write_json_atomic(path: Path, value: Any) -> None:
    """Replace the file at `path` by `value` as JSON; a crash at any moment leaves the old file or the new
    one.

    The errors are those of `encode_json`, and OSError from the disk; the old file is intact after each.
    """
    _replace(path, encode_json(value))


def write_text_atomic(path: Path, text: str) -> None:
    """Replace the file at `path` by `text`; a crash at any moment leaves the old file or the new one."""
    _replace(path, text.encode())


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        write_durable(temporary, content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)
