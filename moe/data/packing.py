"""How documents become sequences of one length: cut from one long stream, or padded one by one."""

from dataclasses import dataclass

import numpy as np

from moe.data.store import Packing, TokenFile

NO_DOCUMENT = -1  # the document of a padding token


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequence:
    """One sequence, S tokens: each has its next token as label."""

    token_S: np.ndarray  # int64
    label_S: np.ndarray  # int64
    valid_S: np.ndarray  # bool, False on padding
    document_S: np.ndarray  # int64, number of the document in its file; NO_DOCUMENT on padding


class Sequences:
    """The sequences of a token file.

    Args:
        packing: "concatenate" cuts the stream of all documents every S tokens, and a sequence may hold several
            documents; "pad" gives each document sequences of its own, the last one padded.
        eos_token_id: also the padding, and with "pad" the token before the first of a document, as in the stream.
        keep_tail: with "concatenate", keep the end of the stream that fills no sequence, padded.
    """

    def __init__(
        self, file: TokenFile, *, sequence_length: int, packing: Packing, eos_token_id: int, keep_tail: bool
    ) -> None:
        self._file, self._length, self._eos = file, sequence_length, eos_token_id
        self._is_padded = packing == "pad"
        if self._is_padded:
            length_D = np.diff(file.starts)
            self._first_D = np.concatenate(([0], np.cumsum(-(-length_D // sequence_length))))
            self.num_sequences = int(self._first_D[-1])
        else:
            labels = max(file.num_tokens - 1, 0)  # the first token of the stream is no label
            self.num_sequences = -(-labels // sequence_length) if keep_tail else labels // sequence_length

    def __getitem__(self, index: int) -> Sequence:
        """Return sequence `index`, 0..num_sequences-1."""
        if self._is_padded:
            return self._document_chunk(index)
        first = index * self._length
        stream = np.asarray(self._file.tokens[first : first + self._length + 1], dtype=np.int64)
        position_M = np.arange(first, first + len(stream) - 1)
        return self._pad(stream, np.searchsorted(self._file.starts, position_M, side="right") - 1)

    def _document_chunk(self, index: int) -> Sequence:
        document = int(np.searchsorted(self._first_D, index, side="right")) - 1
        start, end = int(self._file.starts[document]), int(self._file.starts[document + 1])
        first = start + (index - int(self._first_D[document])) * self._length
        labels = np.asarray(self._file.tokens[first : min(first + self._length, end)], dtype=np.int64)
        before = self._eos if first == start else int(self._file.tokens[first - 1])
        return self._pad(np.concatenate(([before], labels)), np.full(len(labels), document))

    def _pad(self, stream: np.ndarray, document_M: np.ndarray) -> Sequence:
        """Return the sequence of M+1 tokens, M at most S."""
        num_valid = len(document_M)
        fill = self._length - num_valid
        return Sequence(
            token_S=np.pad(stream[:-1], (0, fill), constant_values=self._eos),
            label_S=np.pad(stream[1:], (0, fill), constant_values=self._eos),
            valid_S=np.arange(self._length) < num_valid,
            document_S=np.pad(document_M.astype(np.int64), (0, fill), constant_values=NO_DOCUMENT),
        )
