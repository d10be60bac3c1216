"""Losses on routing: closed forms, conventions (uniform = 1), and the bugs other projects had."""

import pytest
import torch
from torch import Tensor

from moe.balance.losses import frequency, load_balancing_loss, z_loss
from moe.balance.statistics import collect
from moe.routers.topk import TopKConfig, TopKRouter
from moe.routing import Assignment, RouterContext, Routing


def routing_of(logits_TE: Tensor, expert_TK: Tensor, valid_T: Tensor | None = None) -> Routing:
    T, K = expert_TK.shape
    E = logits_TE.shape[1]
    if valid_T is not None:
        expert_TK = expert_TK.masked_fill(~valid_T.unsqueeze(1), E)
    assignment = Assignment(
        token_N=torch.arange(T).repeat_interleave(K),
        expert_N=expert_TK.reshape(-1),
        weight_N=torch.ones(T * K),
        num_experts=E,
        fan_out=K,
    )
    probs_TE = torch.softmax(logits_TE, -1)
    return Routing(assignment=assignment, logits_TE=logits_TE, probs_TE=probs_TE, valid_T=valid_T)


def balance_of(*routings: Routing) -> Tensor:
    statistics = collect(list(routings))
    return load_balancing_loss(
        frequency(statistics.tokens_per_expert_LE), statistics.prob_sum_LE, statistics.num_tokens
    )


@pytest.mark.parametrize("K", [1, 2, 8])
def test_uniform_load_gives_one_for_every_k(K):
    expert_TK = (torch.arange(8).unsqueeze(1) + torch.arange(K)) % 8
    assert balance_of(routing_of(torch.randn(8, 8), expert_TK)).item() == pytest.approx(1.0, rel=1e-6)


def test_collapse_on_k_experts_gives_e_over_k():
    logits_TE = torch.full((6, 8), -50.0)
    logits_TE[:, :2] = 50.0
    assert balance_of(routing_of(logits_TE, torch.tensor([[0, 1]] * 6))).item() == pytest.approx(4.0)


def test_the_loss_may_be_below_one():
    probs_TE = torch.tensor([[0.51, 0.49], [0.51, 0.49], [1e-12, 1.0]])
    loss = balance_of(routing_of(probs_TE.log(), torch.tensor([[0], [0], [1]])))
    assert loss.item() == pytest.approx(2 * (2 / 3 * 1.02 / 3 + 1 / 3 * 1.98 / 3), abs=1e-6)
    assert loss.item() < 0.9


def test_gradient_equals_its_closed_form():
    E, K, T = 6, 2, 11
    logits_TE = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    expert_TK = logits_TE.detach().topk(K).indices
    balance_of(routing_of(logits_TE, expert_TK)).sum().backward()
    f_E = torch.bincount(expert_TK.flatten(), minlength=E).double() / (T * K)
    p_TE = torch.softmax(logits_TE.detach(), -1)
    expected = E / T * p_TE * (f_E - (f_E * p_TE).sum(-1, keepdim=True))
    torch.testing.assert_close(logits_TE.grad, expected)


def test_z_loss_and_its_gradient_equal_their_closed_forms():
    logits_TE = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    statistics = collect([routing_of(logits_TE, torch.zeros(7, 1, dtype=torch.int64))])
    loss_L = z_loss(statistics.z_sum_L, statistics.num_tokens)
    lse_T = logits_TE.detach().exp().sum(-1).log()
    torch.testing.assert_close(loss_L, lse_T.square().mean().unsqueeze(0))
    loss_L.sum().backward()
    torch.testing.assert_close(logits_TE.grad, 2 * lse_T.unsqueeze(1) * torch.softmax(logits_TE.detach(), -1) / 7)


def test_entropy_is_that_of_the_probabilities():
    statistics = collect([routing_of(torch.zeros(4, 8), torch.zeros(4, 1, dtype=torch.int64))])
    assert statistics.entropy_sum_L.item() == pytest.approx(4 * torch.log(torch.tensor(8.0)).item())


def test_padding_is_counted_nowhere_even_if_it_holds_nan():
    valid_T = torch.tensor([True, True, False, True, False])
    logits_TE = torch.randn(5, 4)
    expert_TK = torch.randint(4, (5, 2))
    poisoned_TE = logits_TE.clone()
    poisoned_TE[~valid_T] = float("nan")
    padded = collect([routing_of(poisoned_TE, expert_TK, valid_T)])
    packed = collect([routing_of(logits_TE[valid_T], expert_TK[valid_T])])
    assert torch.equal(padded.tokens_per_expert_LE, packed.tokens_per_expert_LE)
    assert int(padded.num_tokens) == int(packed.num_tokens) == 3
    for name in ("prob_sum_LE", "z_sum_L", "entropy_sum_L"):
        torch.testing.assert_close(getattr(padded, name), getattr(packed, name))


@pytest.mark.parametrize("valid", [[], [False, False]])
def test_no_token_at_all_gives_zero_and_no_nan(valid):
    T = len(valid)
    routing = routing_of(torch.zeros(T, 4), torch.zeros(T, 2, dtype=torch.int64), torch.tensor(valid, dtype=torch.bool))
    statistics = collect([routing])
    assert frequency(statistics.tokens_per_expert_LE).tolist() == [[0.0] * 4]
    assert load_balancing_loss(frequency(statistics.tokens_per_expert_LE), statistics.prob_sum_LE, 1).item() == 0


def test_layers_are_balanced_one_by_one():
    """Two layers that collapse in opposite ways look even when their counts are pooled; ours shows both."""
    logits_TE = torch.full((4, 2), -30.0)
    left, right = logits_TE.clone(), logits_TE.clone()
    left[:, 0], right[:, 1] = 30.0, 30.0
    zeros = torch.zeros(4, 1, dtype=torch.int64)
    assert balance_of(routing_of(left, zeros), routing_of(right, zeros + 1)).tolist() == pytest.approx([2.0, 2.0])


def test_gradient_of_the_router_is_linear_in_the_coefficient():
    module: TopKRouter = TopKConfig().build(hidden_size=6, num_experts=4, num_experts_per_tok=2, layer_index=0)
    torch.nn.init.normal_(module.weight)
    x_TD = torch.randn(9, 6)

    def gradient(coefficient: float) -> Tensor:
        module.weight.grad = None
        (coefficient * balance_of(module(x_TD, RouterContext())).sum()).backward()
        assert module.weight.grad is not None
        return module.weight.grad.clone()

    assert gradient(0.0).abs().max() == 0
    assert gradient(1.0).abs().max() > 0
    torch.testing.assert_close(gradient(3.0), 3 * gradient(1.0))
