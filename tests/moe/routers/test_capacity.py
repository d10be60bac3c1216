"""Capacity: who is dropped under each policy against a loop by hand, what stays, and what the log says."""

import math
from dataclasses import replace

import pytest
import torch

from moe.balance.statistics import collect
from moe.routers.capacity import POLICIES, CapacityConfig, drop
from moe.routers.expert_choice import ExpertChoiceConfig
from moe.routers.relu import ReLUConfig
from moe.routers.topk import TopKConfig
from moe.routers.zero_experts import ZeroExpertsConfig
from moe.routing import RouterContext, Routing
from runs import curve, small_recipe, train
from tiny import tiny_config, tiny_model, tiny_tokens

D, E, K, T = 8, 4, 2, 23


def route(config=None, *, valid_T=None, num_tokens: int = T, skew: float = 1.0) -> Routing:
    router = (config or TopKConfig()).build(hidden_size=D, num_experts=E, num_experts_per_tok=K, layer_index=0)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        router.weight.copy_(torch.randn(E, D, generator=draw))
        router.weight[1] += skew
    x_TD = torch.randn(num_tokens, D, generator=draw) + 0.3
    return router(x_TD, RouterContext(valid_T=valid_T))


def kept_by_hand(routing: Routing, capacity: CapacityConfig, mean: float) -> set[tuple[int, int]]:
    """The (token, expert) pairs that find room, one row after the other in the order of the policy."""
    a = routing.assignment
    valid = len(routing.probs_TE) if routing.valid_T is None else int(routing.valid_T.sum())
    room = max(capacity.minimum, math.ceil(capacity.factor * valid * mean / a.num_experts))
    rows = [(t, n % K, e, w) for n, (t, e, w) in enumerate(zip(*(v.tolist() for v in fields_of(a)), strict=True))]
    rows = [row for row in rows if row[2] < a.num_experts]
    order = {"position": lambda r: r[:2], "choice": lambda r: (r[1], r[0]), "probs": lambda r: -r[3]}
    taken, pairs = [0] * a.num_experts, set()
    for t, _, e, _ in sorted(rows, key=order[capacity.policy]):
        if taken[e] < room:
            taken[e] += 1
            pairs.add((t, e))
    return pairs


def fields_of(assignment):
    return assignment.token_N, assignment.expert_N, assignment.weight_N


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 8.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_rows_are_kept_as_by_hand(policy, factor, padded):
    valid_T = torch.arange(T) % 3 != 0 if padded else None
    capacity = CapacityConfig(factor=factor, minimum=1, policy=policy, allow_noncausal=True)
    routing = drop(route(valid_T=valid_T), capacity, experts_per_tok=K, is_training=True)
    used_N = routing.kept.expert_N < E
    pairs = set(zip(routing.kept.token_N[used_N].tolist(), routing.kept.expert_N[used_N].tolist(), strict=True))
    assert pairs == kept_by_hand(routing, capacity, K)
    assert torch.equal(routing.kept.weight_N[used_N], routing.assignment.weight_N[used_N])
    assert not routing.kept.weight_N[~used_N].any()
    num_dropped = int((routing.assignment.expert_N < E).sum() - used_N.sum())
    assert collect([routing]).num_dropped_L.tolist() == [num_dropped]
    assert num_dropped > 0 if factor <= 1 else factor < 8 or num_dropped == 0


def test_balance_and_bias_see_what_was_chosen():
    routing = route()
    dropped = drop(routing, CapacityConfig(factor=0.5), experts_per_tok=K, is_training=True)
    before, after = collect([routing]), collect([dropped])
    assert torch.equal(before.tokens_per_expert_LE, after.tokens_per_expert_LE)
    assert torch.equal(before.prob_sum_LE, after.prob_sum_LE)


