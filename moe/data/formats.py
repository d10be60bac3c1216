"""Reads a user's text: .txt, JSON lines (plain or compressed), parquet, and Hugging Face `datasets` folders.

Every format yields the same thing, documents in a fixed order, and names the file and line of what it cannot
read. JSON lines, parquet and datasets are streamed; only a .txt, which is one document, is held whole.
"""

import bz2
import gzip
import importlib.util
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow
import pyarrow.parquet

from moe.data.documents import Document

ROWS = 1000  # of parquet and datasets, read at a time


def _open_zstandard(path: Path) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))


def _open_plain(path: Path) -> BinaryIO:
    return path.open("rb")


OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}


def _kind(path: Path) -> str:
    """Return the suffix that tells the format, below that of a compression: `.jsonl` for `a.jsonl.gz`."""
    return path.with_suffix("").suffix if path.suffix in OPENERS else path.suffix


def is_text_file(path: Path) -> bool:
    """Return whether the suffix is that of a format which can be read."""
    return _kind(path) in READERS and not (path.suffix in OPENERS and _kind(path) == ".parquet")


def is_dataset_folder(path: Path) -> bool:
    """Return whether a folder was written by `save_to_disk` of Hugging Face datasets."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
    )


def text_files(path: Path) -> Iterator[Path]:
    """Yield the readable files that a path means: itself, or those below a folder, hidden ones left out."""
    if path.is_file():
        yield path
        return
    for file in path.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if not hidden and is_text_file(file) and file.is_file():
            yield file


def check_readable(path: Path) -> None:
    """Raise ValueError, with the remedy, if there is nothing under `path` that can be read. Opens no file."""
    if is_dataset_folder(path):
        if importlib.util.find_spec("datasets") is None:
            raise ValueError(
                f'{path} is a Hugging Face datasets folder, which needs: pip install "moe-train[datasets]"'
            )
    elif not path.exists():
        raise ValueError(f"{path} does not exist; data.sources takes a file, a folder or builtin:NAME")
    elif path.is_file() and not is_text_file(path):
        raise ValueError(f"{path} has a format that cannot be read; readable are {readable()}")
    elif next(text_files(path), None) is None:
        raise ValueError(f"{path} holds no file that can be read; readable are {readable()}")


def readable() -> str:
    """Return the formats in words."""
    compressed = ", ".join(OPENERS)
    return (
        f"{', '.join(READERS)} (.txt and .jsonl also with {compressed}), a folder of these, a folder that "
        "save_to_disk of Hugging Face datasets wrote, and Megatron's .bin with its .idx"
    )


def read_documents(path: Path, *, text_field: str) -> Iterator[Document]:
    """Yield the documents under `path` that hold more than white space, files in the order of their paths.

    Raises ValueError, with file and line, for what is not UTF-8, not JSON, cut short, or lacks `text_field`.
    """
    if is_dataset_folder(path):
        yield from _read_dataset(path, text_field)
        return
    for file in sorted(text_files(path)):
        try:
            yield from READERS[_kind(file)](file, text_field)
        except (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
            raise ValueError(f"{file} cannot be read: {error}. If it is cut short, copy it again") from error


def _document(name: str, value: object, text_field: str) -> Iterator[Document]:
    """Yield the value as a document, or nothing if it is blank."""
    if not isinstance(value, str):
        raise ValueError(
            f"{name}: field {text_field!r} holds {type(value).__name__}, not text; name another with data.text_field"
        )
    if value.strip():
        yield Document(name=name, text=value)


def _decode(data: bytes, file: Path, first_line: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise ValueError(
            f"{file}, line {line}: byte {data[error.start]:#04x} is not UTF-8; convert the file, for example "
            "with iconv -f LATIN1 -t UTF-8"
        ) from error


def _read_txt(file: Path, text_field: str) -> Iterator[Document]:
    with OPENERS.get(file.suffix, _open_plain)(file) as stream:
        text = _decode(stream.read(), file, 1).removeprefix("\ufeff")
    yield from _document(str(file), text, text_field)


def _read_jsonl(file: Path, text_field: str) -> Iterator[Document]:
    with OPENERS.get(file.suffix, _open_plain)(file) as stream:
        for number, line in enumerate(stream, start=1):
            name = f"{file}, line {number}"
            text = _decode(line, file, number).removeprefix("\ufeff").strip()
            if not text:
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{name}: not JSON, {error.msg} at column {error.colno}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{name}: holds {type(row).__name__}; every line must be one JSON object")
            if text_field not in row:
                raise ValueError(_missing(name, text_field, list(row)))
            yield from _document(name, row[text_field], text_field)


def _missing(name: str, text_field: str, fields: list[str]) -> str:
    return f"{name}: no field {text_field!r}, only {', '.join(map(repr, fields))}; name it with data.text_field"


def _read_parquet(file: Path, text_field: str) -> Iterator[Document]:
    with pyarrow.parquet.ParquetFile(file) as table:
        if text_field not in table.schema_arrow.names:
            raise ValueError(_missing(str(file), text_field, table.schema_arrow.names))
        row = 0
        for batch in table.iter_batches(batch_size=ROWS, columns=[text_field]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield from _document(f"{file}, row {row}", value, text_field)


def _read_dataset(path: Path, text_field: str) -> Iterator[Document]:
    """Read what `save_to_disk` wrote; of a dictionary of splits the training split, or the only one."""
    try:
        import datasets  # an extra; 1 s to import, so only where such a folder is read
    except ImportError as error:
        raise ValueError(f'{path} is a datasets folder, which needs: pip install "moe-train[datasets]"') from error
    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        splits = [str(name) for name in loaded]
        if "train" not in splits and len(splits) != 1:
            raise ValueError(f"{path} has the splits {', '.join(splits)}; point at one of them: {path / splits[0]}")
        loaded = loaded["train" if "train" in splits else splits[0]]
    if text_field not in loaded.column_names:
        raise ValueError(_missing(str(path), text_field, loaded.column_names))
    row = 0
    for batch in loaded.select_columns([text_field]).with_format(None).iter(batch_size=ROWS):
        for value in cast(dict[str, list[object]], batch)[text_field]:
            row += 1
            yield from _document(f"{path}, row {row}", value, text_field)


READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
