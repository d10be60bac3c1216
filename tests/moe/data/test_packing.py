"""Packing: every token is a label as often as it should be, and padding is never taken for text."""

from collections.abc import Callable

import numpy as np
import pytest

from moe.data.packing import NO_DOCUMENT, Sequences
from moe.data.store import Packing, PreparedData

EOS = 0
MakeData = Callable[..., PreparedData]


def _sequences(make_data: MakeData, lengths: list[int], length: int, packing: Packing, *, keep_tail: bool) -> Sequences:
    data = make_data({"a": lengths})
    return Sequences(
        data.domains[0].train, sequence_length=length, packing=packing, eos_token_id=EOS, keep_tail=keep_tail
    )


def test_concatenated_sequences_continue_each_other(make_data: MakeData) -> None:
    sequences = _sequences(make_data, [3, 4, 6], 4, "concatenate", keep_tail=False)
    stream = [1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 9, 10, 0]
    assert sequences.num_sequences == 3
    for index in range(3):
        sequence = sequences[index]
        assert sequence.token_S.tolist() == stream[4 * index : 4 * index + 4]
        assert sequence.label_S.tolist() == stream[4 * index + 1 : 4 * index + 5]
        assert sequence.valid_S.all()
    assert [sequences[index].document_S.tolist() for index in range(3)] == [[0, 0, 0, 1], [1, 1, 1, 2], [2, 2, 2, 2]]


@pytest.mark.parametrize(("total", "num_sequences"), [(4, 0), (5, 1), (8, 1), (9, 2)])
def test_sequence_needs_one_token_more_for_its_last_label(make_data: MakeData, total: int, num_sequences: int) -> None:
    assert _sequences(make_data, [total], 4, "concatenate", keep_tail=False).num_sequences == num_sequences


def test_kept_tail_is_padded(make_data: MakeData) -> None:
    sequences = _sequences(make_data, [3, 4], 4, "concatenate", keep_tail=True)
    assert sequences.num_sequences == 2
    tail = sequences[1]
    assert tail.token_S.tolist() == [4, 5, EOS, EOS]
    assert tail.label_S.tolist() == [5, 0, EOS, EOS]
    assert tail.valid_S.tolist() == [True, True, False, False]
    assert tail.document_S.tolist() == [1, 1, NO_DOCUMENT, NO_DOCUMENT]


def test_padded_documents_begin_sequences_and_long_ones_go_on(make_data: MakeData) -> None:
    sequences = _sequences(make_data, [3, 9, 4, 1], 4, "pad", keep_tail=False)
    rows = [sequences[index] for index in range(sequences.num_sequences)]
    assert [row.token_S[row.valid_S].tolist() for row in rows] == [
        [EOS, 1, 2],
        [EOS, 3, 4, 5],
        [6, 7, 8, 9],
        [10],
        [EOS, 11, 12, 13],
        [EOS],
    ]
    assert [row.label_S[row.valid_S].tolist() for row in rows] == [
        [1, 2, EOS],
        [3, 4, 5, 6],
        [7, 8, 9, 10],
        [EOS],
        [11, 12, 13, EOS],
        [EOS],
    ]
    assert [row.document_S[row.valid_S].tolist() for row in rows] == [[0] * 3, [1] * 4, [1] * 4, [1], [2] * 4, [3]]
    for row in rows:
        assert np.all(row.document_S[~row.valid_S] == NO_DOCUMENT)
        assert np.all(row.token_S[~row.valid_S] == EOS)
        assert len(row.token_S) == len(row.label_S) == 4


@pytest.mark.parametrize("length", [1, 2, 5, 64, 1000])
def test_every_token_is_a_label_exactly_once(make_data: MakeData, length: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 90, size=30).tolist()
    data = make_data({"a": lengths})
    file = data.domains[0].train
    cases: list[tuple[Packing, np.ndarray]] = [("pad", file.tokens), ("concatenate", file.tokens[1:])]
    for packing, expected in cases:
        sequences = Sequences(file, sequence_length=length, packing=packing, eos_token_id=EOS, keep_tail=True)
        rows = [sequences[index] for index in range(sequences.num_sequences)]
        labels = np.concatenate([row.label_S[row.valid_S] for row in rows])
        assert np.array_equal(labels, expected)
