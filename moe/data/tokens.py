"""Batches of tokens. Sequence i of step s is the same text on every layout, and after every resumption."""

import math
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Indices
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from moe.data.order import Mixture, derive_key, permute
from moe.data.packing import NO_DOCUMENT, Sequence, Sequences
from moe.data.store import Domain, PreparedData


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """B sequences of S tokens."""

    token_BS: Tensor  # int64
    label_BS: Tensor  # int64, the next token
    valid_BS: Tensor  # bool, False on padding: neither routed nor counted in the loss
    document_BS: Tensor  # int64, number of the document within its domain; -1 on padding
    domain_B: Tensor  # int64, index in PreparedData.domains
    position_BS: Tensor  # int64, global index of the token in its optimizer step: i * S + s for sequence i

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on another device."""
        moved = {field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)}
        return Batch(**moved)

    @property
    def num_valid(self) -> int:
        """Tokens that are not padding. Waits for the device if the batch is on a GPU."""
        return int(self.valid_BS.sum())


class BatchStream:
    """The training sequences in their seeded global order.

    Sequence i of optimizer step s has the global index g = s * global_sequences + i. The order is a
    function of (seed, g): see order.py. In every epoch of a domain each of its sequences comes once, in
    another order.

    Raises ValueError for a domain that is shorter than one sequence.
    """

    def __init__(self, *, data: PreparedData, seed: int, global_sequences: int, sequence_length: int) -> None:
        self._domains = data.domains
        self._seed, self._global_sequences, self._length = seed, global_sequences, sequence_length
        self._mixture = Mixture({domain.name: domain.weight for domain in data.domains}, seed=seed)
        self._sequences = [
            Sequences(
                domain.train,
                sequence_length=sequence_length,
                packing=domain.packing,
                eos_token_id=domain.eos_token_id,
                keep_tail=False,
            )
            for domain in data.domains
        ]
        for domain, sequences in zip(data.domains, self._sequences, strict=True):
            if sequences.num_sequences == 0:
                raise ValueError(
                    f"domain {domain.name!r} has {domain.train.num_tokens} tokens of training text, fewer than the "
                    f"{sequence_length + 1} of one sequence; bring more text or lower batch.sequence_length"
                )

    def batch(self, step: int, indices: Indices[int]) -> Batch:
        """Return the sequences `indices` of a step, any of 0..global_sequences-1 in any order, on the CPU."""
        index_B = np.asarray(indices, dtype=np.int64)
        assert step >= 0
        assert np.all((index_B >= 0) & (index_B < self._global_sequences))
        domain_B, rank_B = self._mixture.locate(step * self._global_sequences + index_B)
        slot_B = np.empty_like(rank_B)
        for domain in np.unique(domain_B):
            here_B = domain_B == domain
            slot_B[here_B] = self._slots(int(domain), rank_B[here_B])
        rows = [self._sequences[domain][slot] for domain, slot in zip(domain_B, slot_B, strict=True)]
        return _collate(rows, domain_B=domain_B, index_B=index_B)

    def _slots(self, domain: int, rank_N: np.ndarray) -> np.ndarray:
        """Return which sequence of a domain is dealt as its `rank`-th."""
        size = self._sequences[domain].num_sequences
        slot_N, epoch_N = np.empty_like(rank_N), rank_N // size
        for epoch in np.unique(epoch_N):
            here_N = epoch_N == epoch
            key = derive_key(self._seed, self._domains[domain].name, int(epoch))
            slot_N[here_N] = permute(rank_N[here_N] % size, size=size, key=key)
        return slot_N

    @property
    def num_sequences(self) -> Mapping[str, int]:
        """Training sequences of each domain."""
        return {
            domain.name: sequences.num_sequences
            for domain, sequences in zip(self._domains, self._sequences, strict=True)
        }

    def epochs(self, step: int) -> Mapping[str, float]:
        """Return how often each domain has been read through before a step."""
        counts = self._mixture.counts(step * self._global_sequences)
        return {name: count / size for count, (name, size) in zip(counts, self.num_sequences.items(), strict=True)}


def validation_batches(domain: Domain, *, sequence_length: int, batch_size: int, max_sequences: int) -> Iterator[Batch]:
    """Yield the held-out text of a domain in batches of one shape: the same ones at every call.

    With more than `max_sequences` sequences, as many are taken at even distances. Sequences that run out of
    text are padded, and so is the last batch, with sequences of nothing but padding.
    """
    sequences = Sequences(
        domain.validation,
        sequence_length=sequence_length,
        packing=domain.packing,
        eos_token_id=domain.eos_token_id,
        keep_tail=True,
    )
    chosen = min(max_sequences, sequences.num_sequences)
    blank = Sequence(
        token_S=np.full(sequence_length, domain.eos_token_id),
        label_S=np.full(sequence_length, domain.eos_token_id),
        valid_S=np.zeros(sequence_length, dtype=bool),
        document_S=np.full(sequence_length, NO_DOCUMENT),
    )
    for batch in range(math.ceil(chosen / batch_size)):
        index_B = np.arange(batch * batch_size, (batch + 1) * batch_size)
        rows = [
            sequences[int(index) * sequences.num_sequences // chosen] if index < chosen else blank for index in index_B
        ]
        yield _collate(rows, domain_B=np.full(batch_size, domain.index), index_B=index_B)


def _collate(rows: list[Sequence], *, domain_B: np.ndarray, index_B: np.ndarray) -> Batch:
    length = len(rows[0].token_S)
    return Batch(
        token_BS=torch.from_numpy(np.stack([row.token_S for row in rows])),
        label_BS=torch.from_numpy(np.stack([row.label_S for row in rows])),
        valid_BS=torch.from_numpy(np.stack([row.valid_S for row in rows])),
        document_BS=torch.from_numpy(np.stack([row.document_S for row in rows])),
        domain_B=torch.from_numpy(domain_B),
        position_BS=torch.from_numpy(index_B[:, None] * length + np.arange(length)),
    )
