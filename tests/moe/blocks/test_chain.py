"""Chain of experts against the formulas of its residuals, written out; rounds, routers, shared expert and counts."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from moe.balance.statistics import collect
from moe.blocks.block import end_routers_step
from moe.blocks.chain import RESIDUALS, ChainConfig
from moe.blocks.rope import rotation
from moe.experts import Experts
from moe.initial import initialise
from moe.model import ModelConfig
from moe.parallel.groups import ParallelGroups
from moe.routers.dynamic_confidence import DynamicConfidenceConfig
from moe.routers.topk import TopKConfig
from moe.routing import RouterContext
from tiny import assert_near, tiny_config, tiny_model, tiny_tokens

D, T = 20, 5


def config_of(rounds: int = 2, residual: str = "delta", *, experts: int = 6, K: int = 2, **chain) -> ModelConfig:
    return tiny_config(
        num_hidden_layers=2,
        num_experts=experts,
        num_experts_per_tok=K,
        router=TopKConfig(),
        use_shared_expert_gate=True,
        chain=ChainConfig(rounds=rounds, residual=residual, **chain),
    )


def block_of(config: ModelConfig, **arguments):
    """Layer 0 in float64, with an attention that adds nothing, so that the residual stream is the block's input."""
    block = tiny_model(config, dtype=torch.float64, **arguments).layers[0]
    with torch.no_grad():
        block.attention.o_proj.weight.zero_()
    return block


