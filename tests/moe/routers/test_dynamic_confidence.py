"""Dynamic confidence against a plain loop, its order in the threshold, its gradients, and the controller."""

import math

import pytest
import torch
from torch import Tensor

from moe.routers.dynamic_confidence import DynamicConfidenceConfig, DynamicConfidenceRouter
from moe.routing import RouterContext, Routing

D = 10


def router(E: int = 8, **fields) -> DynamicConfidenceRouter:
    config = DynamicConfidenceConfig(**fields)
    module = config.build(hidden_size=D, num_experts=E, num_experts_per_tok=2, layer_index=0)
    with torch.no_grad():
        module.weight.copy_(torch.randn(E, D, generator=torch.Generator().manual_seed(0)))
    return module


def tokens(T: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1)).to(dtype)


def chosen(routing: Routing) -> list[dict[int, float]]:
    """Return, for each token, the weight of each of its experts."""
    assignment = routing.assignment
    found: list[dict[int, float]] = [{} for _ in range(routing.probs_TE.shape[0])]
    columns = (assignment.token_N.tolist(), assignment.expert_N.tolist(), assignment.weight_N.tolist())
    for token, expert, weight in zip(*columns, strict=True):
        if expert < assignment.num_experts:
            assert expert not in found[token]
            found[token][expert] = weight
    return found


def expected(probs: list[float], threshold: float) -> dict[int, float]:
    mass, kept = 0.0, {}
    for expert in sorted(range(len(probs)), key=lambda e: -probs[e]):
        if kept and mass > threshold:
            break
        kept[expert] = probs[expert]
        mass += probs[expert]
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.4, 0.9, 1.1])
def test_choice_and_weights_equal_a_plain_loop(threshold):
    module = router(threshold=threshold)
    x_TD = tokens(50, torch.float64)
    found = chosen(module.double()(x_TD, RouterContext()))
    for token, probs in enumerate(torch.softmax(x_TD @ module.weight.T, -1).tolist()):
        want = expected(probs, threshold)
        assert list(found[token]) == list(want)
        assert found[token] == pytest.approx(want)


def test_the_mass_passes_the_threshold_and_would_not_without_the_last_expert():
    for weights in chosen(router(threshold=0.6).double()(tokens(80, torch.float64), RouterContext())):
        values = list(weights.values())
        assert sum(values) > 0.6
        assert sum(values[:-1]) <= 0.6


def test_a_higher_threshold_only_adds_experts():
    few, many = (chosen(router(threshold=t)(tokens(60), RouterContext())) for t in (0.3, 0.7))
    assert all(set(a) <= set(b) for a, b in zip(few, many, strict=True))
    assert sum(map(len, few)) < sum(map(len, many))


def test_uniform_scores_take_seven_of_sixteen_at_0_4():
    module = router(E=16)
    with torch.no_grad():
        module.weight.zero_()
    assert [list(w) for w in chosen(module(tokens(3), RouterContext()))] == [list(range(7))] * 3


def test_bounds_hold_and_normalised_weights_sum_to_one():
    bounded = router(threshold=0.9, min_k=2, max_k=3, norm_topk_prob=True)
    for weights in chosen(bounded(tokens(60), RouterContext())):
        assert 2 <= len(weights) <= 3
        assert sum(weights.values()) == pytest.approx(1.0, abs=1e-6)


def test_padding_takes_no_expert():
    valid_T = torch.tensor([True, False, True, False])
    routing = router()(tokens(4), RouterContext(valid_T=valid_T))
    assert [bool(weights) for weights in chosen(routing)] == valid_T.tolist()


def test_weights_pass_finite_differences_for_a_fixed_choice():
    module = router(threshold=0.5).double()
    x_TD = tokens(6, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: module(x, RouterContext()).assignment.weight_N, x_TD)


def test_warm_up_raises_the_threshold_while_training_only():
    module = router(threshold=0.8, warmup_steps=10)
    counts = [sum(map(len, chosen(module(tokens(40), RouterContext(step=step))))) for step in (0, 5, 10)]
    assert counts[0] == 40
    assert counts[0] < counts[1] < counts[2]
    assert sum(map(len, chosen(module.eval()(tokens(40), RouterContext(step=0))))) == counts[2]


@pytest.mark.parametrize("target", [1.5, 3.0])
def test_the_controller_holds_the_mean_and_survives_bfloat16_and_checkpoints(target):
    module = router(threshold=0.4, target_experts_per_tok=target).bfloat16()
    assert module.threshold.dtype == torch.float32
    draw = torch.Generator().manual_seed(4)
    means = []
    for step in range(300):
        x_TD = 0.5 * torch.randn(256, D, generator=draw)
        rows = module(x_TD.bfloat16(), RouterContext(step=step)).assignment.expert_N
        counts_E = torch.bincount(rows, minlength=9)[:8]
        means.append(counts_E.sum().item() / 256)
        module.end_step(counts_E, RouterContext(step=step), num_tokens=256)
    assert math.isclose(sum(means[-50:]) / 50, target, rel_tol=0.02), means[-5:]
    other = router(threshold=0.4, target_experts_per_tok=target)
    other.load_state_dict(module.state_dict())
    assert other.threshold == module.threshold
    assert other.error_sum == module.error_sum


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": -0.1}, "threshold = -0.1 must not be negative"),
        ({"max_k": 9}, "max_k = 9 must satisfy"),
        ({"min_k": 3, "max_k": 2}, "min_k = 3"),
        ({"target_experts_per_tok": 5.0, "max_k": 4}, r"must lie in min_k\.\.max_k = 1\.\.4"),
        ({"target_experts_per_tok": 2.0, "warmup_steps": 5}, "set one"),
        ({"max_k": 1, "norm_topk_prob": True}, "no gradient"),
        ({"warmup_steps": -1}, "warmup_steps = -1"),
    ],
)
def test_bad_values_are_refused(fields, message):
    config = DynamicConfidenceConfig(**fields)
    with pytest.raises(ValueError, match=message):  # noqa: PT012 either of the two refuses
        config.validate(num_experts=8, num_experts_per_tok=2)
        config.check_learns(num_experts_per_tok=2)
