"""The two texts that studies of single papers train on. One kind of text per sequence, all kinds equally often.

    chains   64 tokens. easy: the next token is a function of this one, 0 nats at best. hard: over the first 20 tokens,
             one of four that follow the last two, equally likely: log 4 = 1.39 nats at best
    corpus   bytes of the built-in corpus, a cut of 400 kB of each of its four domains; whole documents are held out

Chains are drawn anew for every seed. The corpus is the same for all seeds, as far as the installed packages are; a seed
only orders its sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from moe.data.corpus import BUILTINS, builtin_documents
from moe.data.split import plan_split

SEQUENCE = 64
VOCABULARY = 64  # of the chains
# With 64 symbols 500 steps learn nothing (4.0 nats). With 20, on seed 0 and the model of toy.py, top-1, top-2 and top-4
# end at 1.86, 1.74 and 1.71; with 16 at 1.61, 1.54 and 1.53, nearer to each other and to the floor.
HARD_SYMBOLS, HARD_CHOICES = 20, 4
CORPUS_BYTES, HELD_OUT = 400_000, 0.05  # of a domain


@dataclass(frozen=True, kw_only=True)
class Text:
    """Sequences of G kinds, int64 [G, number of sequences, SEQUENCE + 1]."""

    vocabulary: int
    training: Tensor
    validation: Tensor


def chains(seed: int, num_training: int, num_validation: int) -> Text:
    """Return easy and hard chains, so many sequences of each."""
    num_sequences = num_training + num_validation
    draw = torch.Generator().manual_seed(seed)
    next_V = torch.randperm(VOCABULARY, generator=draw)
    next_HHC = torch.rand(HARD_SYMBOLS, HARD_SYMBOLS, HARD_SYMBOLS, generator=draw).topk(HARD_CHOICES).indices
    easy = [torch.randint(VOCABULARY, (num_sequences,), generator=draw)]
    hard = [torch.randint(HARD_SYMBOLS, (num_sequences,), generator=draw) for _ in range(2)]
    for _ in range(SEQUENCE):
        easy.append(next_V[easy[-1]])
        choice = torch.randint(HARD_CHOICES, (num_sequences,), generator=draw)
        hard.append(next_HHC[hard[-2], hard[-1], choice])
    both = torch.stack((torch.stack(easy, 1), torch.stack(hard[1:], 1)))
    return Text(vocabulary=VOCABULARY, training=both[:, :num_training], validation=both[:, num_training:])


def corpus(seed: int, num_training: int, num_validation: int) -> Text:
    """Return bytes of the built-in domains, training sequences in the order of the seed.

    Raises ValueError if a domain holds fewer sequences.
    """
    draw = torch.Generator().manual_seed(seed)
    training, validation = [], []
    for name in BUILTINS:
        known, held_out = _domain(name)
        if num_training > len(known) or num_validation > len(held_out):
            raise ValueError(
                f"{name} holds {len(known)} sequences for training and {len(held_out)} for validation, not "
                f"{num_training} and {num_validation}; lower the steps or raise CORPUS_BYTES"
            )
        training.append(known[torch.randperm(len(known), generator=draw)[:num_training]])
        validation.append(held_out[:: len(held_out) // num_validation][:num_validation])
    return Text(vocabulary=256, training=torch.stack(training), validation=torch.stack(validation))


KINDS = {"chains": ("easy", "hard"), "corpus": tuple(BUILTINS)}
TEXTS: dict[str, Callable[[int, int, int], Text]] = {"chains": chains, "corpus": corpus}


@lru_cache
def _domain(name: str) -> tuple[Tensor, Tensor]:
    """Return the sequences of a built-in domain in the order of its documents: (for training, held out)."""
    documents = builtin_documents(name, CORPUS_BYTES)
    split = plan_split(iter(documents), HELD_OUT, where=name)
    streams = (bytearray(), bytearray())
    for document in documents:
        for is_held_out, part in split.parts(document):
            streams[is_held_out].extend(part.data + b"\n")
    return _sequences(streams[0]), _sequences(streams[1])


def _sequences(stream: bytearray) -> Tensor:
    num_sequences = len(stream) // (SEQUENCE + 1)
    ids = torch.frombuffer(stream, dtype=torch.uint8).long()
    return ids[: num_sequences * (SEQUENCE + 1)].view(num_sequences, SEQUENCE + 1)
