"""What every router promises, whatever its kind. The registry is walked: a new file is tested without an edit.

A kind whose defaults refuse to build for a causal model is built with allow_noncausal, and its causality is not tested.
"""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from moe.balance.statistics import collect
from moe.experts import Experts
from moe.layer import MoELayer
from moe.parallel.dispatch import LocalDispatcher
from moe.parallel.groups import ParallelGroups
from moe.routers import ROUTERS, Router, RouterConfig
from moe.routing import RouterContext, Routing
from moe_kernels import reference

D, F = 8, 6
SIZES = [(1, 1), (4, 2), (7, 3), (64, 8), (7, 7)]  # E, K
TOKENS = [0, 1, 5, 257]
KINDS = list(ROUTERS)
LEARNED = [kind for kind in KINDS if kind != "hash"]


def config_of(kind: str) -> RouterConfig:
    allow = {field.name: True for field in fields(ROUTERS[kind]) if field.name == "allow_noncausal"}
    return ROUTERS[kind](**allow)


def router_of(kind: str, E: int = 7, K: int = 3, dtype: torch.dtype = torch.float32) -> Router:
    config = config_of(kind)
    config.validate(num_experts=E, num_experts_per_tok=K)
    router = config.build(hidden_size=D, num_experts=E, num_experts_per_tok=K, layer_index=0)
    draw = torch.Generator().manual_seed(E)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return router.to(dtype)


def context_of(T: int, **given) -> RouterContext:
    draw = torch.Generator().manual_seed(9)
    return RouterContext(position_T=torch.arange(T), token_T=torch.randint(100, (T,), generator=draw), step=3, **given)


def tokens(T: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pairs(routing: Routing) -> set[tuple[int, int]]:
    assignment = routing.assignment
    both = zip(assignment.token_N.tolist(), assignment.expert_N.tolist(), strict=True)
    return {(token, expert) for token, expert in both if expert < assignment.num_experts}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize(("E", "K"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_list_of_rows_is_consistent(kind, E, K, T, dtype):
    routing = router_of(kind, E, K, dtype)(tokens(T, dtype), context_of(T))
    assignment = routing.assignment
    N = assignment.expert_N.numel()
    assert assignment.token_N.shape == assignment.weight_N.shape == (N,)
    assert assignment.token_N.dtype == assignment.expert_N.dtype == torch.int64
    assert assignment.num_experts == E
    used_N = assignment.expert_N < E
    assert ((assignment.expert_N >= 0) & (assignment.expert_N <= E)).all()
    assert ((assignment.token_N >= 0) & (assignment.token_N < max(T, 1))).all()
    assert len(pairs(routing)) == int(used_N.sum()), "a token has an expert twice"
    if assignment.fan_out is not None:
        assert torch.equal(assignment.token_N, torch.arange(T).repeat_interleave(assignment.fan_out))
    assert routing.logits_TE.dtype == routing.probs_TE.dtype == assignment.weight_N.dtype == torch.float32
    assert torch.isfinite(assignment.weight_N).all()
    assert (assignment.weight_N[used_N] >= 0).all()
    torch.testing.assert_close(routing.probs_TE.sum(-1), torch.ones(T), rtol=1e-5, atol=1e-5)
    statistics = collect([routing])
    assert int(statistics.tokens_per_expert_LE.sum()) == int(used_N.sum())
    assert torch.isfinite(statistics.entropy_sum_L).all()
    assert torch.isfinite(statistics.router_loss_sum_L).all()


def layer_of(kind: str, E: int = 7, K: int = 3, *, checkpointing: bool = False) -> MoELayer:
    experts = Experts(
        num_experts=E, hidden_size=D, intermediate_size=F, groups=ParallelGroups.single(), backend="segments"
    )
    router = router_of(kind, E, K)
    layer = MoELayer(
        router=router, dispatcher=LocalDispatcher(), experts=experts, activation_checkpointing=checkpointing
    )
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / D**0.5)
    return layer.train()


@pytest.mark.parametrize("T", [1, 5, 33])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_equals_the_reference_forward_and_backward(kind, T):
    layer = layer_of(kind).double()
    x_BSD = tokens(T, torch.float64).unsqueeze(0).requires_grad_()
    y_BSD, (routing,) = layer(x_BSD, context_of(T))
    rows, experts = routing.assignment, layer.experts
    expected_TD = reference.experts(
        x_BSD[0], rows.token_N, rows.expert_N, rows.weight_N, experts.gate_up_proj, experts.down_proj
    )
    if routing.identity_weight_T is not None:
        expected_TD = expected_TD + routing.identity_weight_T.unsqueeze(1) * x_BSD[0]
    torch.testing.assert_close(y_BSD[0], expected_TD, rtol=1e-11, atol=1e-11)
    dy_BSD = tokens(T, torch.float64, seed=2).unsqueeze(0)
    leaves = [x_BSD, *layer.parameters()]
    got = torch.autograd.grad(y_BSD, leaves, dy_BSD, retain_graph=True, allow_unused=True)
    want = torch.autograd.grad(expected_TD, leaves, dy_BSD[0], allow_unused=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a if a is not None else b * 0, b if b is not None else a * 0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_pass_finite_differences_for_a_fixed_choice(kind):
    router = router_of(kind, dtype=torch.float64)
    x_TD, context = tokens(5, torch.float64).requires_grad_(), context_of(5)
    weight_N = router(x_TD, context).assignment.weight_N
    if weight_N.requires_grad:
        assert torch.autograd.gradcheck(lambda x: router(x, context).assignment.weight_N, x_TD, atol=1e-5)
    else:
        assert kind == "hash"


@pytest.mark.parametrize("kind", KINDS)
def test_renumbering_tokens_renumbers_their_experts(kind):
    router, T = router_of(kind).eval(), 12
    context, x_TD = context_of(T), tokens(T)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(3))
    moved = replace(context, position_T=context.position_T[order], token_T=context.token_T[order])
    plain, shuffled = pairs(router(x_TD, context)), pairs(router(x_TD[order], moved))
    assert {(order[token].item(), expert) for token, expert in shuffled} == plain


@pytest.mark.parametrize("kind", [kind for kind in LEARNED if kind != "forced"])
def test_renumbering_experts_renumbers_the_choice(kind):
    router, other = router_of(kind).eval(), router_of(kind).eval()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        other.weight[:7] = router.weight[:7][order]  # rows beyond are of zero-computation experts
    plain, moved = (pairs(r(tokens(12), context_of(12))) for r in (router, other))
    assert {(token, order[expert].item()) for token, expert in moved} == plain


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_not_routed_and_not_counted(kind):
    router, T = router_of(kind), 10
    valid_T = torch.arange(T) % 3 != 0
    routing = router(tokens(T), context_of(T, valid_T=valid_T))
    assert {token for token, _ in pairs(routing)} <= set(valid_T.nonzero().flatten().tolist())
    statistics = collect([routing])
    assert int(statistics.num_tokens) == int(valid_T.sum())
    nothing = router(tokens(T), context_of(T, valid_T=torch.zeros(T, dtype=torch.bool)))
    assert not pairs(nothing)
    total = nothing.assignment.weight_N.sum() + collect([nothing]).prob_sum_LE.sum()
    assert torch.isfinite(total)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_routes_alike_and_gives_the_same_gradients(kind):
    x_BSD, results = tokens(20).unsqueeze(0), []
    for checkpointing in (False, True):
        layer = layer_of(kind, checkpointing=checkpointing)
        y_BSD, (routing,) = layer(x_BSD, context_of(20))
        gradients = torch.autograd.grad(y_BSD.square().sum(), list(layer.parameters()), allow_unused=True)
        results.append((pairs(routing), y_BSD.detach(), gradients))
    (rows, y, gradients), (other_rows, other_y, other_gradients) = results
    assert rows == other_rows
    assert torch.equal(y, other_y)
    for a, b in zip(gradients, other_gradients, strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if ROUTERS[kind].is_causal])
def test_a_token_does_not_see_later_ones(kind):
    router, x_TD = router_of(kind).train(), tokens(16)
    later = x_TD.clone()
    later[9:] = tokens(7, seed=8)
    before, after = (pairs(router(x, context_of(16))) for x in (x_TD, later))
    assert {pair for pair in before if pair[0] < 9} == {pair for pair in after if pair[0] < 9}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not ROUTERS[kind].is_causal])
