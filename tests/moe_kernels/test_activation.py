"""Activations: forward against the formulas of the reference, backward against autograd, limits included."""

import pytest
import torch

from moe_kernels import reference
from moe_kernels.activation import activate, activate_backward, join_halves, split_halves
from moe_kernels.spec import ExpertSpec

ACTIVATIONS = ("swiglu", "geglu", "relu2", "gpt_oss")


def products(spec: ExpertSpec) -> torch.Tensor:
    """Return h_NH: every pair of gate and up out of values below, at and above zero and the limits of gpt_oss."""
    edges = torch.tensor([-7.0, 0.0, 7.0], dtype=torch.float64)
    values = torch.cat((edges, edges - 1e-9, edges + 1e-9, torch.tensor([-30.0, -0.8, 0.6, 2.5, 30.0]).double()))
    pairs_N2 = torch.cartesian_prod(values, values)
    # F = 2, the second column in another order, so that mixed-up columns show
    shifted_N2 = pairs_N2.roll(5, dims=0)
    if spec.halves == 1:
        return pairs_N2
    return torch.stack((pairs_N2[:, 0], shifted_N2[:, 0], pairs_N2[:, 1], shifted_N2[:, 1]), dim=1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_its_gradient_equal_formula_and_autograd(activation) -> None:
    spec = ExpertSpec(activation=activation)
    h_NH = products(spec).requires_grad_()
    a_NF = activate(h_NH, spec)
    torch.testing.assert_close(a_NF, reference.activation(h_NH, spec), rtol=1e-13, atol=1e-15)
    da_NF = torch.randn(a_NF.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (expected_NH,) = torch.autograd.grad(a_NF, h_NH, da_NF)
    again_NF, dh_NH = activate_backward(da_NF, h_NH.detach(), spec)
    torch.testing.assert_close(again_NF, a_NF.detach(), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(dh_NH, expected_NH, rtol=1e-12, atol=1e-14)


def test_gradient_passes_at_the_limits_of_gpt_oss_and_not_beyond() -> None:
    spec = ExpertSpec(activation="gpt_oss")
    h_NH = torch.tensor([[7.0, 7.0], [7.0, -7.0], [7.1, 1.0], [1.0, 7.1], [1.0, -7.1]], dtype=torch.float64)
    _, dh_NH = activate_backward(torch.ones(5, 1, dtype=torch.float64), h_NH, spec)
    assert [(gate != 0, up != 0) for gate, up in dh_NH.tolist()] == [
        (True, True),
        (True, True),
        (False, True),
        (True, False),
        (True, False),
    ]


@pytest.mark.parametrize("gate_up", ["concatenated", "interleaved"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_is_written_in_the_order_of_the_weights_and_the_dtype_asked_for(activation, gate_up) -> None:
    h_NH = products(ExpertSpec(activation=activation))
    spec = ExpertSpec(activation=activation, gate_up=gate_up)
    da_NF = torch.ones(h_NH.shape[0], h_NH.shape[1] // spec.halves, dtype=torch.float64)
    a_NF, dh_NH = activate_backward(da_NF, h_NH, spec)
    out_NH = torch.full(h_NH.shape, float("nan"), dtype=torch.bfloat16)
    again_NF, written_NH = activate_backward(da_NF, h_NH, spec, out_NH=out_NH)
    assert torch.equal(again_NF, a_NF)
    assert written_NH is out_NH
    assert torch.equal(join_halves(out_NH, spec), dh_NH.bfloat16())


@pytest.mark.parametrize("rows", [0, 3])
def test_halves_are_views_of_columns_in_either_order(rows: int) -> None:
    h_NH = torch.arange(rows * 6.0).view(rows, 6)
    interleaved, concatenated = (ExpertSpec(gate_up=gate_up) for gate_up in ("interleaved", "concatenated"))
    gate_NF, up_NF = split_halves(h_NH, interleaved)
    assert torch.equal(gate_NF, h_NH[:, [0, 2, 4]]) and torch.equal(up_NF, h_NH[:, [1, 3, 5]])
    assert torch.equal(join_halves(h_NH, interleaved), h_NH[:, [0, 2, 4, 1, 3, 5]])
    gate_NF, up_NF = split_halves(h_NH, concatenated)
    assert torch.equal(gate_NF, h_NH[:, :3]) and torch.equal(up_NF, h_NH[:, 3:])
    assert join_halves(h_NH, concatenated) is h_NH
    assert join_halves(h_NH, ExpertSpec(activation="relu2", gate_up="interleaved")) is h_NH