def h_BSD(seed: int = 3) -> Tensor:
    return torch.randn(1, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(block, x: Tensor, context: RouterContext | None = None):
    cos, sin = rotation(torch.arange(T), head_dim=6, theta=1e4)
    return block(x, cos, sin, context or RouterContext())


def by_hand(block, h: Tensor) -> Tensor:
    """The chain, a round after the other, as arXiv 2506.18945 and its code write them."""
    moe, chain, norm = block.moe, block.chain, block.feed_forward_norm
    routers = [moe.router] * chain.rounds if chain.has_shared_router else moe.router.rounds

    def F(t: int, u: Tensor) -> Tensor:
        rows = []
        for u_D in u[0]:
            probs_E = torch.softmax(routers[t].weight @ u_D, -1)
            y_D = moe.shared_expert(u_D[None])[0] if t == 0 or chain.shared_expert == "every_round" else 0 * u_D
            for e in probs_E.argsort(descending=True)[: routers[t].num_experts_per_tok].tolist():
                gate_F, up_F = (moe.experts.gate_up_proj[e] @ u_D).chunk(2)
                y_D = y_D + probs_E[e] * (moe.experts.down_proj[e] @ (nn.functional.silu(gate_F) * up_F))
            rows.append(y_D)
        return torch.stack(rows)[None]

    u0 = norm(h)
    u, accumulated, stream = u0, 0 * h, h
    for t in range(chain.rounds):
        if chain.residual == "release":
            u = u + F(t, u)
        elif chain.residual == "delta":
            accumulated = accumulated + F(t, u0 + accumulated)
        elif chain.residual == "preln":
            stream = stream + F(t, norm(stream))
        elif chain.residual == "init":
            u = u0 + F(t, u)
        else:
            u = F(t, u)
    return {"delta": h + accumulated, "preln": stream, "outer": h + u}.get(chain.residual, u)


@pytest.mark.parametrize("shared_expert", ["every_round", "once"])
@pytest.mark.parametrize("has_shared_router", [False, True])
@pytest.mark.parametrize("rounds", [2, 3])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_output_and_every_gradient_equal_the_formula(residual, rounds, has_shared_router, shared_expert):
    block = block_of(
        config_of(rounds, residual, has_shared_router=has_shared_router, shared_expert=shared_expert)
    ).train()
    h = h_BSD().requires_grad_()
    leaves = [h, *block.moe.parameters(), block.feed_forward_norm.weight]
    upstream = h_BSD(4)
    results = []
    for y in (run(block, h)[0], by_hand(block, h)):
        results.append([y, *torch.autograd.grad(y, leaves, upstream)])
    for ours, expected in zip(*results, strict=True):
        assert_near(ours, expected, 1e-11)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_one_round_is_the_usual_block_exactly_where_the_stream_is_kept(residual):
    plain, chained = (block_of(config_of(1, r)) for r in ("delta", residual))
    usual = h_BSD() + plain.moe(plain.feed_forward_norm(h_BSD()), RouterContext())[0]
    y, routings = run(chained, h_BSD())
    assert len(routings) == 1
    assert set(chained.state_dict()) == set(block_of(replace(config_of(), chain=ChainConfig())).state_dict())
    if residual in ("delta", "preln", "outer"):
        assert torch.equal(y, usual)
    else:
        assert (y - usual).norm() > 0.1 * usual.norm()


@pytest.mark.parametrize("residual", RESIDUALS)
def test_experts_that_answer_zero_leave_the_stream_or_its_norm(residual):
    block, h = block_of(config_of(3, residual)), h_BSD()
    with torch.no_grad():
        block.moe.experts.down_proj.zero_()
        block.moe.shared_expert.down_proj.weight.zero_()
    expected = {"release": block.feed_forward_norm(h), "init": block.feed_forward_norm(h), "none": 0 * h}
    assert torch.equal(run(block, h)[0], expected.get(residual, h))


def test_a_shared_router_routes_as_separate_ones_with_its_weights():
    shared, separate = (block_of(config_of(2, has_shared_router=is_shared)) for is_shared in (True, False))
    with torch.no_grad():
        for name, parameter in separate.named_parameters():
            if ".router." not in name:
                parameter.copy_(shared.get_parameter(name))
        separate.moe.router.rounds[0].weight.copy_(shared.moe.router.weight)
    first, second = ([routing.logits_TE for routing in run(block, h_BSD())[1]] for block in (shared, separate))
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    with torch.no_grad():
        separate.moe.router.rounds[1].weight.copy_(shared.moe.router.weight)
    assert torch.equal(run(shared, h_BSD())[0], run(separate, h_BSD())[0])


def test_the_first_router_learns_through_the_later_rounds():
    block = block_of(config_of(2, "delta"))
    h, upstream = h_BSD(), h_BSD(4)
    seen: dict[int, Tensor] = {}
    block.moe.register_forward_hook(lambda _, args, out: seen.update({args[1].round: out[0]}))
    y, _ = run(block, h)
    first, second = (router.weight for router in block.moe.router.rounds)
    whole, other = torch.autograd.grad(y, (first, second), upstream, retain_graph=True)
    assert (whole - other).norm() > 1e-3 * whole.norm()
    # what reaches it through its own round alone, with the second round's answer held fixed
    (direct,) = torch.autograd.grad(seen[0], first, upstream, retain_graph=True)
    (through,) = torch.autograd.grad(seen[1], first, upstream)
    assert through.norm() > 1e-3 * whole.norm()
    assert_near(direct + through, whole, 1e-12)
    # and by perturbing it: the choice does not move, the output of the second round does
    step = 1e-6 * torch.randn(first.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        moved = []
        for sign in (1, -1):
            first += sign * step
            moved.append((run(block, h)[0] * upstream).sum())
            first -= sign * step
    assert_near((moved[0] - moved[1]) / 2, (whole * step).sum(), 1e-5)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_there_is_a_routing_for_every_layer_and_round_and_each_knows_its_round(rounds):
    config = tiny_config(chain=ChainConfig(rounds=rounds), router=TopKConfig(router_jitter_noise=0.1))
    model = tiny_model(config).train()
    seen = []
    for index in config.moe_layers:
        router = model.layers[index].moe.router
        for module in router.rounds if rounds > 1 else [router]:
            module.register_forward_pre_hook(lambda _, args: seen.append(args[1].round))
    _, routings = model(tiny_tokens(2, 4), context=RouterContext(position_T=torch.arange(8)))
    assert seen == list(range(rounds)) * 2
    assert collect(routings, num_sequences=2).tokens_per_expert_LE.shape == (2 * rounds, 6)
    assert len(config.routing_names) == len(set(config.routing_names)) == len(routings)
    assert config.routing_names[0] == ("0" if rounds == 1 else "0 round 1")


def test_an_expert_gets_the_sum_of_the_gradients_of_its_rounds():
    block, h, upstream = block_of(config_of(2)), h_BSD(), h_BSD(4)
    y, _ = run(block, h)
    expected = torch.autograd.grad(y, list(block.moe.experts.parameters()), upstream)
    pools = [
        Experts(num_experts=6, hidden_size=D, intermediate_size=14, groups=ParallelGroups.single(), backend="naive")
        for _ in range(2)
    ]
    for pool in pools:
        pool.double().load_state_dict(block.moe.experts.state_dict())
    forward = block.moe.forward
    block.moe.forward = lambda u, context, **given: forward(u, context, **{**given, "experts": pools[context.round]})
    apart, _ = run(block, h)
    assert torch.equal(apart, y)
    by_round = [torch.autograd.grad(apart, list(p.parameters()), upstream, retain_graph=True) for p in pools]
    for whole, first, second in zip(expected, *by_round, strict=True):
        assert first.any()
        assert second.any()
        assert_near(first + second, whole, 1e-12)


@pytest.mark.parametrize(("shared_expert", "num_shared"), [("every_round", 3), ("once", 1)])
def test_a_token_runs_rounds_times_k_experts_and_the_shared_one_as_often_as_asked(shared_expert, num_shared):
    block = block_of(config_of(3, shared_expert=shared_expert))
    rows, shared = [], []
    block.moe.experts.register_forward_pre_hook(lambda _, args: rows.append(int((args[1].expert_N < 6).sum())))
    block.moe.shared_expert.register_forward_pre_hook(lambda _, args: shared.append(args[0].shape[0]))
    run(block, h_BSD())
    assert rows == [2 * T] * 3
    assert shared == [T] * num_shared


@pytest.mark.parametrize("has_shared_router", [False, True])
@pytest.mark.parametrize("residual", ["delta", "preln"])
def test_recomputation_changes_no_bit_and_asks_each_router_once(residual, has_shared_router):
    config = config_of(2, residual, has_shared_router=has_shared_router)
    results, calls = [], []
    for is_checkpointed in (False, True):
        model = tiny_model(config, activation_checkpointing=is_checkpointed)
        router = model.layers[0].moe.router
        count: list[int] = []
        for module in [router] if has_shared_router else router.rounds:
            module.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        logits, routings = model(tiny_tokens(2, 7))
        (logits.square().sum() + sum(r.probs_TE.square().sum() for r in routings)).backward()
        results.append([logits, *(p.grad for p in model.parameters())])
        calls.append(len(count))
    assert calls == [2, 2]
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_every_round_keeps_a_selection_bias_of_its_own():
    config = replace(config_of(2), router=TopKConfig(use_selection_bias=True))
    model = tiny_model(config)
    counts_LE = torch.tensor([[0, 0, 0, 2, 2, 2], [2, 2, 2, 0, 0, 0]])
    end_routers_step(model, counts_LE, RouterContext(), num_tokens=3)
    first, second = (router.selection_bias for router in model.layers[0].moe.router.rounds)
    assert torch.equal(first, 1e-3 * torch.tensor([1.0, 1, 1, -1, -1, -1]))
    assert torch.equal(second, -first)


def test_a_shared_router_learns_from_all_rounds_together():
    shared = replace(config_of(2, has_shared_router=True), router=TopKConfig(use_selection_bias=True))
    model = tiny_model(shared)
    counts_LE = torch.tensor([[0, 0, 0, 2, 2, 2], [6, 6, 6, 0, 0, 0]])
    end_routers_step(model, counts_LE, RouterContext(), num_tokens=3)
    bias_E = model.layers[0].moe.router.selection_bias
    assert torch.equal(bias_E, 1e-3 * torch.tensor([-1.0, -1, -1, 1, 1, 1]))
    # a mean per token is one per token and round: 24 rows of 6 tokens in 2 rounds are two each, what is asked for
    held = replace(shared, router=DynamicConfidenceConfig(target_experts_per_tok=2.0))
    model = tiny_model(held)
    before = model.layers[0].moe.router.threshold.clone()
    end_routers_step(model, torch.full((2, 6), 2), RouterContext(), num_tokens=6)
    assert torch.equal(model.layers[0].moe.router.threshold, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chain": ChainConfig(rounds=0)}, "chain.rounds = 0 must be at least 1"),
        ({"chain": ChainConfig(residual="inner")}, "chain.residual = 'inner' must be one of delta, preln"),  # type: ignore[arg-type]
        ({"chain": ChainConfig(shared_expert="never")}, "chain.shared_expert = 'never'"),  # type: ignore[arg-type]
    ],
)
def test_a_chain_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes).validate()


def test_a_dense_model_has_no_chain():
    dense = tiny_config(
        num_experts=0, num_experts_per_tok=0, moe_intermediate_size=0, shared_expert_intermediate_size=0
    )
    with pytest.raises(ValueError, match="needs experts, but model.num_experts = 0"):
        replace(dense, chain=ChainConfig(rounds=2)).validate()


def test_the_routers_of_a_layer_start_apart():
    model = tiny_model(config_of(3))
    initialise(model, seed=0)
    weights = [router.weight for router in model.layers[0].moe.router.rounds]
    assert all(not torch.equal(a, b) for a, b in pairwise(weights))
