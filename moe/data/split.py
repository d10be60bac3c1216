"""The held-out split: whole documents, chosen by their content, so that no text is on both sides.

Documents are taken in the order of a hash of their text until they fill the share asked for. The choice
depends on the texts alone: not on their order, their names or a seed. Duplicates have one hash and stay
together.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from moe.data.documents import Document, Documents, TokenDocument


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Which documents are held out, and what all of them together amount to."""

    validation_keys: frozenset[bytes]
    fraction: float
    is_cut: bool  # there is one document only, and its end is held out
    num_documents: int
    sha256: str  # of all texts in their order

    def parts(self, document: Document | TokenDocument) -> Iterator[tuple[bool, Document | TokenDocument]]:
        """Yield (is held out, document): the document as it is, or its two parts."""
        if self.is_cut:
            head, tail = _cut(document, self.fraction)
            yield False, head
            yield True, tail
        else:
            yield document.key in self.validation_keys, document


def plan_split(documents: Documents, fraction: float, *, where: str) -> Split:
    """Read all documents once and decide which are held out.

    Args:
        fraction: share of the bytes to hold out, above 0 and at most 0.5.
        where: the source in words, for errors.

    Raises ValueError if there is no document, or nothing that could be held out.
    """
    size_of_key: dict[bytes, int] = {}
    digest = hashlib.sha256()
    first, num_documents, num_bytes = None, 0, 0
    for document in documents:
        first = first or document
        num_documents += 1
        num_bytes += len(document.data)
        digest.update(document.data)
        size_of_key[document.key] = size_of_key.get(document.key, 0) + len(document.data)
    if first is None:
        raise ValueError(f"{where} is empty: it holds no document with more than white space")
    is_cut = num_documents == 1
    if is_cut:
        head, tail = _cut(first, fraction)
        if not head.data.strip() or not tail.data.strip():
            raise ValueError(f"{where} holds one document of {num_bytes} bytes, too short to hold out a part; add text")
    elif len(size_of_key) == 1:
        raise ValueError(f"{where} holds the same document {num_documents} times: none can be held out; add text")
    return Split(
        validation_keys=frozenset() if is_cut else _choose(size_of_key, fraction * num_bytes),
        fraction=fraction,
        is_cut=is_cut,
        num_documents=num_documents,
        sha256=digest.hexdigest(),
    )


def _choose(size_of_key: dict[bytes, int], target: float) -> frozenset[bytes]:
    """Return keys in ascending order that fill `target` bytes without passing it, at least one of them."""
    chosen: list[bytes] = []
    free = target
    for key in sorted(size_of_key):
        if size_of_key[key] <= free:
            chosen.append(key)
            free -= size_of_key[key]
    return frozenset(chosen or [min(size_of_key, key=lambda key: (size_of_key[key], key))])


def _cut(document: Document | TokenDocument, fraction: float) -> tuple[Document | TokenDocument, ...]:
    """Return the two parts of a document, cut at the first line end behind 1 - `fraction` of it."""
    if isinstance(document, TokenDocument):
        at = round(len(document.token_N) * (1 - fraction))
        return (
            TokenDocument(name=document.name, token_N=document.token_N[:at]),
            TokenDocument(name=f"{document.name}, end", token_N=document.token_N[at:]),
        )
    at = round(len(document.text) * (1 - fraction))
    line_end = document.text.find("\n", at) + 1
    at = line_end if 0 < line_end < len(document.text) else at
    return (
        Document(name=document.name, text=document.text[:at]),
        Document(name=f"{document.name}, end", text=document.text[at:]),
    )