def test_a_router_that_sees_later_tokens_says_so_and_is_refused(kind):
    with pytest.raises(ValueError, match="is not causal.*allow_noncausal"):
        ROUTERS[kind]().validate(num_experts=4, num_experts_per_tok=2)
    router, x_TD = router_of(kind).train(), tokens(64)
    later = x_TD.clone()
    later[32:] = 5 * tokens(32, seed=8)
    before, after = (pairs(router(x, context_of(64))) for x in (x_TD, later))
    assert {pair for pair in before if pair[0] < 32} != {pair for pair in after if pair[0] < 32}


@pytest.mark.parametrize("kind", KINDS)
def test_forward_changes_no_state_and_the_state_survives_bfloat16_and_checkpoints(kind):
    router = router_of(kind)
    context = context_of(40)
    for step in range(3):
        counts_E = torch.bincount(router(tokens(40), context).assignment.expert_N, minlength=8)[:7]
        router.end_step(counts_E, replace(context, step=step), num_tokens=40)
    state = {name: value.clone() for name, value in router.state_dict().items()}
    router.train()(tokens(40), context)
    router.eval()(tokens(40), context)
    assert all(torch.equal(value, state[name]) for name, value in router.state_dict().items())
    half = router_of(kind).bfloat16()
    half.load_state_dict(router.state_dict())
    for name, value in half.named_buffers():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[name])
    twin = router_of(kind)
    twin.load_state_dict(state)
    assert pairs(twin(tokens(40), context)) == pairs(router.train()(tokens(40), context))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_input_gives_equal_bits(kind):
    first, second = (router_of(kind)(tokens(40), context_of(40)) for _ in range(2))
    assert torch.equal(first.assignment.expert_N, second.assignment.expert_N)
    assert torch.equal(first.assignment.weight_N, second.assignment.weight_N)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_a_layer_gets_a_finite_gradient(kind):
    layer = layer_of(kind)
    y_BSD, _ = layer(tokens(33).unsqueeze(0), context_of(33))
    y_BSD.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert kind == "hash" or layer.router.weight.grad.count_nonzero() > 0
