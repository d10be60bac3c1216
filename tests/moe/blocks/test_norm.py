"""RMSNorm against its formula in float64."""

import pytest
import torch

from formulas import rms_norm
from moe.blocks.norm import RMSNorm
from tiny import assert_near


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 8), (0, 6), (1, 3)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)]
)
def test_norm_and_its_gradients_equal_the_formula(shape, dtype, tolerance):
    torch.manual_seed(0)
    norm = RMSNorm(size=shape[-1], eps=1e-3).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(shape[-1]))
    x = (3 * torch.randn(shape)).to(dtype).requires_grad_()
    grad = torch.randn(shape).to(dtype)
    x64, weight64 = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = rms_norm(x64, weight64, 1e-3)
    y = norm(x)
    assert y.dtype == dtype
    assert_near(y, expected, tolerance)
    actual_grads = torch.autograd.grad(y, (x, norm.weight), grad)
    for actual, wanted in zip(actual_grads, torch.autograd.grad(expected, (x64, weight64), grad.double()), strict=True):
        assert_near(actual, wanted, 2 * tolerance)


def test_bfloat16_is_rounded_once():
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = RMSNorm(size=32, eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 32).bfloat16())
    expected = norm(x.float()).bfloat16()
    assert (norm.bfloat16()(x) != expected).float().mean() < 0.01  # sums in another order round a few values apart
