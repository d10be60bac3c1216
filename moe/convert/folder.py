"""Folders of a model: how they appear, whole or not at all, and what all of them hold: tokenizer, weights in parts."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from moe.checkpoint import write_json_atomic
from moe.checkpoint.atomic import fsync_folder
from moe.checkpoint.stream import Entry, split_entries, write_file
from moe.convert import ConversionError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """Yield a hidden folder that becomes `out` if all goes well, and is removed if not.

    Raises ConversionError if `out` exists: nothing is overwritten.
    """
    if out.exists():
        raise ConversionError(f"{out} exists; choose another folder, or remove it")
    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a conversion that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for folder in (temporary, *(path for path in temporary.rglob("*") if path.is_dir())):
            fsync_folder(folder)
        temporary.rename(out)
        fsync_folder(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer, those that are there."""
    target.mkdir(exist_ok=True)
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, target / name)


def special_ids(folder: Path) -> dict[str, int | None]:
    """Return the ids of the tokenizer's special tokens, None where it has none: a class's default would be wrong."""
    ids: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if not (folder / "tokenizer_config.json").is_file() or not (folder / "tokenizer.json").is_file():
        return ids
    names = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = {token["content"]: token["id"] for token in vocabulary.get("added_tokens", [])}
    for key in ids:
        token = names.get(key.removesuffix("_id"))
        content = token.get("content") if isinstance(token, dict) else token
        ids[key] = added.get(content)
    return ids


def write_shards(folder: Path, entries: list[Entry], stream: Iterator[Tensor], shard_bytes: int) -> None:
    """Write tensors that come one by one, in the order of `entries`, as model.safetensors or its parts and their index.

    Args:
        shard_bytes: largest size of a part.
    """
    groups, weight_map = list(split_entries(entries, limit_bytes=shard_bytes)), {}
    for number, group in enumerate(groups, 1):
        is_whole = len(groups) == 1
        file = "model.safetensors" if is_whole else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_file(folder / file, group, stream, metadata={"format": "pt"})
        weight_map |= {entry.name: file for entry in group}
    if len(groups) > 1:
        size = sum(entry.bytes for entry in entries)
        write_json_atomic(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map}
        )
