"""MoELayer against a loop over tokens; recomputation changes nothing; the experts see the input without jitter."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.experts import Experts
from moe.layer import MoELayer
from moe.parallel.dispatch import make_dispatcher
from moe.parallel.groups import ParallelGroups
from moe.routers.topk import TopKConfig
from moe.routing import RouterContext
from moe_kernels.backends import BACKENDS

D, HIDDEN, E = 6, 5, 4


def make_layer(config: TopKConfig, *, shared: bool = False, checkpointing: bool = False, K: int = 2) -> MoELayer:
    groups = ParallelGroups.single()
    layer = MoELayer(
        router=config.build(hidden_size=D, num_experts=E, num_experts_per_tok=K, layer_index=0),
        dispatcher=make_dispatcher(groups, num_experts=E),
        experts=Experts(num_experts=E, hidden_size=D, intermediate_size=HIDDEN, groups=groups, backend="naive"),
        shared_expert=nn.Linear(D, D, bias=False) if shared else None,
        activation_checkpointing=checkpointing,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def by_hand(layer: MoELayer, x_TD: Tensor, K: int = 2) -> Tensor:
    """Softmax over all experts, the K best, each token on its own."""
    rows = []
    for x_D in x_TD:
        probs_E = torch.softmax(layer.router.weight @ x_D, -1)
        y_D = layer.shared_expert(x_D) if layer.shared_expert is not None else torch.zeros(D)
        for e in probs_E.argsort(descending=True)[:K].tolist():
            gate_F, up_F = (layer.experts.gate_up_proj[e] @ x_D).chunk(2)
            y_D = y_D + probs_E[e] * (layer.experts.down_proj[e] @ (F.silu(gate_F) * up_F))
        rows.append(y_D)
    return torch.stack(rows) if rows else torch.zeros(0, D)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (0, 3)])
@pytest.mark.parametrize("K", [1, 2, E])
def test_output_and_gradients_equal_a_loop_over_tokens(shape, K, shared):
    results = []
    x_BSD = torch.randn(*shape, D)
    upstream = torch.randn(*shape, D)
    for is_layer in (True, False):
        layer = make_layer(TopKConfig(), shared=shared, K=K)
        x = x_BSD.clone().requires_grad_()
        y = layer(x, RouterContext())[0] if is_layer else by_hand(layer, x.view(-1, D), K).view(x.shape)
        y.backward(upstream) if y.requires_grad else None
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in layer.parameters()]
        results.append([y.detach(), x.grad if x.grad is not None else torch.zeros_like(x), *gradients])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_recomputation_changes_no_bit_and_routes_once(shared):
    x_BSD, upstream = torch.randn(2, 5, D), torch.randn(2, 5, D)
    results, num_routed = [], []
    for checkpointing in (False, True):
        layer = make_layer(TopKConfig(router_jitter_noise=0.2), shared=shared, checkpointing=checkpointing).train()
        calls = []
        layer.router.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        x = x_BSD.clone().requires_grad_()
        y, routings = layer(x, RouterContext(position_T=torch.arange(10)))
        y.backward(upstream)
        num_routed.append(len(calls))
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters()), routings[0].assignment.expert_N])
    assert num_routed == [1, 1]
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_experts_see_the_input_without_jitter():
    layer = make_layer(TopKConfig(router_jitter_noise=0.5)).train()
    seen = []
    layer.experts.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    x_BSD = torch.randn(1, 7, D)
    kept = x_BSD.clone()
    layer(x_BSD, RouterContext(position_T=torch.arange(7)))
    assert torch.equal(seen[0], kept[0])
    assert torch.equal(x_BSD, kept)


def test_padding_gets_nothing_from_experts():
    layer = make_layer(TopKConfig())
    x_BSD = torch.randn(1, 4, D)
    valid_T = torch.tensor([True, False, True, False])
    y_BSD, _ = layer(x_BSD, RouterContext(valid_T=valid_T))
    full_BSD, _ = layer(x_BSD, RouterContext())
    assert y_BSD[0, ~valid_T].abs().max() == 0
    torch.testing.assert_close(y_BSD[0, valid_T], full_BSD[0, valid_T])


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_a_layer_gives_the_same_with_every_backend_that_runs_here(backend):
    groups = ParallelGroups.single()
    outputs = []
    for name in ("naive", backend):
        torch.manual_seed(1)
        try:
            experts = Experts(num_experts=E, hidden_size=8, intermediate_size=8, groups=groups, backend=name)
        except ValueError as reason:
            pytest.skip(str(reason))
        for parameter in experts.parameters():
            nn.init.normal_(parameter)
        router = TopKConfig().build(hidden_size=8, num_experts=E, num_experts_per_tok=2, layer_index=0)
        nn.init.normal_(router.weight)
        layer = MoELayer(router=router, dispatcher=make_dispatcher(groups, num_experts=E), experts=experts)
        outputs.append(layer(torch.randn(3, 5, 8), RouterContext())[0])
    torch.testing.assert_close(outputs[0], outputs[1])


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="fastest"):
        Experts(num_experts=E, hidden_size=8, intermediate_size=8, groups=ParallelGroups.single(), backend="fastest")
