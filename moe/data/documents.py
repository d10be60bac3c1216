"""A document: one text, or one list of token ids, with the key that tells it from every other."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text and where it came from: a path, with the line or row where a file holds many."""

    name: str
    text: str

    @cached_property
    def data(self) -> bytes:
        """The text in UTF-8. Raises ValueError, with the place, for a text that has no UTF-8 form."""
        try:
            return self.text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{self.name}: character {error.start} is half of a surrogate pair, which UTF-8 cannot hold; "
                "repair the text where it was written"
            ) from error

    @cached_property
    def key(self) -> bytes:
        """16 bytes that are equal for equal texts; texts that differ in white space alone count as equal."""
        return hashlib.blake2b(b" ".join(self.data.split()), digest_size=16).digest()


@dataclass(frozen=True, kw_only=True)
class TokenDocument:
    """One document that arrived as token ids."""

    name: str
    token_N: np.ndarray  # any integer dtype

    @cached_property
    def data(self) -> bytes:
        """The ids as little-endian int64."""
        return self.token_N.astype("<i8").tobytes()

    @cached_property
    def key(self) -> bytes:
        """16 bytes that are equal for equal ids."""
        return hashlib.blake2b(self.data, digest_size=16).digest()


Documents = Iterator[Document] | Iterator[TokenDocument]
