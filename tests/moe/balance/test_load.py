"""GlobalLoad: which counts the loss sees, over ranks and micro-batches; and the figures made of counts."""

import pytest
import torch
import torch.distributed as dist

from moe.balance.health import load_figures
from moe.balance.load import BalanceConfig, GlobalLoad
from moe.balance.losses import frequency, load_balancing_loss

COUNTS = torch.tensor(
    [  # rank, micro-batch, layer, expert
        [[[4, 0, 2], [3, 3, 0]], [[0, 6, 0], [2, 2, 2]]],
        [[[1, 1, 4], [0, 0, 6]], [[6, 0, 0], [1, 4, 1]]],
    ]
)


def share(counts_LE):
    return counts_LE.double() / counts_LE.sum(-1, keepdim=True)


def walk(scope: str, rank: int, group) -> tuple[list, torch.Tensor]:
    load = GlobalLoad(scope=scope, group=group)
    frequencies = [load.frequency(COUNTS[rank, m]) for m in range(2)]
    total = load.end_step()
    # the second step must not remember the first
    again = load.frequency(COUNTS[rank, 0])
    load.end_step()
    return [*frequencies, again], total


def on_rank(scope: str):
    return walk(scope, dist.get_rank(), dist.group.WORLD)


def test_micro_sees_its_own_micro_batch(pool):
    for rank, (frequencies, total) in enumerate(pool.run(on_rank, "micro", world_size=2)):
        for m in range(2):
            torch.testing.assert_close(frequencies[m], share(COUNTS[rank, m]))
        assert torch.equal(total, COUNTS.sum((0, 1)))


def test_global_sees_all_ranks_and_the_micro_batches_so_far(pool):
    for frequencies, total in pool.run(on_rank, "global", world_size=2):
        torch.testing.assert_close(frequencies[0], share(COUNTS[:, 0].sum(0)))
        torch.testing.assert_close(frequencies[1], share(COUNTS.sum((0, 1))))
        torch.testing.assert_close(frequencies[2], share(COUNTS[:, 0].sum(0)))
        assert torch.equal(total, COUNTS.sum((0, 1)))


def test_one_process_needs_no_group():
    frequencies, total = walk("global", 0, None)
    torch.testing.assert_close(frequencies[1], share(COUNTS[0].sum(0)))
    assert torch.equal(total, COUNTS[0].sum(0))


def count_collectives(scope: str) -> int:
    calls = []
    original = dist.all_reduce
    dist.all_reduce = lambda tensor, **kwargs: (calls.append(tensor.dtype), original(tensor, **kwargs))[1]
    try:
        load = GlobalLoad(scope=scope, group=dist.group.WORLD)
        load.frequency(COUNTS[dist.get_rank(), 0])
    finally:
        dist.all_reduce = original
    assert all(dtype == torch.int64 for dtype in calls)
    return len(calls)


def test_a_micro_batch_costs_at_most_one_all_reduce_of_integers(pool):
    assert pool.run(count_collectives, "global", world_size=2) == [1, 1]
    assert pool.run(count_collectives, "micro", world_size=2) == [0, 0]


def test_private_experts_per_micro_batch_are_even_globally_and_not_locally():
    """Each micro-batch uses one expert only, all of them together use all: the case global balance exists for."""
    prob_sum_LE = torch.eye(4)
    rows = [torch.eye(4, dtype=torch.int64)[[m]] * 5 for m in range(4)]
    micro = [load_balancing_loss(frequency(rows[m]), 5 * prob_sum_LE[[m]], 5).item() for m in range(4)]
    assert micro == pytest.approx([4.0] * 4)
    over_all = frequency(sum(rows))
    assert sum(load_balancing_loss(over_all, 5 * prob_sum_LE[[m]], 20).item() for m in range(4)) == pytest.approx(1.0)


def test_figures_of_even_collapsed_and_empty_layers():
    even = load_figures(torch.tensor([[5, 5, 5, 5]]))
    assert (even.max_over_mean, even.cv, even.dead_expert_frac) == (1.0, 0.0, 0.0)
    collapsed = load_figures(torch.tensor([[20, 0, 0, 0], [5, 5, 5, 5]]))
    assert collapsed.max_over_mean == pytest.approx(2.5)
    assert collapsed.cv == pytest.approx((3**0.5 + 0) / 2)
    assert collapsed.dead_expert_frac == pytest.approx(3 / 8)
    assert load_figures(torch.zeros(1, 4, dtype=torch.int64)).max_over_mean == 1.0


@pytest.mark.parametrize("field", ["coefficient", "z_coefficient"])
def test_negative_coefficients_are_refused(field):
    with pytest.raises(ValueError, match=f"balance.{field} = -1"):
        BalanceConfig(**{field: -1}).validate()
