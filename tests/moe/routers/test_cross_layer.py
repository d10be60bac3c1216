"""Cross-layer reuse: grouping, growth of pools, masks, and models that share experts against those that do not."""

from dataclasses import replace
from fractions import Fraction
from math import floor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.balance.health import load_figures
from moe.balance.losses import frequency, load_balancing_loss
from moe.balance.statistics import collect
from moe.config import ModelConfig
from moe.counts import count_parameters
from moe.initial import initialise
from moe.model import Model
from moe.parallel.groups import ParallelGroups
from moe.presets import rexmoe
from moe.routers.cross_layer import PoolPlace, ReuseConfig, linear_pool_size, stepwise_pool_size
from moe.routers.dynamic_confidence import DynamicConfidenceConfig
from moe.routers.topk import TopKConfig
from moe.routing import Assignment, RouterContext, Routing
from tiny import assert_near, tiny_config, tiny_model, tiny_tokens

N, K, STEPS = 6, 2, 1000


def config_of(group_size: int = 2, *, layers: int = 4, router: TopKConfig | None = None, **reuse) -> ModelConfig:
    return tiny_config(
        num_hidden_layers=layers,
        mlp_only_layers=(),
        router=router or TopKConfig(),
        reuse=ReuseConfig(group_size=group_size, **reuse),
    )


def at(step: int, **given) -> RouterContext:
    return RouterContext(step=step, progress=step / STEPS, **given)


def vanilla_of(shared: Model) -> Model:
    """The model whose layers have their own share of the pools, and routers with the rows of these alone."""
    config = replace(shared.config, reuse=ReuseConfig())
    vanilla = tiny_model(config, dtype=next(shared.parameters()).dtype)
    state = {name: value for name, value in shared.state_dict().items() if not name.startswith("pools.")}
    for index in config.moe_layers:
        place = shared.config.pool_place(index)
        own = slice(place.member * N, (place.member + 1) * N)
        state[f"layers.{index}.moe.router.weight"] = state[f"layers.{index}.moe.router.weight"][own]
        for name, value in shared.pools[place.pool].state_dict().items():
            state[f"layers.{index}.moe.experts.{name}"] = value[own]
    vanilla.load_state_dict(state)
    return vanilla


def loss_of(logits: Tensor, routings: list[Routing], token: Tensor) -> Tensor:
    statistics = collect(routings)
    balance = load_balancing_loss(frequency(statistics.tokens_per_expert_LE), statistics.prob_sum_LE, token.numel())
    return F.cross_entropy(logits.flatten(0, 1), token.flatten()) + balance.sum() + statistics.z_sum_L.sum() / 100


def test_a_group_of_one_is_the_plain_model():
    plain, shared = tiny_model(config_of(1)), tiny_model(config_of(1, keep="random", mask="zero_score"))
    assert plain.pools is None
    assert set(shared.state_dict()) == set(
        tiny_model(tiny_config(num_hidden_layers=4, mlp_only_layers=())).state_dict()
    )
    token = tiny_tokens(2, 5)
    assert torch.equal(plain(token)[0], shared.train()(token, context=at(300))[0])


@pytest.mark.parametrize("keep", ["local_first", "random"])
@pytest.mark.parametrize("router", [TopKConfig(), TopKConfig(scoring_func="sigmoid", norm_topk_prob=True)], ids=str)
def test_with_only_its_own_experts_open_a_layer_is_a_plain_one(router, keep):
    model = tiny_model(config_of(4, layers=5, router=router, schedule="linear", keep=keep), dtype=torch.float64)
    # in evaluation a layer's own experts stay whatever `keep` says
    model.train(keep == "local_first")
    vanilla, token = vanilla_of(model), tiny_tokens(3, 7)
    logits, routings = model(token, context=at(100))
    expected, plain_routings = vanilla(token)
    assert_near(logits, expected, 1e-13)
    loss, plain_loss = loss_of(logits, routings, token), loss_of(expected, plain_routings, token)
    assert_near(loss, plain_loss, 1e-13)
    loss.backward()
    plain_loss.backward()
    for index in model.config.moe_layers:
        place = model.config.pool_place(index)
        own = slice(place.member * N, (place.member + 1) * N)
        plain = vanilla.layers[index].moe
        router_grad = model.layers[index].moe.router.weight.grad
        assert_near(router_grad[own], plain.router.weight.grad, 1e-11)
        assert not torch.cat([router_grad[: own.start], router_grad[own.stop :]]).any()
        for name, parameter in model.pools[place.pool].named_parameters():
            assert_near(parameter.grad[own], plain.experts.get_parameter(name).grad, 1e-11)


