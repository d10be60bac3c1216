"""Dense feed-forward and shared expert against their formula in float64."""

import pytest
import torch

from moe.blocks.feed_forward import FeedForward, SharedExpert
from tiny import assert_near


def reference(x, weights):
    gate, up = x @ weights["gate_proj.weight"].T, x @ weights["up_proj.weight"].T
    y = (gate / (1 + torch.exp(-gate)) * up) @ weights["down_proj.weight"].T
    if "sigmoid_gate.weight" in weights:
        y = y / (1 + torch.exp(-x @ weights["sigmoid_gate.weight"].T))
    return y


@pytest.mark.parametrize("num_tokens", [0, 1, 9])
@pytest.mark.parametrize("kind", ["dense", "shared", "gated"])
def test_feed_forward_and_every_gradient_equal_the_formula(kind, num_tokens):
    torch.manual_seed(0)
    sizes = {"hidden_size": 7, "intermediate_size": 5}
    module = FeedForward(**sizes) if kind == "dense" else SharedExpert(**sizes, use_sigmoid_gate=kind == "gated")
    x = torch.randn(num_tokens, 7, requires_grad=True)
    grad = torch.randn(num_tokens, 7)
    weights = {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    y, expected = module(x), reference(x64, weights)
    assert_near(y, expected, 1e-6)
    actual_grads = torch.autograd.grad(y, [x, *module.parameters()], grad)
    wanted_grads = torch.autograd.grad(expected, [x64, *weights.values()], grad.double())
    for actual, wanted in zip(actual_grads, wanted_grads, strict=True):
        assert_near(actual, wanted, 1e-6)
