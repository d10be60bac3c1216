"""Top-k against torch: which experts, which weights, which gradient; ties, NaN and infinities."""

import pytest
import torch
from torch import Tensor

from moe_kernels.topk import topk

SHAPES = {"one": (5, 1, 1), "all": (5, 4, 4), "odd": (13, 7, 3), "wide": (9, 130, 8)}  # T, E, K


def plain(logits_TE: Tensor, k: int, score: str, renormalise: bool, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    score_TE = logits_TE.softmax(1) if score == "softmax" else logits_TE.sigmoid()
    # what decides: the logits themselves where nothing is added, since softmax keeps their order
    wanted_TE = score_TE + bias_E if bias_E is not None else logits_TE if score == "softmax" else score_TE
    expert_TK = wanted_TE.detach().sort(dim=1, descending=True, stable=True).indices[:, :k]
    weight_TK = score_TE.gather(1, expert_TK)
    return expert_TK, weight_TK / weight_TK.sum(1, keepdim=True) if renormalise else weight_TK


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shape", SHAPES)
def test_experts_weights_and_gradients_equal_torch(shape, score, renormalise, has_bias):
    T, E, K = SHAPES[shape]
    logits_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(T)).requires_grad_()
    bias_E = torch.linspace(-1, 1, E) if has_bias else None
    expert_TK, weight_TK = plain(logits_TE, K, score, renormalise, bias_E)
    got = topk(logits_TE, K, score=score, renormalise=renormalise, bias_E=bias_E, scale=2.5)
    assert torch.equal(got.expert_TK.long(), expert_TK)
    torch.testing.assert_close(got.weight_TK, 2.5 * weight_TK, rtol=1e-6, atol=1e-7)
    dweight_TK = torch.randn(T, K, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(got.weight_TK, logits_TE, dweight_TK)
    (expected,) = torch.autograd.grad(2.5 * weight_TK, logits_TE, dweight_TK)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    assert got.has_nan_1.item() == 0


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_ties_go_to_the_lower_expert(score):
    logits_TE = torch.tensor(
        [[1.0, 1, 1, 1, 1], [0.0, -0.0, 0.0, -0.0, 0.0], [2.0, 3, 3, 2, 1], [-4.0, -4, -5, -4, -9]]
    )
    got = topk(logits_TE, 3, score=score)
    assert got.expert_TK.tolist() == [[0, 1, 2], [0, 1, 2], [1, 2, 0], [0, 1, 3]]


def test_nan_loses_never_leaves_the_range_and_is_reported():
    nan, inf = float("nan"), float("inf")
    logits_TE = torch.tensor([[nan, 1.0, nan, 0.0], [nan] * 4, [-inf, -inf, 2.0, -inf], [0.0, 1.0, 2.0, 3.0]])
    got = topk(logits_TE, 3)
    assert got.expert_TK[0, :2].tolist() == [1, 3]
    assert all(sorted(set(row)) == sorted(row) for row in got.expert_TK.tolist())
    assert got.expert_TK.min() >= 0
    assert got.expert_TK.max() < 4
    assert got.weight_TK[0].isnan().all()
    assert got.expert_TK[2:].tolist() == [[2, 0, 1], [3, 2, 1]]
    assert not got.weight_TK[2:].isnan().any()
    assert got.has_nan_1.item() == 1


def test_half_precision_logits_are_scored_in_float32():
    logits_TE = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).half()
    expert_TK, weight_TK = plain(logits_TE.float(), 2, "softmax", False, None)
    got = topk(logits_TE, 2)
    assert torch.equal(got.expert_TK.long(), expert_TK)
    torch.testing.assert_close(got.weight_TK, weight_TK, rtol=1e-6, atol=1e-7)


def test_no_token_gives_nothing():
    got = topk(torch.empty(0, 4), 2)
    assert got.expert_TK.shape == got.weight_TK.shape == (0, 2)


def test_bad_arguments_are_refused_with_the_remedy():
    logits_TE = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="k is 5, but there are 4 experts; take 1 to 4"):
        topk(logits_TE, 5)
    with pytest.raises(ValueError, match="known are softmax, sigmoid"):
        topk(logits_TE, 2, score="relu")
    with pytest.raises(ValueError, match=r"5000 experts.*use torch\.topk"):
        topk(torch.zeros(1, 5000), 2)
