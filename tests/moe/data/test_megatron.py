"""Megatron's .bin and .idx, written here as Megatron writes them, come back token for token."""

import struct
from pathlib import Path

import numpy as np
import pytest

from moe.data.megatron import open_megatron

CODES = {np.uint8: 1, np.int8: 2, np.int16: 3, np.int32: 4, np.int64: 5, np.uint16: 8}


def write_megatron(path: Path, documents: list[list[list[int]]], dtype: type = np.uint16) -> None:
    """Write documents, each a list of sequences, as `path`.bin and `path`.idx."""
    sequences = [np.array(sequence, dtype) for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    positions = np.zeros(len(sequences), np.int64)
    positions[1:] = np.cumsum(lengths[:-1].astype(np.int64) * np.dtype(dtype).itemsize)
    boundaries = np.cumsum([0, *(len(document) for document in documents)]).astype(np.int64)
    path.with_suffix(".bin").write_bytes(b"".join(sequence.tobytes() for sequence in sequences))
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(boundaries))
        + lengths.tobytes()
        + positions.tobytes()
        + boundaries.tobytes()
    )


DOCUMENTS = [[[5, 6, 7], [8]], [[9]], [[10, 11], [], [12, 100]]]


@pytest.mark.parametrize("dtype", CODES)
def test_documents_come_back_token_for_token(dtype: type, tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", DOCUMENTS, dtype)
    for suffix in (".bin", ".idx"):
        read = list(open_megatron(tmp_path / f"a{suffix}").documents())
        assert [document.token_N.tolist() for document in read] == [[5, 6, 7, 8], [9], [10, 11, 12, 100]]


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", [[[1, 2]], [[]], [], [[3]]])
    read = list(open_megatron(tmp_path / "a.bin").documents())
    assert [document.token_N.tolist() for document in read] == [[1, 2], [3]]


def _patch(path: Path, at: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)


def test_damaged_index_or_data_is_refused_by_name(tmp_path: Path) -> None:
    index, data = tmp_path / "a.idx", tmp_path / "a.bin"

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match):
            open_megatron(data)
        write_megatron(tmp_path / "a", DOCUMENTS)

    write_megatron(tmp_path / "a", DOCUMENTS)
    _patch(index, 0, b"X")
    refused(r"a\.idx is no Megatron index")
    index.write_bytes(b"MM")
    refused(r"a\.idx is no Megatron index")
    _patch(index, 9, b"\2")
    refused("version 2")
    _patch(index, 17, b"\7")
    refused("dtype code 7")
    index.write_bytes(index.read_bytes()[:-1])
    refused(r"a\.idx is cut short")
    _patch(index, 34, b"\4")  # length of the first sequence
    refused(r"a\.idx does not describe .*a\.bin")
    data.write_bytes(data.read_bytes()[:-2])
    refused(r"a\.idx does not describe .*a\.bin")
    _patch(index, 34 + 12 * 6 + 8, b"\6")  # the second document begins at the end, the third before it
    refused("documents do not cover")
    data.unlink()
    refused(r"a\.bin is missing")


def test_empty_dataset_is_refused(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", [])
    with pytest.raises(ValueError, match="is empty"):
        open_megatron(tmp_path / "a.bin")
    write_megatron(tmp_path / "a", [[[]]])
    with pytest.raises(ValueError, match="is empty"):
        open_megatron(tmp_path / "a.bin")