def test_weights_kept_sum_to_those_chosen_where_asked_and_gradients_stay_finite():
    routing = route()
    capacity = CapacityConfig(factor=0.25, minimum=1, renormalises=True)
    kept = drop(routing, capacity, experts_per_tok=K, is_training=True).kept
    chosen_T, kept_T = (torch.zeros(T).index_add(0, a.token_N, a.weight_N) for a in (routing.assignment, kept))
    has_any_T = torch.zeros(T).index_add(0, kept.token_N, (kept.expert_N < E).float()) > 0
    assert 0 < has_any_T.sum() < T, "the case must hold tokens that lose everything"
    torch.testing.assert_close(kept_T[has_any_T], chosen_T[has_any_T])
    (gradient,) = torch.autograd.grad(kept.weight_N.square().sum(), routing.logits_TE)
    assert torch.isfinite(gradient).all() and gradient.any()


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens_are_not_dropped(num_tokens):
    routing = drop(route(num_tokens=num_tokens), CapacityConfig(factor=1.0), experts_per_tok=K, is_training=True)
    assert torch.equal(routing.kept.expert_N, routing.assignment.expert_N)


def test_evaluation_has_a_factor_of_its_own():
    capacity = CapacityConfig(factor=0.5, eval_factor=0.0)
    assert drop(route(), capacity, experts_per_tok=K, is_training=False).kept is None
    assert drop(route(), CapacityConfig(), experts_per_tok=K, is_training=False).kept is None
    loose = drop(route(), replace(capacity, eval_factor=8.0), experts_per_tok=K, is_training=False)
    assert collect([loose]).num_dropped_L.item() == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_only_position_keeps_the_past_as_it_was(policy):
    capacity = CapacityConfig(factor=0.75, minimum=1, policy=policy, allow_noncausal=True)
    router = TopKConfig().build(hidden_size=D, num_experts=E, num_experts_per_tok=K, layer_index=0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.weight.copy_(torch.randn(E, D, generator=draw))
    changes = 0
    for _ in range(20):
        x_TD = torch.randn(T, D, generator=draw)
        other_TD = torch.cat((x_TD[: T // 2], torch.randn(T - T // 2, D, generator=draw)))
        first, second = (
            drop(router(x, RouterContext()), capacity, experts_per_tok=K, is_training=True).kept.expert_N.view(T, K)
            for x in (x_TD, other_TD)
        )
        changes += int((first != second)[: T // 2].any())
    assert (changes == 0) == (policy == "position")


def test_a_model_drops_in_every_layer_and_stays_the_same_where_there_is_room():
    tokens = tiny_tokens(2, 12)
    plain = tiny_config()
    outputs = {}
    for name, capacity in (
        ("plain", CapacityConfig()),
        ("roomy", CapacityConfig(factor=50.0)),
        ("tight", CapacityConfig(factor=0.3, minimum=1)),
    ):
        model = tiny_model(replace(plain, capacity=capacity)).train()
        outputs[name], routings = model(tokens)
        if name == "tight":
            assert (collect(routings).num_dropped_L > 0).all()
    assert torch.equal(outputs["plain"], outputs["roomy"])
    assert not torch.equal(outputs["plain"], outputs["tight"])


def test_a_run_counts_and_logs_what_it_drops(pool, run_root):
    recipe = small_recipe(run_root, "capacity", steps=3, model={"capacity": CapacityConfig(factor=0.5, minimum=1)})
    pool.run(train, recipe, world_size=2)
    rows = curve(recipe)
    assert all(0 < row["moe/dropped_frac"] < 1 for row in rows)
    K_run = recipe.model.num_experts_per_tok
    for row in rows:
        assert row["moe/experts_per_token"] == pytest.approx(K_run * (1 - row["moe/dropped_frac"]), rel=1e-9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"capacity": CapacityConfig(factor=-1.0)}, "factor = -1.0"),
        ({"capacity": CapacityConfig(factor=float("inf"))}, "must be finite"),
        ({"capacity": CapacityConfig(factor=1.0, policy="probs")}, "not causal"),
        ({"capacity": CapacityConfig(factor=1.0, policy="choice")}, "not causal"),
        ({"capacity": CapacityConfig(factor=1.0), "router": ZeroExpertsConfig()}, "zero_experts"),
        ({"capacity": CapacityConfig(factor=1.0), "router": ExpertChoiceConfig(allow_noncausal=True)}, "expert_choice"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(tiny_config(), **fields).validate()


def test_ragged_routers_drop_too():
    routing = drop(route(ReLUConfig()), CapacityConfig(factor=0.5, minimum=1), experts_per_tok=K, is_training=True)
    counts_E = torch.bincount(routing.kept.expert_N, minlength=E + 1)[:E]
    assert counts_E.max() <= math.ceil(0.5 * T * K / E)
