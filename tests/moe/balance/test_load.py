"""GlobalLoad: which counts the loss sees, over ranks and micro-batches; and the figures made of counts."""

import pytest
import torch
import torch.distributed as dist

from moe.balance.health import load_figures
from moe.balance.load import BalanceConfig, GlobalLoad, RoutingChangedError
from moe.balance.losses import frequency, load_balancing_loss
from moe.balance.statistics import RouterStatistics

COUNTS = torch.tensor(
    [  # rank, micro-batch, layer, expert; 12 rows a micro-batch, and unevenly many in layer 1 of rank 1
        [[[8, 1, 3], [6, 4, 2]], [[0, 11, 1], [4, 5, 3]]],
        [[[2, 3, 7], [1, 1, 4]], [[12, 0, 0], [2, 8, 2]]],
    ]
)
PROBS = torch.randn(2, 2, 2, 3, generator=torch.Generator().manual_seed(0)).softmax(-1) * 6
NUM_TOKENS = 24  # of the step


def statistics(rank: int, micro: int) -> RouterStatistics:
    """One micro-batch of two sequences that share its counts and probabilities unevenly."""
    counts_LE, probs_LE = COUNTS[rank, micro], PROBS[rank, micro]
    part_LE = counts_LE // 3
    return RouterStatistics(
        tokens_per_expert_BLE=torch.stack([part_LE, counts_LE - part_LE]),
        prob_sum_BLE=torch.stack([0.3 * probs_LE, 0.7 * probs_LE]),
        z_sum_L=torch.zeros(2),
        entropy_sum_L=torch.zeros(2),
        router_loss_sum_L=torch.zeros(2),
        num_dropped_L=torch.zeros(2, dtype=torch.int64),
        num_tokens=torch.tensor(6),
    )


def formula(counts_LE: torch.Tensor, probs_LE: torch.Tensor) -> torch.Tensor:
    """E * sum_i f_i * P_i, written out."""
    return 3 * (counts_LE / counts_LE.sum(-1, keepdim=True) * probs_LE / NUM_TOKENS).sum(-1)


def expected(scope: str, rank: int, micro: int) -> torch.Tensor:
    if scope == "sequence":
        one = statistics(rank, micro)
        return sum(formula(one.tokens_per_expert_BLE[b], one.prob_sum_BLE[b]) for b in range(2))
    counts_LE = {
        "micro": COUNTS[rank, micro],
        "ranks": COUNTS[:, micro].sum(0),
        "global": COUNTS[:, : micro + 1].sum((0, 1)),
        "exact": COUNTS.sum((0, 1)),
        "lagged": torch.ones(2, 3),
    }[scope]
    return formula(counts_LE, PROBS[rank, micro])


SCOPES = ["sequence", "micro", "ranks", "global", "exact", "lagged"]


