"""The order of sequences: exact proportions, true permutations, and values that must never change."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.data.order import BLOCK, Mixture, derive_key, mix, permute


@pytest.mark.parametrize("size", [1, 2, 3, 7, 63, 64, 65, 100, 1000, 4096, 4097])
def test_permutation_visits_every_index_once(size: int) -> None:
    for key in (0, 1, 2**64 - 1):
        assert sorted(permute(np.arange(size), size=size, key=key)) == list(range(size))


def test_permutation_of_some_indices_is_part_of_the_whole() -> None:
    whole = permute(np.arange(1000), size=1000, key=5)
    some = np.array([999, 3, 3, 500])
    assert np.array_equal(permute(some, size=1000, key=5), whole[some])
    assert permute(np.array([], np.int64), size=1000, key=5).tolist() == []


def test_permutation_of_a_huge_set_needs_no_table() -> None:
    size = 10**15 + 3
    image = permute(np.arange(10_000), size=size, key=1)
    assert len(set(image.tolist())) == 10_000
    assert image.min() >= 0
    assert image.max() < size
    assert abs(image.mean() / size - 0.5) < 0.02


@pytest.mark.parametrize("size", [10, 1000])
def test_permutations_look_random(size: int) -> None:
    """Against a uniform choice: where index 0 goes, and how far apart neighbours land."""
    images = np.array([permute(np.arange(size), size=size, key=derive_key("seed", key)) for key in range(600)])
    bins = np.bincount(images[:, 0] * 10 // size, minlength=10)
    assert (((bins - 60) ** 2) / 60).sum() < 27.9  # chi-squared with 9 degrees of freedom, p = 0.001
    ascents = (images[:, 1:] > images[:, :-1]).mean()
    assert abs(ascents - 0.5) < 0.02
    correlation = np.corrcoef(images[:, :-1].ravel(), images[:, 1:].ravel())[0, 1]
    assert abs(correlation + 1 / (size - 1)) < 0.03  # of neighbours in a uniform permutation


def test_order_never_changes_between_releases() -> None:
    """A change here would silently give resumed runs other text."""
    assert mix(np.array([1], np.uint64)).tolist() == [6238072747940578789]
    assert derive_key(1, "python", 2) == 14408198877863185888
    assert permute(np.arange(8), size=8, key=1).tolist() == [5, 1, 2, 4, 0, 7, 3, 6]
    domain_N, rank_N = Mixture({"a": 1.0, "b": 3.0}, seed=0).locate(np.arange(60, 72))
    assert (domain_N.tolist(), rank_N.tolist()) == (
        [0, 1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1],
        [14, 46, 15, 47, 48, 16, 49, 50, 51, 52, 53, 54],
    )


def test_long_run_shares_are_exact() -> None:
    mixture = Mixture({"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}, seed=3)
    for num_sequences in (10, 1000, 10**6, 10**12):
        assert mixture.counts(num_sequences) == [num_sequences * share // 10 for share in (4, 3, 2, 1)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8), st.integers(0, 10**12))
def test_counts_add_up_never_fall_and_stay_near_the_ideal(weights: list[float], start: int) -> None:
    mixture = Mixture({str(index): weight for index, weight in enumerate(weights)}, seed=0)
    before = mixture.counts(start)
    for num_sequences in range(start, start + 20):
        counts = mixture.counts(num_sequences)
        assert sum(counts) == num_sequences
        assert all(now >= then for now, then in zip(counts, before, strict=True))
        ideal = np.array(weights) / sum(weights) * num_sequences
        assert np.abs(counts - ideal).max() < 2 + 1e-15 * 1e12 * 10
        before = counts


def test_every_block_holds_the_domains_in_proportion_and_ranks_go_on() -> None:
    mixture = Mixture({"a": 1.0, "b": 2.0, "rare": 0.01}, seed=1)
    domain_N, rank_N = mixture.locate(np.arange(40 * BLOCK))
    for block in range(40):
        in_block = np.bincount(domain_N[block * BLOCK : (block + 1) * BLOCK], minlength=3)
        assert np.abs(in_block - np.array([1, 2, 0.01]) / 3.01 * BLOCK).max() <= 2
    for domain in range(3):
        ranks = rank_N[domain_N == domain]
        assert ranks.tolist() == list(range(len(ranks)))


def test_locations_do_not_depend_on_what_else_is_asked_for() -> None:
    mixture = Mixture({"a": 1.0, "b": 2.0}, seed=1)
    whole = np.stack(mixture.locate(np.arange(1000)))
    some = np.random.default_rng(0).permutation(1000)[:77]
    assert np.array_equal(np.stack(mixture.locate(some)), whole[:, some])


def test_order_within_a_block_changes_with_block_and_seed() -> None:
    weights = {"a": 1.0, "b": 1.0}
    domain_N, _ = Mixture(weights, seed=1).locate(np.arange(2 * BLOCK))
    other_N, _ = Mixture(weights, seed=2).locate(np.arange(2 * BLOCK))
    assert domain_N[:BLOCK].tolist() != domain_N[BLOCK:].tolist()
    assert domain_N.tolist() != other_N.tolist()


def test_single_domain_gets_everything_in_order() -> None:
    domain_N, rank_N = Mixture({"only": 0.7}, seed=1).locate(np.array([0, 5, 10**9]))
    assert domain_N.tolist() == [0, 0, 0]
    assert sorted(rank_N.tolist()) == rank_N.tolist()
    assert rank_N.tolist() == [0, 5, 10**9]
