"""The public grouped products: numbers, gradients of any order, hard shapes, and what they refuse."""

import pytest
import torch
from torch import Tensor

from moe_kernels.experts import Routed, route_rows
from moe_kernels.grouped_ops import grouped_mm, grouped_mm_rows
from moe_kernels.testing import make_rows

T, E, K = 9, 4, 2


def routed_by(routing: str, tiles: str) -> tuple[Routed, Tensor, Tensor]:
    """Return the schedule, and of its rows in use the token and the expert."""
    token_N, expert_N = make_rows(routing, T=T, E=E, K=K, generator=torch.Generator().manual_seed(2))
    fan_out = None if routing == "ragged" else K
    routed = route_rows(token_N, expert_N, num_tokens=T, num_experts=E, fan_out=fan_out, itemsize=8, tiles=tiles)
    row_R = routed.schedule.row_N[: int(routed.schedule.offset_E1[-1])].long()
    return routed, token_N[row_R], expert_N[row_R]


def normal(*shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("routing", ["random", "ragged", "some_unused", "all_unused", "all_to_last"])
def test_products_equal_plain_torch(routing, tiles):
    routed, token_R, expert_R = routed_by(routing, tiles)
    R, N = expert_R.numel(), routed.schedule.row_N.numel()
    weight_ENK, x_TK, p_NM, q_NN = normal(E, 3, 5), normal(T, 5), normal(N, 3), normal(N, 5)
    y_NN = grouped_mm(q_NN, weight_ENK, routed)
    torch.testing.assert_close(y_NN[:R], torch.einsum("rnk,rk->rn", weight_ENK[expert_R], q_NN[:R]))
    gathered_NN = grouped_mm(x_TK, weight_ENK, routed, gather=True)
    torch.testing.assert_close(gathered_NN[:R], torch.einsum("rnk,rk->rn", weight_ENK[expert_R], x_TK[token_R]))
    assert not y_NN[R:].any()
    assert not gathered_NN[R:].any()
    outer = torch.einsum("rm,rn->rmn", p_NM[:R], q_NN[:R])
    expected = torch.zeros(E, 3, 5, dtype=torch.float64).index_add(0, expert_R, outer)
    torch.testing.assert_close(grouped_mm_rows(p_NM, q_NN, routed), expected)


def test_transposed_weights_are_taken_as_views(tiles):
    routed, _, _ = routed_by("random", tiles)
    a_NK, weight_EKN = normal(T * K, 5), normal(E, 5, 3)
    torch.testing.assert_close(
        grouped_mm(a_NK, weight_EKN.mT, routed), grouped_mm(a_NK, weight_EKN.mT.contiguous(), routed)
    )


@pytest.mark.parametrize("routing", ["random", "some_unused", "ragged"])
def test_gradients_equal_finite_differences(routing):
    routed, _, _ = routed_by(routing, "interpreter")
    N = routed.schedule.row_N.numel()
    a_NK, weight_ENK, x_TK = normal(N, 3), normal(E, 2, 3), normal(T, 3)
    assert torch.autograd.gradcheck(lambda a, w: grouped_mm(a, w, routed), (a_NK, weight_ENK), fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda x, w: grouped_mm(x, w, routed, gather=True), (x_TK, weight_ENK), fast_mode=True
    )
    assert torch.autograd.gradcheck(lambda p, q: grouped_mm_rows(p, q, routed), (a_NK, normal(N, 2)), fast_mode=True)


def test_second_derivatives_equal_finite_differences():
    routed, _, _ = routed_by("random", "interpreter")
    inputs = (normal(T * K, 3), normal(E, 2, 3))
    assert torch.autograd.gradgradcheck(lambda a, w: grouped_mm(a, w, routed), inputs, fast_mode=True)


def test_wrong_shapes_are_refused():
    routed, _, _ = routed_by("random", "interpreter")
    with pytest.raises(ValueError, match="must agree"):
        grouped_mm(normal(T * K, 4), normal(E, 3, 5), routed)
    with pytest.raises(ValueError, match=r"a is \[7, 5\], not \[18, width\]"):
        grouped_mm(normal(7, 5), normal(E, 3, 5), routed)
    with pytest.raises(ValueError, match="q is"):
        grouped_mm_rows(normal(T * K, 4), normal(3, 5), routed)
