"""Reads the indexed datasets of Megatron-LM: a .bin of token ids and an .idx that says where documents lie.

Layout of the .idx (megatron/core/datasets/indexed_dataset.py): 9 bytes of magic, version (uint64), dtype code
(uint8), number of sequences and of document boundaries (uint64 each), then the length (int32) and the
position in bytes (int64) of every sequence, then the first sequence of every document, and the end (int64).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe.data.documents import TokenDocument

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronDataset:
    """The token ids of a .bin file, memory-mapped, and where its documents start."""

    path: Path
    token_N: np.ndarray  # integers
    start_D: np.ndarray  # int64, one more than there are documents

    def documents(self) -> Iterator[TokenDocument]:
        """Yield the documents in the order of the file, without those that hold no token."""
        for index in range(len(self.start_D) - 1):
            token_N = self.token_N[self.start_D[index] : self.start_D[index + 1]]
            if len(token_N):
                yield TokenDocument(name=f"{self.path}: document {index}", token_N=token_N)


def megatron_paths(path: Path) -> tuple[Path, Path]:
    """Return the (.idx, .bin) pair that a path to either means. Raises ValueError if one is missing."""
    pair = path.with_suffix(".idx"), path.with_suffix(".bin")
    for part in pair:
        if not part.is_file():
            raise ValueError(f"{part} is missing; a Megatron dataset is a .bin and an .idx of one name")
    return pair


def open_megatron(path: Path) -> MegatronDataset:
    """Open the dataset of which `path` is the .bin or the .idx. Raises ValueError if it is damaged."""
    index, data = megatron_paths(path)
    size = index.stat().st_size
    with index.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise ValueError(f"{index} is no Megatron index: it does not begin with {MAGIC!r}")
    _, version, code, num_sequences, num_boundaries = HEADER.unpack(header)
    if version != 1 or code not in DTYPES:
        raise ValueError(
            f"{index} has version {version} and dtype code {code}; readable are version 1 and the integer "
            f"codes {sorted(DTYPES)}"
        )
    needed = HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if size < needed:
        raise ValueError(f"{index} is cut short: {size} bytes, where its header promises {needed}; copy it again")
    if num_sequences == 0 or num_boundaries < 2:
        raise ValueError(f"{index} is empty: {num_sequences} sequences in {max(num_boundaries - 1, 0)} documents")
    length_Q, position_Q, boundary_D = _read_arrays(index, num_sequences, num_boundaries)
    dtype = np.dtype(DTYPES[code])
    end_Q = position_Q + length_Q.astype(np.int64) * dtype.itemsize
    if position_Q[0] != 0 or np.any(end_Q[:-1] != position_Q[1:]) or end_Q[-1] != data.stat().st_size:
        raise ValueError(
            f"{index} does not describe {data}: its sequences must follow each other and end at byte "
            f"{data.stat().st_size}, the end of the file; they end at {end_Q[-1]}. Copy both files again"
        )
    if boundary_D[0] != 0 or np.any(np.diff(boundary_D) < 0) or boundary_D[-1] != num_sequences:
        raise ValueError(f"{index} is damaged: its documents do not cover its {num_sequences} sequences in order")
    if end_Q[-1] == 0:
        raise ValueError(f"{data} is empty")
    start_Q = np.append(position_Q, end_Q[-1]) // dtype.itemsize
    return MegatronDataset(
        path=data,
        token_N=np.memmap(data, dtype=dtype, mode="r"),
        start_D=start_Q[boundary_D].astype(np.int64),
    )


def _read_arrays(index: Path, num_sequences: int, num_boundaries: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return lengths and byte positions of the sequences, and the first sequence of every document."""
    with index.open("rb") as file:
        file.seek(HEADER.size)
        length_Q = np.fromfile(file, dtype="<i4", count=num_sequences)
        position_Q = np.fromfile(file, dtype="<i8", count=num_sequences)
        boundary_D = np.fromfile(file, dtype="<i8", count=num_boundaries)
    return length_Q, position_Q, boundary_D
