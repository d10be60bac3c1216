"""The order of training sequences: which domain, and which of its sequences, stands at global index g.

Everything here is a formula of (seed, g). Nothing is counted up to g and nothing is stored, so a run
resumes at any index on any number of ranks. The arithmetic is our own, on 64-bit integers: numpy does not
promise that its shuffles stay the same from one release to the next.
"""

import hashlib
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

BLOCK = 64  # sequences in which the domains stand in their exact proportions, to one or two sequences
ROUNDS = 6  # of the Feistel network; 4 already look random to the tests


def derive_key(*parts: int | str) -> int:
    """Return a 64-bit key of a list of numbers and names."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def mix(x_N: np.ndarray) -> np.ndarray:
    """Return 64 well-mixed bits for each uint64: the last steps of splitmix64 (Steele et al., OOPSLA 2014)."""
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_N ^ (x_N >> np.uint64(31))


def permute(index_N: np.ndarray, *, size: int, key: int) -> np.ndarray:
    """Return where a seeded permutation of 0..size-1 sends each index (int64).

    A Feistel network permutes the next power of four, whatever its round function is; an index that lands
    beyond `size` is sent on until it lands inside (cycle walking; Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", 2002). No table of `size` entries is built.
    """
    half = np.uint64(max(3, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [np.uint64(derive_key(key, step)) for step in range(ROUNDS)]
    x_N = index_N.astype(np.uint64)
    outside_N = np.ones(len(x_N), dtype=bool)
    while outside_N.any():
        left_M, right_M = x_N[outside_N] >> half, x_N[outside_N] & mask
        for step_key in keys:
            left_M, right_M = right_M, left_M ^ (mix(right_M ^ step_key) & mask)
        x_N[outside_N] = (left_M << half) | right_M
        outside_N = x_N >= size
    return x_N.astype(np.int64)


class Mixture:
    """Deals global indices to domains in the proportions of their weights.

    Args:
        weights: positive, by domain; only their ratios count.
        seed: of the order within a block.
    """

    def __init__(self, weights: Mapping[str, float], *, seed: int) -> None:
        exact = [Fraction(str(weight)) for weight in weights.values()]  # 0.1 means a tenth, not the nearest double
        self._seed = seed
        # the share of each domain in what the domains before it leave over
        self._share_of_rest = [weight / sum(exact[index:]) for index, weight in enumerate(exact)]

    def counts(self, num_sequences: int) -> list[int]:
        """Return how many of the first `num_sequences` belong to each domain: the ideal to one or two.

        One domain after the other takes its rounded share of the rest. A rounded share grows by 0 or 1 with
        each sequence, and so does the rest: no count ever falls, and the counts always add up.
        """
        counts, rest = [], num_sequences
        for share in self._share_of_rest:
            taken = int(rest * share + Fraction(1, 2))  # positive, so int() rounds down
            counts.append(taken)
            rest -= taken
        return counts

    def locate(self, index_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (domain_N, rank_N), int64: the domain at each global index, and how many of it came before."""
        domain_N, rank_N = np.empty(len(index_N), np.int64), np.empty(len(index_N), np.int64)
        block_N = index_N // BLOCK
        for block in np.unique(block_N):
            here_N = block_N == block
            domain_P, rank_P = self._block(int(block))
            slot_M = index_N[here_N] % BLOCK
            domain_N[here_N], rank_N[here_N] = domain_P[slot_M], rank_P[slot_M]
        return domain_N, rank_N

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return domain and rank of each of the BLOCK sequences of a block."""
        before = self.counts(block * BLOCK)
        after = self.counts((block + 1) * BLOCK)
        sorted_P = np.repeat(np.arange(len(before)), np.subtract(after, before))
        noise_P = mix(np.arange(BLOCK, dtype=np.uint64) ^ np.uint64(derive_key(self._seed, "block", block)))
        domain_P = sorted_P[np.argsort(noise_P, kind="stable")]
        rank_P = np.empty(BLOCK, np.int64)
        for domain, first in enumerate(before):
            here_P = domain_P == domain
            rank_P[here_P] = first + np.arange(here_P.sum())
        return domain_P, rank_P