def test_groups_are_adjacent_layers_and_the_last_may_be_smaller():
    reuse = ReuseConfig(group_size=4)
    places = [reuse.place(index, num_layers=6) for index in range(6)]
    assert [(p.pool, p.member, p.num_members) for p in places] == [
        *((0, member, 4) for member in range(4)),
        *((1, member, 2) for member in range(2)),
    ]
    config = config_of(4, layers=6)
    assert config.pool_sizes == (4 * N, 2 * N)
    model = tiny_model(config)
    assert [block.moe.router.weight.shape[0] for block in model.layers] == [24] * 4 + [12] * 2
    # dense layers in between do not count
    mixed = tiny_config(num_hidden_layers=5, mlp_only_layers=(1,), reuse=ReuseConfig(group_size=2))
    assert [mixed.pool_place(index).pool for index in mixed.moe_layers] == [0, 0, 1, 1]


@pytest.mark.parametrize("size", [linear_pool_size, stepwise_pool_size])
@pytest.mark.parametrize(("experts", "members"), [(6, 1), (6, 2), (48, 3), (64, 4), (7, 5)])
def test_a_pool_grows_from_one_layers_experts_to_all(size, experts, members):
    first, last = 100, 301
    sizes = [size(step, first=first, last=last, num_experts=experts, num_members=members) for step in range(last + 100)]
    assert all(isinstance(n, int) for n in sizes)
    assert sizes == sorted(sizes)
    assert set(sizes[:first]) == {experts}
    assert set(sizes[last:]) == {members * experts}
    if size is linear_pool_size:
        assert sizes[first] == experts
        # the formula of the paper in exact fractions
        for step in range(first, last):
            grown = Fraction((members - 1) * experts * (step - first), last - first)
            assert sizes[step] == experts + floor(grown)
    else:
        assert {n % experts for n in sizes} == {0}


def test_the_growth_of_the_paper_is_met_at_its_steps_and_where_floats_are_one_short():
    assert linear_pool_size(234, first=100, last=301, num_experts=48, num_members=3) == 112
    steps = {"first": 10_000, "last": 30_000, "num_experts": 64, "num_members": 4}
    sizes = [stepwise_pool_size(step, **steps) for step in (9_999, 10_000, 19_999, 20_000, 29_999, 30_000)]
    assert sizes == [64, 128, 128, 192, 192, 256]