def walk(scope: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    rank = dist.get_rank()
    load = GlobalLoad(scope=scope, group=dist.group.WORLD)
    losses = []
    for _ in range(2):  # the second step must not remember the first
        if scope == "exact":
            load.expect(COUNTS[rank].sum(0))
        losses += [load.balance_loss(statistics(rank, m), NUM_TOKENS) for m in range(2)]
        total_LE = load.end_step()
    return losses, total_LE


@pytest.mark.parametrize("scope", SCOPES)
def test_every_scope_equals_its_formula_on_two_ranks_and_two_micro_batches(pool, scope):
    for rank, (losses, total_LE) in enumerate(pool.run(walk, scope, world_size=2)):
        assert torch.equal(total_LE, COUNTS.sum((0, 1)))
        for index, loss_L in enumerate(losses):
            torch.testing.assert_close(loss_L, expected(scope, rank, index % 2))


def test_ranks_together_give_the_loss_of_the_concatenated_batch(pool):
    """Scopes that see all ranks: the shares of all ranks add up to one process with all tokens."""
    results = pool.run(walk, "ranks", world_size=2)
    total_L = sum(losses[0] for losses, _ in results)
    torch.testing.assert_close(total_L, formula(COUNTS[:, 0].sum(0), PROBS[:, 0].sum(0)))


def test_one_process_needs_no_group():
    load = GlobalLoad(scope="global", group=None)
    loss_L = load.balance_loss(statistics(0, 0), NUM_TOKENS)
    torch.testing.assert_close(loss_L, formula(COUNTS[0, 0], PROBS[0, 0]))
    assert torch.equal(load.end_step(), COUNTS[0, 0])


def count_collectives(scope: str) -> list[torch.dtype]:
    dtypes = []
    original = dist.all_reduce
    load = GlobalLoad(scope=scope, group=dist.group.WORLD)
    dist.all_reduce = lambda tensor, **kwargs: (dtypes.append(tensor.dtype), original(tensor, **kwargs))[1]
    try:
        load.balance_loss(statistics(dist.get_rank(), 0), NUM_TOKENS)
    finally:
        dist.all_reduce = original
    return dtypes


@pytest.mark.parametrize("scope", SCOPES)
def test_a_micro_batch_costs_at_most_one_all_reduce_of_integers(pool, scope):
    expected_dtypes = [] if scope in ("sequence", "micro", "lagged") else [torch.int64]
    assert pool.run(count_collectives, scope, world_size=2) == [expected_dtypes] * 2


def test_lagged_sees_the_steps_before_smoothed():
    load = GlobalLoad(scope="lagged", smoothing=0.25, group=None)
    losses = []
    for step in range(3):
        losses.append(load.balance_loss(statistics(0, 0), NUM_TOKENS))
        load.end_step()
        load.remember(COUNTS[step % 2, 1])
    torch.testing.assert_close(losses[0], formula(torch.ones(2, 3), PROBS[0, 0]))
    torch.testing.assert_close(losses[1], formula(COUNTS[0, 1], PROBS[0, 0]))
    torch.testing.assert_close(losses[2], formula(0.25 * COUNTS[0, 1] + 0.75 * COUNTS[1, 1], PROBS[0, 0]))


def walk_per_token(scope: str) -> list[torch.Tensor]:
    rank = dist.get_rank()
    load = GlobalLoad(scope=scope, is_per_token=True, group=dist.group.WORLD)
    if scope == "exact":
        load.expect(COUNTS[rank].sum(0))
    return [load.balance_loss(statistics(rank, m), NUM_TOKENS) for m in range(2)]


@pytest.mark.parametrize("scope", ["micro", "exact"])
def test_frequencies_per_token_sum_to_the_mean_number_of_experts(pool, scope):
    for rank, losses in enumerate(pool.run(walk_per_token, scope, world_size=2)):
        for micro, loss_L in enumerate(losses):
            counts_LE, tokens = (COUNTS[rank, micro], 6) if scope == "micro" else (COUNTS.sum((0, 1)), NUM_TOKENS)
            torch.testing.assert_close(loss_L, 3 * (counts_LE / tokens * PROBS[rank, micro] / NUM_TOKENS).sum(-1))


def test_a_counting_pass_that_routed_differently_is_an_error():
    load = GlobalLoad(scope="exact", group=None)
    other_LE = COUNTS[0, 0].clone()
    other_LE[0, 0] -= 1
    other_LE[0, 1] += 1
    load.expect(other_LE)
    load.balance_loss(statistics(0, 0), NUM_TOKENS)
    with pytest.raises(RoutingChangedError, match="differ by 2 rows"):
        load.end_step()


def test_private_experts_per_micro_batch_are_even_globally_and_not_locally():
    """Each micro-batch uses one expert only, all of them together use all: the case global balance exists for."""
    prob_sum_LE = torch.eye(4)
    rows = [torch.eye(4, dtype=torch.int64)[[m]] * 5 for m in range(4)]
    micro = [load_balancing_loss(frequency(rows[m]), 5 * prob_sum_LE[[m]], 5).item() for m in range(4)]
    assert micro == pytest.approx([4.0] * 4)
    over_all = frequency(sum(rows))
    total = sum(load_balancing_loss(over_all, 5 * prob_sum_LE[[m]], 20).item() for m in range(4))
    assert total == pytest.approx(1.0)


def test_figures_of_even_collapsed_and_empty_layers():
    even = load_figures(torch.tensor([[5, 5, 5, 5]]))
    assert (even.max_over_mean, even.cv, even.dead_expert_frac) == (1.0, 0.0, 0.0)
    collapsed = load_figures(torch.tensor([[20, 0, 0, 0], [5, 5, 5, 5]]))
    assert collapsed.max_over_mean == pytest.approx(2.5)
    assert collapsed.cv == pytest.approx((3**0.5 + 0) / 2)
    assert collapsed.dead_expert_frac == pytest.approx(3 / 8)
    assert load_figures(torch.zeros(1, 4, dtype=torch.int64)).max_over_mean == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coefficient": -1}, "balance.coefficient = -1"),
        ({"z_coefficient": -1}, "balance.z_coefficient = -1"),
        ({"local_coefficient": -1}, "balance.local_coefficient = -1"),
        ({"local_coefficient": 0.1, "scope": "exact"}, "scope 'exact' promises not to; .* balance.scope = 'global'"),
        ({"local_coefficient": 0.1, "scope": "sequence"}, "scope 'sequence'"),
        ({"frequency": "per_token"}, "only 'micro' and 'exact' know them"),
        ({"frequency": "per_row", "scope": "micro"}, "must be 'share' or 'per_token'"),
        ({"smoothing": 0.5}, "needs balance.scope = 'lagged'"),
        ({"smoothing": 1.0, "scope": "lagged"}, r"must lie in \[0, 1\)"),
    ],
)
def test_impossible_balance_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BalanceConfig(**fields).validate()
