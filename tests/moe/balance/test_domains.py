"""Teaching a router whose text is whose: against a loop over tokens, with padding, untaught text and its gradient."""

import math

import pytest
import torch

from moe.balance.domains import UNSUPERVISED, domain_sums, groups_of
from moe.balance.load import BalanceConfig
from moe.routing import Assignment, Routing


def routing(logits_TE, valid_T=None) -> Routing:
    T, E = logits_TE.shape
    return Routing(
        assignment=Assignment(
            token_N=torch.arange(T), expert_N=torch.zeros(T, dtype=torch.int64), weight_N=torch.ones(T),
            num_experts=E, fan_out=1,
        ),
        logits_TE=logits_TE,
        probs_TE=logits_TE.softmax(-1),
        valid_T=valid_T,
        active_E=None,
        identity_weight_T=None,
    )  # fmt: skip


@pytest.mark.parametrize("num_groups", [1, 2, 3, 6])
def test_equals_a_loop_over_tokens(num_groups):
    B, S, E = 4, 5, 6
    logits = [torch.randn(B * S, E, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    valid_T = torch.rand(B * S) < 0.7
    group_B = torch.tensor([0, UNSUPERVISED, num_groups - 1, 0])
    sums = domain_sums([routing(z, valid_T) for z in logits], group_B, num_groups=num_groups)
    loss, right = 0.0, 0
    for z in logits:
        for t in range(B * S):
            group = group_B[t // S].item()
            if not valid_T[t] or group == UNSUPERVISED:
                continue
            p = z[t].detach().softmax(-1)
            size = E // num_groups
            masses = [p[g * size : (g + 1) * size].sum().item() for g in range(num_groups)]
            loss -= math.log(masses[group])
            right += masses.index(max(masses)) == group
    assert sums.loss.item() == pytest.approx(loss, abs=1e-12)
    assert sums.num_right.item() == right


def test_gradient_is_probability_minus_its_share_within_the_group_and_gradcheck_agrees():
    logits_TE = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    group_B = torch.tensor([0, 1, UNSUPERVISED])
    domain_sums([routing(logits_TE)], group_B, num_groups=2).loss.backward()
    p = logits_TE.detach().softmax(-1)
    expected = p.clone()
    for t, group in ((0, 0), (1, 1)):
        inside = slice(2 * group, 2 * group + 2)
        expected[t, inside] -= p[t, inside] / p[t, inside].sum()
    expected[2] = 0
    assert torch.allclose(logits_TE.grad, expected, atol=1e-12)


def test_padding_that_holds_nan_has_no_part_in_it():
    logits_TE = torch.randn(4, 4)
    logits_TE[1] = float("nan")
    logits_TE.requires_grad_()
    valid_T = torch.tensor([True, False, True, True])
    sums = domain_sums([routing(logits_TE, valid_T)], torch.tensor([0, 1]), num_groups=2)
    assert sums.loss.isfinite()
    assert torch.autograd.grad(sums.loss, logits_TE)[0][[0, 2, 3]].isfinite().all()


def test_no_token_and_text_of_no_group_give_zero():
    empty = domain_sums([routing(torch.randn(0, 4))], torch.tensor([0, 1]), num_groups=2)
    untaught = domain_sums([routing(torch.randn(6, 4))], torch.full((2,), UNSUPERVISED), num_groups=2)
    assert empty.loss == untaught.loss == 0
    assert empty.num_right == untaught.num_right == 0


def test_a_probability_of_zero_gives_a_finite_loss():
    logits_TE = torch.tensor([[0.0, 0.0, -400.0, -400.0]], requires_grad=True)
    sums = domain_sums([routing(logits_TE)], torch.tensor([1]), num_groups=2)
    sums.loss.backward()
    assert sums.loss.isfinite() and logits_TE.grad.isfinite().all()


def test_domains_are_found_by_their_place_in_the_data():
    assert groups_of(torch.tensor([2, 0, 1]), [UNSUPERVISED, 1, 0]).tolist() == [0, UNSUPERVISED, 1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"domain_groups": ("a", "b")}, "set both or neither"),
        ({"domain_coefficient": 0.1}, "set both or neither"),
        ({"domain_coefficient": 0.1, "domain_groups": ("a", "a")}, "twice"),
        ({"domain_coefficient": -0.1, "domain_groups": ("a",)}, "must not be negative"),
    ],
)
def test_what_contradicts_itself_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BalanceConfig(**fields).validate()
