"""Rotary embedding against multiplication of complex numbers in float64."""

import pytest
import torch

from formulas import turn
from moe.blocks.rope import rotate, rotation
from tiny import assert_near


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (1, 1, 1, 2), (2, 2, 0, 6)])
def test_rotation_and_its_gradient_equal_complex_multiplication(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    position = torch.randint(0, 500, (shape[0], shape[2]))
    cos, sin = rotation(position, head_dim=shape[-1], theta=1e4)
    y = rotate(x, cos, sin)
    x64 = x.detach().double().requires_grad_()
    expected = turn(x64, position, 1e4)
    assert_near(y, expected, 2e-5)  # float32 angles of some hundred radians
    grad = torch.randn(shape)
    assert_near(torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(expected, x64, grad.double())[0], 2e-5)


def test_score_of_two_turned_vectors_depends_on_their_distance_only():
    query, key = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(i, j):
        turned = [rotate(x, *rotation(torch.tensor([p]), head_dim=16, theta=100.0)) for x, p in ((query, i), (key, j))]
        return (turned[0] * turned[1]).sum()

    assert_near(score(3, 1), score(12, 10), 1e-5)
    assert abs(score(3, 1) - score(3, 2)) > 1e-2


def test_bfloat16_is_turned_in_float32_and_rounded_once():
    x = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = rotation(torch.arange(9), head_dim=8, theta=1e4)
    y = rotate(x, cos, sin)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rotate(x.float(), cos, sin).bfloat16())


def test_float64_is_turned_in_float64():
    x = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cos, sin = (table.double() for table in rotation(torch.arange(9), head_dim=8, theta=1e4))
    expected = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin)
    assert_near(rotate(x, cos.float(), sin.float()), torch.cat((expected.real, expected.imag), dim=-1), 1e-15)
