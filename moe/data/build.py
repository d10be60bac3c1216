"""Tokenises sources into a folder: split, tokenizer, token files, manifest.

Each source is read three times and never held whole: to decide what is held out, to train the tokenizer,
and to tokenise. This file takes seconds to import, for the tokenizer.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe.data.documents import Document, TokenDocument
from moe.data.sources import Source
from moe.data.split import Split, plan_split
from moe.data.store import PARTS, TOKENIZER, TokenWriter, write_manifest
from moe.data.tokenizer import TextEncoder, train_tokenizer

TOKENIZER_BYTES = 20_000_000  # of each domain, to train the tokenizer; more text takes memory and changes little
ENCODE_BYTES = 1_000_000  # of text tokenised at once
REPORT_SECONDS = 30.0
Report = Callable[[str], None]


def build(
    folder: Path,
    sources: Mapping[str, Source],
    *,
    tokenizer: str,
    vocab_size: int,
    validation_fraction: float,
    report: Report,
) -> None:
    """Fill an empty folder with the tokens of all sources.

    Args:
        sources: by domain.
        tokenizer: folder of a Hugging Face tokenizer, or "" to train one of `vocab_size` tokens.
        validation_fraction: share of each source to hold out.

    Raises ValueError, with the place, for text that cannot be read and ids that the tokenizer does not have.
    """
    splits: dict[str, Split] = {}
    for name, source in sources.items():
        report(f"data: reading {name}: {source.description}")
        splits[name] = plan_split(source.documents(), validation_fraction, where=source.description)
        if splits[name].is_cut:
            report(f"data: {name} is a single document; its last {validation_fraction:.1%} is held out")
    if tokenizer:
        TextEncoder(Path(tokenizer)).save(folder / TOKENIZER)
    else:
        report(f"data: training a tokenizer of {vocab_size} tokens")
        train_tokenizer(_training_texts(sources, splits), vocab_size=vocab_size, folder=folder / TOKENIZER)
    encoder = TextEncoder(folder / TOKENIZER)
    if not tokenizer and encoder.vocab_size < vocab_size:
        report(f"data: there is text for a tokenizer of {encoder.vocab_size} tokens only")
    domains = {
        name: _write_domain(folder, name, source, splits[name], encoder, report) for name, source in sources.items()
    }
    content = {
        "vocab_size": encoder.vocab_size,
        "eos_token_id": encoder.eos_token_id,
        "tokenizer": tokenizer or "byte-level BPE, trained on the training text",
        "validation_fraction": validation_fraction,
        "domains": domains,
    }
    write_manifest(folder, content)


def _training_texts(sources: Mapping[str, Source], splits: Mapping[str, Split]) -> Iterator[str]:
    """Yield the training text of each domain, up to TOKENIZER_BYTES."""
    for name, source in sources.items():
        num_bytes = 0
        for document in source.documents():
            for is_held_out, part in splits[name].parts(document):
                if isinstance(part, Document) and not is_held_out:
                    yield part.text
                    num_bytes += len(part.data)
            if num_bytes >= TOKENIZER_BYTES:
                break


def _write_domain(
    folder: Path, name: str, source: Source, split: Split, encoder: TextEncoder, report: Report
) -> dict[str, Any]:
    """Tokenise a domain into its two parts. Returns what the manifest says of it."""
    digest = hashlib.sha256()
    with (
        TokenWriter(folder, f"{name}.train", vocab_size=encoder.vocab_size) as train,
        TokenWriter(folder, f"{name}.validation", vocab_size=encoder.vocab_size) as validation,
    ):
        reported, num_bytes = time.monotonic(), 0
        for documents in _groups(source):
            for document in documents:
                digest.update(document.data)
            parts = [part for document in documents for part in split.parts(document)]
            for (is_held_out, part), token_N in zip(parts, _encode(parts, encoder), strict=True):
                size = len(part.data) if isinstance(part, Document) else 0
                (validation if is_held_out else train).add(token_N, num_bytes=size)
                num_bytes += size
            if time.monotonic() > reported + REPORT_SECONDS:
                reported = time.monotonic()
                report(f"data: {name}: {num_bytes / 1e6:.0f} MB tokenised")
        facts: dict[str, dict[str, int]] = {"train": train.finish(), "validation": validation.finish()}
    if digest.hexdigest() != split.sha256:
        raise ValueError(f"{source.description} has changed while it was read; start again when it is at rest")
    _report_domain(name, source, facts, report)
    return {"source": source.description, "licence": source.licence, "text_sha256": split.sha256, **facts}


def _groups(source: Source) -> Iterator[list[Document | TokenDocument]]:
    """Yield the documents in groups of about ENCODE_BYTES."""
    group: list[Document | TokenDocument] = []
    num_bytes = 0
    for document in source.documents():
        group.append(document)
        num_bytes += len(document.data)
        if num_bytes >= ENCODE_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _encode(parts: list[tuple[bool, Document | TokenDocument]], encoder: TextEncoder) -> Iterator[np.ndarray]:
    """Yield the ids of each part. Raises ValueError for ids that the tokenizer does not have."""
    texts = iter(encoder.encode([part.text for _, part in parts if isinstance(part, Document)]))
    for _, part in parts:
        if isinstance(part, Document):
            yield np.asarray(next(texts), dtype=np.int64)
            continue
        low, high = int(part.token_N.min()), int(part.token_N.max())
        if low < 0 or high >= encoder.vocab_size:
            raise ValueError(
                f"{part.name} holds token {high if low >= 0 else low}, but data.tokenizer has {encoder.vocab_size} "
                "tokens; give the tokenizer with which the file was made"
            )
        yield part.token_N.astype(np.int64)


def _report_domain(name: str, source: Source, facts: Mapping[str, Mapping[str, int]], report: Report) -> None:
    total = {key: sum(facts[part][key] for part in PARTS) for key in ("bytes", "documents", "tokens")}
    size = f"{total['bytes'] / 1e6:.2f} MB, " if total["bytes"] else ""
    report(
        f"data: {name}: {size}{total['documents']} documents, {total['tokens']} tokens, of which "
        f"{facts['validation']['tokens'] / total['tokens']:.1%} are held out"
    )
    if total["bytes"] < source.wanted_bytes:
        report(f"data: {name}: there is no more than that, {source.wanted_bytes / 1e6:.2f} MB were asked for")
