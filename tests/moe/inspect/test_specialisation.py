"""Specialisation: figures worked by hand, a plain loop as the reference, domains without rows, invariants."""

import math

import pytest
import torch
from torch import Tensor

from moe.inspect.specialisation import (
    jensen_shannon_L,
    lift_DLE,
    mutual_information_L,
    preference_DLE,
    preferred_experts,
)

NAN = float("nan")


def counts(*domains: list[list[int]]) -> Tensor:
    return torch.tensor(domains)


def random_counts(D: int, L: int, E: int) -> Tensor:
    """Skewed counts with zeros among them."""
    return torch.randint(0, 50, (D, L, E)).square() * torch.randint(0, 2, (D, L, E)) + torch.eye(L, E).long()


def looped_mutual_information(counts_DLE: Tensor, layer: int, domains: list[int]) -> float:
    """Sum over domains and experts of p(d, e) * log(p(d, e) / (p(d) * p(e))), over log D."""
    D, E = len(domains), counts_DLE.shape[2]
    joint = {}
    for d in domains:
        total = sum(counts_DLE[d, layer, e].item() for e in range(E))
        for e in range(E):
            joint[d, e] = counts_DLE[d, layer, e].item() / total / D
    nats = 0.0
    for (_, e), p in joint.items():
        if p > 0:
            nats += p * math.log(p / (1 / D * sum(joint[other, e] for other in domains)))
    return nats / math.log(D)


def looped_jensen_shannon(counts_DLE: Tensor, layer: int) -> float:
    D, _, E = counts_DLE.shape
    divergences = []
    for a in range(D):
        for b in range(a + 1, D):
            p, q = ([c / sum(row) for c in row] for row in counts_DLE[[a, b], layer].tolist())
            bits = 0.0
            for e in range(E):
                for share in (p[e], q[e]):
                    if share > 0:
                        bits += 0.5 * share * math.log2(share / (0.5 * (p[e] + q[e])))
            divergences.append(bits)
    return sum(divergences) / len(divergences)


def test_preference_is_the_share_of_the_domains_rows() -> None:
    share_DLE = preference_DLE(counts([[3, 1, 0], [0, 0, 5]], [[2, 2, 4], [1, 1, 2]]))
    expected = torch.tensor(
        [[[0.75, 0.25, 0.0], [0.0, 0.0, 1.0]], [[0.25, 0.25, 0.5], [0.25, 0.25, 0.5]]], dtype=torch.float64
    )
    torch.testing.assert_close(share_DLE, expected, rtol=0, atol=0)


def test_lift_compares_with_domains_of_equal_weight() -> None:
    # shares 3/4, 1/4 and 1/4, 3/4: the mean is 1/2, although the second domain has a hundred times the text
    ratio_DLE = lift_DLE(counts([[3, 1]], [[100, 300]]))
    expected = torch.tensor([[[1.5, 0.5]], [[0.5, 1.5]]], dtype=torch.float64)
    torch.testing.assert_close(ratio_DLE, expected, rtol=1e-15, atol=0)


def test_expert_that_nobody_uses_has_no_lift() -> None:
    expected = torch.tensor([[[2.0, 0.0, NAN]], [[0.0, 2.0, NAN]]], dtype=torch.float64)
    torch.testing.assert_close(lift_DLE(counts([[7, 0, 0]], [[0, 9, 0]])), expected, equal_nan=True)


def test_mutual_information_of_a_case_worked_by_hand() -> None:
    # H(1/2, 1/2) = log 2; H(3/4, 1/4) = 2 log 2 - 3/4 log 3; the difference over log 2 is 3/4 log2(3) - 1 = 0.18872
    information_L = mutual_information_L(counts([[3, 1]], [[1, 3]]))
    assert information_L.dtype == torch.float64
    assert information_L.tolist() == pytest.approx([0.188721875540867], rel=1e-12)


def test_divergence_of_cases_worked_by_hand() -> None:
    # of two domains the divergence in bits is the normalised mutual information
    assert jensen_shannon_L(counts([[3, 1]], [[1, 3]])).tolist() == pytest.approx([0.188721875540867], rel=1e-12)
    # two alike and one apart: pairs 0, 1, 1
    three = counts([[4, 0]], [[2, 0]], [[0, 1]])
    assert jensen_shannon_L(three).tolist() == pytest.approx([2 / 3], rel=1e-12)
    # H(2/3, 1/3) / log 3
    expected = (math.log(3) - 2 / 3 * math.log(2)) / math.log(3)
    assert mutual_information_L(three).tolist() == pytest.approx([expected], rel=1e-12)