@pytest.mark.parametrize("total", [3, 7, 1000, 47_684, 1_000_003])
def test_the_growth_reads_the_clock_from_step_and_progress(total):
    reuse = ReuseConfig(group_size=3, schedule="linear", start=0.1, end=0.301)
    first, last = round(0.1 * total), round(0.301 * total)
    for step in sorted({0, 1, first, first + 1, (first + last) // 2, last - 1, last, last + 1, total - 1, total}):
        if 0 <= step <= total:
            context = RouterContext(step=step, progress=step / total)
            # a run that is over has everything open, however short it was
            expected = linear_pool_size(step, first=first, last=last, num_experts=48, num_members=3)
            assert reuse.num_open(context, num_experts=48, num_members=3) == (144 if step == total else expected)


def opened(reuse: ReuseConfig, context: RouterContext, *, member: int = 1, layer: int = 1, is_training: bool = True):
    return reuse.open_experts(
        context,
        place=PoolPlace(pool=0, member=member, num_members=reuse.group_size),
        num_experts=N,
        layer_index=layer,
        is_training=is_training,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("keep", ["local_first", "random"])
def test_the_mask_is_a_function_of_seed_step_and_layer_alone(keep):
    reuse = ReuseConfig(group_size=4, schedule="linear", keep=keep)
    first = opened(reuse, at(420, seed=3))
    assert first is not None
    assert int(first.sum()) == reuse.num_open(at(420), num_experts=N, num_members=4) == 15
    # what differs between micro-batches, ranks, rounds and the recompute
    elsewhere = at(420, seed=3, position_T=torch.arange(5), valid_T=torch.zeros(5, dtype=torch.bool), round=1)
    torch.rand(3)
    assert torch.equal(first, opened(reuse, elsewhere))
    for other in (
        opened(reuse, at(421, seed=3)),
        opened(reuse, at(420, seed=4)),
        opened(reuse, at(420, seed=3), layer=2),
    ):
        assert not torch.equal(first, other)
    own = slice(N, 2 * N)
    draws = torch.stack([opened(reuse, at(step))[own] for step in range(250, 400)])
    assert draws.all() == (keep == "local_first")
    assert opened(reuse, at(420), is_training=False)[own].all()
    assert opened(reuse, at(640)) is None
    assert opened(replace(reuse, schedule="none"), at(0)) is None


def test_every_expert_that_is_not_local_is_open_about_as_often():
    reuse = ReuseConfig(group_size=4, schedule="linear", start=0.0, end=1.0)
    share_E = torch.stack([opened(reuse, at(500, seed=seed)) for seed in range(2000)]).float().mean(0)
    assert (share_E[N : 2 * N] == 1).all()
    others = torch.cat([share_E[:N], share_E[2 * N :]])
    assert (others - 0.5).abs().max() < 0.06  # 5 standard deviations of 2000 draws


@pytest.mark.parametrize("mask", ["neg_inf", "zero_score"])
def test_closed_experts_get_no_token_and_no_gradient(mask):
    config = config_of(2, schedule="linear", keep="random", mask=mask)
    model, token = tiny_model(config, activation_checkpointing=True).train(), tiny_tokens(4, 16)
    logits, routings = model(token, context=at(420))
    loss_of(logits, routings, token).backward()
    seen = torch.zeros(2, 2 * N, dtype=torch.bool)
    for index, routing in enumerate(routings):
        assert routing.active_E is not None
        assert int(routing.active_E.sum()) == 9
        counts_E = torch.bincount(routing.assignment.expert_N, minlength=2 * N)
        assert not counts_E[~routing.active_E].any()
        assert int(counts_E.sum()) == K * 64
        seen[index // 2] |= counts_E > 0
    for pool, seen_E in zip(model.pools, seen, strict=True):
        assert not seen_E.all()
        for parameter in pool.parameters():
            assert torch.equal(parameter.grad.flatten(1).any(1), seen_E)


@pytest.mark.parametrize(("mask", "is_one"), [("neg_inf", True), ("zero_score", False)])
def test_zero_score_loses_the_mass_of_closed_experts_and_neg_inf_does_not(mask, is_one):
    model = tiny_model(config_of(2, schedule="linear", mask=mask))
    router, x_TD = model.layers[0].moe.router, torch.randn(30, 20)
    open_E = torch.arange(2 * N) < N
    context = RouterContext(open_E=open_E, use_zero_score=mask == "zero_score")
    routing = router(x_TD, context)
    probs_TE = torch.softmax(x_TD @ router.weight.T, -1)
    if is_one:
        probs_TE = probs_TE * open_E / (probs_TE * open_E).sum(-1, keepdim=True)
    expected_TK = (probs_TE * open_E).topk(K).values
    torch.testing.assert_close(routing.assignment.weight_N.view(-1, K), expected_TK)
    assert (expected_TK.sum(-1) <= 1).all()
    # what the balance loss reads are probabilities of open experts in any case
    torch.testing.assert_close(routing.probs_TE.sum(-1), torch.ones(30))
    assert not routing.probs_TE[:, ~open_E].any()
    assert torch.isfinite(routing.logits_TE).all() == (mask == "zero_score")


def even_routing(num_open: int, num_experts: int) -> Routing:
    """As many rows and as much probability for each of the first experts."""
    T = 12 * num_open
    probs_TE = torch.zeros(T, num_experts)
    probs_TE[:, :num_open] = 1 / num_open
    return Routing(
        assignment=Assignment(
            token_N=torch.arange(T),
            expert_N=torch.arange(T) % num_open,
            weight_N=torch.ones(T),
            num_experts=num_experts,
            fan_out=1,
        ),
        logits_TE=torch.zeros(T, num_experts),
        probs_TE=probs_TE,
        active_E=torch.arange(num_experts) < num_open if num_open < num_experts else None,
    )


def test_even_load_over_the_open_experts_is_exactly_one_also_beside_wider_layers():
    # 12 tokens for every open expert, so that each layer has its own T; the statistics are taken a layer at a time
    for num_open, num_experts in ((4, 16), (8, 8), (2, 4)):
        routing = even_routing(num_open, num_experts)
        statistics = collect([routing])
        loss = load_balancing_loss(
            frequency(statistics.tokens_per_expert_LE), statistics.prob_sum_LE, statistics.num_tokens
        )
        assert loss.item() == 1.0
        figures = load_figures(statistics.tokens_per_expert_LE, statistics.active_LE)
        assert (figures.max_over_mean, figures.cv, figures.dead_expert_frac) == (1.0, 0.0, 0.0)
    layers = [replace_tokens(even_routing(num_open, size)) for num_open, size in ((4, 16), (8, 8), (4, 4), (16, 16))]
    statistics = collect(layers, num_sequences=2)
    assert statistics.active_LE.sum(-1).tolist() == [4, 8, 4, 16]
    loss_L = load_balancing_loss(frequency(statistics.tokens_per_expert_LE), statistics.prob_sum_LE, 48)
    assert loss_L.tolist() == [1.0] * 4
    figures = load_figures(statistics.tokens_per_expert_LE, statistics.active_LE)
    assert (figures.max_over_mean, figures.cv, figures.dead_expert_frac) == (1.0, 0.0, 0.0)


def replace_tokens(routing: Routing) -> Routing:
    """The routing of the first 48 tokens."""
    rows = routing.assignment
    assignment = replace(rows, token_N=rows.token_N[:48], expert_N=rows.expert_N[:48], weight_N=rows.weight_N[:48])
    return replace(routing, assignment=assignment, logits_TE=routing.logits_TE[:48], probs_TE=routing.probs_TE[:48])


@pytest.mark.parametrize("group_size", [2, 3, 4])
def test_sharing_adds_rows_to_routers_and_nothing_else(group_size):
    config = config_of(group_size, layers=12)
    count, plain = count_parameters(config), count_parameters(replace(config, reuse=ReuseConfig()))
    assert count.experts == plain.experts
    assert count.router == group_size * plain.router
    assert count.total - plain.total == (group_size - 1) * plain.router
    assert count.active - count.router == plain.active - plain.router


def test_the_published_model_has_the_experts_of_its_base_and_a_thousandth_more_parameters():
    config = rexmoe()
    config.validate()
    count, base = count_parameters(config), count_parameters(replace(config, reuse=ReuseConfig()))
    assert count.experts == base.experts == 32 * 64 * 3 * 512 * 744
    assert count.router - base.router == 3 * 64 * 512 * 32 == 3_145_728
    assert base.total == pytest.approx(2.4e9, rel=0.03)


def test_layers_of_a_group_use_one_storage_whose_gradients_add_up():
    model, token = tiny_model(config_of(2), dtype=torch.float64), tiny_tokens(2, 6)
    names = [name for name in model.state_dict() if name.endswith("_proj") and "attention" not in name]
    assert names == [f"pools.{g}.{part}_proj" for g in range(2) for part in ("gate_up", "down")]
    addresses = {value.data_ptr() for value in model.state_dict().values()}
    assert len(addresses) == len(model.state_dict())
    assert all(block.moe.experts is None for block in model.layers)
    logits, _ = model(token)
    upstream = torch.randn(logits.shape, dtype=torch.float64)
    whole = torch.autograd.grad(logits, model.pools[0].gate_up_proj, upstream)[0]
    parts = []
    for block in model.layers[:2]:
        # the other layer of the group sees the same numbers in a tensor of its own
        forward = block.forward
        twin = tiny_model(config_of(2), dtype=torch.float64).pools[0]
        block.forward = lambda *given, forward=forward, twin=twin: forward(*given[:5], twin, *given[6:])
        apart = model(token)[0]
        assert torch.equal(apart, logits)
        parts.append(torch.autograd.grad(apart, twin.gate_up_proj, upstream)[0])
        block.forward = forward
    assert all(part.any() for part in parts)
    assert_near(sum(parts), whole, 1e-12)


def test_first_weights_of_a_pool_are_drawn_like_those_of_a_layer():
    model = Model(config_of(2, layers=4), groups=ParallelGroups.single())
    initialise(model, seed=0)
    std = model.config.initializer_range
    for pool in model.pools:
        assert pool.gate_up_proj.std().item() == pytest.approx(std, rel=0.05)
        assert pool.down_proj.std().item() == pytest.approx(std / 8**0.5, rel=0.05)
    first, second = (pool.gate_up_proj for pool in model.pools)
    assert not torch.equal(first, second)


def test_a_model_that_is_asked_without_a_context_has_all_experts_open():
    model, token = tiny_model(config_of(2, schedule="linear")).eval(), tiny_tokens(2, 6)
    assert all(routing.active_E is None for routing in model(token)[1])
    assert torch.equal(model(token)[0], model(token, context=at(STEPS))[0])
    assert all(routing.active_E is not None for routing in model(token, context=at(300))[1])


@pytest.mark.parametrize("keep", ["local_first", "random"])
def test_a_layers_own_experts_can_grow_without_any_reuse(keep):
    config = config_of(1, schedule="linear", keep=keep, num_shares=3)
    model, token = tiny_model(config).train(), tiny_tokens(4, 16)
    assert model.pools is None
    for step, num_open in ((0, 2), (210, 2), (420, 4), (640, 6), (900, 6)):
        _, routings = model(token, context=at(step))
        for routing in routings:
            open_E = torch.ones(N, dtype=torch.bool) if routing.active_E is None else routing.active_E
            assert int(open_E.sum()) == num_open
            assert not torch.bincount(routing.assignment.expert_N, minlength=N)[~open_E].any()
            assert step or keep == "random" or open_E.tolist() == [True] * 2 + [False] * 4
    assert all(routing.active_E is None for routing in model.eval()(token)[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reuse": ReuseConfig(schedule="linear", num_shares=4)}, "num_shares = 4 does not divide model.num_experts"),
        (
            {"reuse": ReuseConfig(schedule="linear", num_shares=6)},
            "num_experts_per_tok = 2 must lie in 1..num_experts = 1",
        ),
        ({"reuse": ReuseConfig(num_shares=1)}, "num_shares = 1 must be at least 2"),
        ({"reuse": ReuseConfig(group_size=0)}, "group_size = 0 must be at least 1"),
        ({"reuse": ReuseConfig(start=0.7)}, "start = 0.7 and model.reuse.end = 0.63"),
        ({"reuse": ReuseConfig(schedule="cosine")}, "schedule = 'cosine' must be one of none, linear, stepwise"),  # type: ignore[arg-type]
        ({"reuse": ReuseConfig(keep="some")}, "keep = 'some' must be one of"),  # type: ignore[arg-type]
        ({"reuse": ReuseConfig(mask="soft")}, "mask = 'soft' must be one of"),  # type: ignore[arg-type]
        (
            {"reuse": ReuseConfig(group_size=2, schedule="linear"), "num_experts_per_tok": 7},
            r"num_experts_per_tok = 7 must lie in 1..num_experts = 6",
        ),
        (
            {"reuse": ReuseConfig(group_size=2, schedule="linear"), "router": DynamicConfidenceConfig()},
            "router kind 'dynamic_confidence' cannot leave closed experts out",
        ),
        (
            {"reuse": ReuseConfig(group_size=2, schedule="linear"), "router": TopKConfig(use_selection_bias=True)},
            "use_selection_bias = True does not go with a growing pool",
        ),
        (
            {"reuse": ReuseConfig(group_size=2, schedule="linear"), "router": TopKConfig(n_group=2)},
            "n_group = 2 does not go with a growing pool",
        ),
    ],
)
def test_a_pool_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes).validate()