@pytest.mark.parametrize(("D", "L", "E"), [(2, 1, 2), (4, 3, 7), (5, 4, 16), (3, 2, 1)])
def test_both_figures_agree_with_plain_loops(D: int, L: int, E: int) -> None:
    counts_DLE = random_counts(D, L, E) + 1
    information = [looped_mutual_information(counts_DLE, layer, list(range(D))) for layer in range(L)]
    divergence = [looped_jensen_shannon(counts_DLE, layer) for layer in range(L)]
    assert mutual_information_L(counts_DLE).tolist() == pytest.approx(information, rel=1e-9, abs=1e-14)
    assert jensen_shannon_L(counts_DLE).tolist() == pytest.approx(divergence, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("measure", [mutual_information_L, jensen_shannon_L])
def test_figures_are_zero_for_equal_and_one_for_disjoint_domains(measure) -> None:
    uniform = torch.full((4, 1, 8), 10)
    scaled = counts([[1, 2, 3]], [[10, 20, 30]], [[7, 14, 21]])  # as much alike, of unequal size
    disjoint = torch.eye(4).long().repeat_interleave(2, dim=1).unsqueeze(1) * torch.tensor([1, 2, 3, 4]).repeat(2)
    assert measure(uniform).tolist() == [0.0]
    assert measure(scaled).tolist() == pytest.approx([0.0], abs=1e-12)
    assert measure(disjoint).tolist() == pytest.approx([1.0], rel=1e-12)
    assert 0 <= measure(scaled).item()  # rounding never makes it negative
    assert measure(disjoint).item() <= 1


@pytest.mark.parametrize("measure", [mutual_information_L, jensen_shannon_L])
def test_figures_are_zero_for_fewer_than_two_domains_with_rows(measure) -> None:
    assert measure(counts([[3, 1], [0, 4]])).tolist() == [0.0, 0.0]
    assert measure(counts([[3, 1]], [[0, 0]])).tolist() == [0.0]
    assert measure(counts([[0, 0]], [[0, 0]])).tolist() == [0.0]


def test_domain_without_rows_is_left_out() -> None:
    full = random_counts(3, 2, 5) + 1
    empty = full.clone()
    empty[1] = 0
    expected = [looped_mutual_information(full, layer, [0, 2]) for layer in range(2)]
    assert mutual_information_L(empty).tolist() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(jensen_shannon_L(empty), jensen_shannon_L(full[[0, 2]]))
    assert preference_DLE(empty)[1].isnan().all()
    assert lift_DLE(empty)[1].isnan().all()
    torch.testing.assert_close(lift_DLE(empty)[[0, 2]], lift_DLE(full[[0, 2]]))
    assert preferred_experts(empty, 2)[1] == []
    assert preferred_experts(empty, 2)[0] == preferred_experts(full[[0, 2]], 2)[0]


def test_figures_do_not_depend_on_the_order_of_domains_or_experts() -> None:
    counts_DLE = random_counts(4, 3, 9) + 1
    shuffled = counts_DLE[torch.randperm(4)][:, :, torch.randperm(9)]
    for measure in (mutual_information_L, jensen_shannon_L):
        torch.testing.assert_close(measure(shuffled), measure(counts_DLE), rtol=1e-12, atol=1e-15)
    share_DLE = preference_DLE(counts_DLE)
    torch.testing.assert_close(share_DLE.sum(-1), torch.ones(4, 3, dtype=torch.float64))
    torch.testing.assert_close(lift_DLE(counts_DLE).mean(0), torch.ones(3, 9, dtype=torch.float64))


def test_preferred_experts_come_by_lift_and_need_more_than_a_uniform_share() -> None:
    # shares of domain 0 in layer 1: 0.6, 0.2, 0.1, 0.1; of domain 1: 0.1, 0.2, 0.1, 0.6; layer 0 is alike
    counts_DLE = counts([[5, 5, 5, 5], [6, 2, 1, 1]], [[1, 1, 1, 1], [10, 20, 10, 60]])
    first, second = preferred_experts(counts_DLE, 3)
    assert [(p.layer, p.expert, p.share, p.lift) for p in first] == [(1, 0, 0.6, pytest.approx(0.6 / 0.35))]
    assert [(p.layer, p.expert, p.share, p.lift) for p in second] == [(1, 3, 0.6, pytest.approx(0.6 / 0.35))]


def test_rarely_used_expert_is_not_preferred_whatever_its_lift() -> None:
    # expert 2 is the first domain's alone, with the highest lift possible, but takes only 1/10 of its rows
    preferred = preferred_experts(counts([[6, 3, 1]], [[4, 6, 0]]), 5)
    assert [(p.expert, p.lift) for p in preferred[0]] == [(0, pytest.approx(1.2))]


def test_no_more_than_top_experts_and_ties_by_share_then_layer() -> None:
    counts_DLE = counts([[4, 4, 0, 0], [6, 2, 0, 0]], [[0, 0, 4, 4], [0, 0, 5, 3]])
    first, second = preferred_experts(counts_DLE, 3)
    assert [(p.layer, p.expert, p.share, p.lift) for p in first] == [(1, 0, 0.75, 2), (0, 0, 0.5, 2), (0, 1, 0.5, 2)]
    assert [(p.layer, p.expert, p.share, p.lift) for p in second] == [
        (1, 2, 0.625, 2),
        (0, 2, 0.5, 2),
        (0, 3, 0.5, 2),
    ]
    assert [len(found) for found in preferred_experts(counts_DLE, 1)] == [1, 1]


def test_domains_that_choose_alike_prefer_nothing() -> None:
    assert preferred_experts(counts([[1, 2, 7]]), 3) == [[]]
    assert preferred_experts(counts([[1, 2, 7]], [[3, 6, 21]], [[9, 18, 63]]), 3) == [[], [], []]
