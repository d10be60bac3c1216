"""Top-k router: weights and choices against formulas written out with loops, and the bugs other projects had."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from moe.routers.topk import TopKConfig, TopKRouter
from moe.routing import RouterContext, Routing

D = 10


def router(E: int = 8, K: int = 2, **fields) -> TopKRouter:
    module = TopKConfig(**fields).build(hidden_size=D, num_experts=E, num_experts_per_tok=K, layer_index=3)
    with torch.no_grad():
        module.weight.copy_(torch.randn(E, D, generator=torch.Generator().manual_seed(0)))
    return module


def tokens(T: int, seed: int = 1) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed))


def rows(routing: Routing, K: int) -> tuple[Tensor, Tensor]:
    return routing.assignment.expert_N.view(-1, K), routing.assignment.weight_N.view(-1, K)


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


@pytest.mark.parametrize(
    ("fields", "weigh"),
    [
        ({}, lambda z, chosen: [softmax(z)[e] for e in chosen]),
        (
            {"norm_topk_prob": True, "routed_scaling_factor": 2.5},
            lambda z, chosen: [2.5 * softmax(z)[e] / sum(softmax(z)[c] for c in chosen) for e in chosen],
        ),
        ({"softmax_after_topk": True}, lambda z, chosen: softmax([z[e] for e in chosen])),
        ({"scoring_func": "sigmoid"}, lambda z, chosen: [1 / (1 + math.exp(-z[e])) for e in chosen]),
        (
            {"scoring_func": "sigmoid", "norm_topk_prob": True},
            lambda z, chosen: [
                1 / (1 + math.exp(-z[e])) / sum(1 / (1 + math.exp(-z[c])) for c in chosen) for e in chosen
            ],
        ),
    ],
    ids=["softmax", "normalised and scaled", "softmax after top-k", "sigmoid", "sigmoid normalised"],
)
@pytest.mark.parametrize("K", [2, 3, 8])
def test_choice_and_weights_equal_the_formula(fields, weigh, K):
    x_TD = tokens(17)
    module = router(K=K, **fields)
    expert_TK, weight_TK = rows(module(x_TD, RouterContext()), K)
    for x_D, experts, weights in zip(x_TD, expert_TK.tolist(), weight_TK.tolist(), strict=True):
        z = [sum(w * x for w, x in zip(row, x_D.tolist(), strict=True)) for row in module.weight.tolist()]
        expected = sorted(range(8), key=lambda e: (-z[e], e))[:K]
        assert experts == expected
        assert weights == pytest.approx(weigh(z, expected), rel=2e-5)


def test_normalised_softmax_equals_softmax_after_topk():
    x_TD = tokens(9)
    before = router(norm_topk_prob=True)(x_TD, RouterContext())
    after = router(softmax_after_topk=True)(x_TD, RouterContext())
    torch.testing.assert_close(before.assignment.weight_N, after.assignment.weight_N)
    torch.testing.assert_close(before.probs_TE, after.probs_TE, rtol=0, atol=0)


@pytest.mark.parametrize("T", [0, 1, 5])
def test_any_number_of_tokens_gives_consistent_rows(T):
    routing = router(K=3)(tokens(T), RouterContext())
    assert routing.assignment.token_N.tolist() == [t for t in range(T) for _ in range(3)]
    assert routing.assignment.fan_out == 3
    expert_TK, _ = rows(routing, 3)
    assert all(len(set(chosen)) == 3 for chosen in expert_TK.tolist())
    assert routing.probs_TE.shape == (T, 8)


def test_ties_go_to_the_lower_expert():
    module = router(K=3)
    with torch.no_grad():
        module.weight.zero_()
    expert_TK, _ = rows(module(tokens(4), RouterContext()), 3)
    assert expert_TK.tolist() == [[0, 1, 2]] * 4


def test_routing_is_float32_for_a_bfloat16_model():
    module = router(use_selection_bias=True, scoring_func="sigmoid").bfloat16()
    routing = module(tokens(5).bfloat16(), RouterContext())
    assert routing.logits_TE.dtype == routing.probs_TE.dtype == routing.assignment.weight_N.dtype == torch.float32
    expected = tokens(5).bfloat16().double() @ module.weight.detach().double().t()
    torch.testing.assert_close(routing.logits_TE.double(), expected, rtol=1e-5, atol=1e-5)


def test_gradient_of_weights_and_probabilities_matches_finite_differences():
    module = router(E=5, K=2).double()
    # gradcheck needs the router's arithmetic in float64; the module casts to float32, so its functions are checked
    logits_TE = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    for fields in ({}, {"norm_topk_prob": True}, {"softmax_after_topk": True}, {"scoring_func": "sigmoid"}):
        module.config = TopKConfig(**fields)

        def outputs(z, module=module):
            probs_TE, score_TE = module._scores(z)
            return probs_TE, module._weights(z, score_TE, module._choose(score_TE))

        assert torch.autograd.gradcheck(outputs, logits_TE)


def test_logits_are_raw_not_probabilities():
    routing = router()(tokens(6), RouterContext())
    assert not torch.allclose(routing.logits_TE.sum(-1), torch.ones(6))
    torch.testing.assert_close(routing.probs_TE, torch.softmax(routing.logits_TE, -1))
    torch.testing.assert_close(routing.probs_TE.sum(-1), torch.ones(6))


def test_sigmoid_probabilities_sum_to_one_where_every_sigmoid_underflows():
    module = router(scoring_func="sigmoid", norm_topk_prob=True)
    with torch.no_grad():
        module.weight.fill_(-1.0)
    routing = module(torch.full((2, D), 60.0), RouterContext())
    torch.testing.assert_close(routing.probs_TE.sum(-1), torch.ones(2))
    assert torch.isfinite(routing.assignment.weight_N).all()


class TestSelectionBias:
    def biased(self, bias: list[float], **fields) -> TopKRouter:
        module = router(use_selection_bias=True, scoring_func="sigmoid", **fields)
        module.selection_bias.copy_(torch.tensor(bias))
        return module

    def test_moves_the_choice_but_never_the_weights(self):
        x_TD = tokens(6)
        expert_TK, weight_TK = rows(self.biased([0.0] * 7 + [10.0])(x_TD, RouterContext()), 2)
        assert (expert_TK[:, 0] == 7).all()
        score_TE = torch.sigmoid(x_TD @ router().weight.t())
        torch.testing.assert_close(weight_TK, score_TE.gather(1, expert_TK))

    def test_a_bias_that_leaves_the_choice_leaves_the_output(self):
        x_TD = tokens(6)
        without = self.biased([0.0] * 8)(x_TD, RouterContext())
        shifted = self.biased([0.25] * 8)(x_TD, RouterContext())
        assert torch.equal(without.assignment.weight_N, shifted.assignment.weight_N)
        assert torch.equal(without.assignment.expert_N, shifted.assignment.expert_N)

    def test_update_raises_the_idle_and_lowers_the_busy(self):
        module = self.biased([0.0] * 8, bias_update_rate=0.5)
        module.end_step(torch.tensor([0, 2, 4, 2, 2, 2, 2, 2]), RouterContext(), num_tokens=8)
        assert module.selection_bias.tolist() == [0.5, 0, -0.5, 0, 0, 0, 0, 0]

    def test_stays_float32_through_bfloat16_and_adds_up_small_steps(self):
        module = self.biased([0.0] * 8, bias_update_rate=1e-3).bfloat16().to(torch.float16)
        assert module.weight.dtype == torch.float16
        for _ in range(1000):
            module.end_step(torch.tensor([0, 2, 2, 2, 2, 2, 2, 4]), RouterContext(), num_tokens=8)
        assert module.selection_bias.dtype == torch.float32
        assert module.selection_bias[0].item() == pytest.approx(1.0, abs=1e-4)

    def test_is_kept_by_the_state_dict_and_by_dtype_changes_bit_for_bit(self):
        bias = torch.rand(8, generator=torch.Generator().manual_seed(3)).tolist()
        module = self.biased(bias)
        other = router(use_selection_bias=True, scoring_func="sigmoid").bfloat16()
        other.load_state_dict(module.state_dict())
        assert torch.equal(other.selection_bias, module.selection_bias)
        assert torch.equal(other.bfloat16().float().selection_bias, module.selection_bias)

    def test_is_no_parameter(self):
        assert [name for name, _ in self.biased([0.0] * 8).named_parameters()] == ["weight"]

    def test_can_be_built_on_the_meta_device(self):
        with torch.device("meta"):
            module = router_config().build(hidden_size=D, num_experts=8, num_experts_per_tok=2, layer_index=0)
        assert module.to_empty(device="cpu").selection_bias.dtype == torch.float32


def router_config() -> TopKConfig:
    return TopKConfig(use_selection_bias=True, scoring_func="sigmoid")


@pytest.mark.parametrize("use_bias", [False, True])
def test_groups_limit_the_choice(use_bias):
    fields = {"scoring_func": "sigmoid", "n_group": 4, "topk_group": 2, "use_selection_bias": use_bias}
    module = router(E=12, K=4, **fields)
    if use_bias:
        # all scores negative after the bias: a mask of 0 instead of -inf would let a dropped expert win
        module.selection_bias.fill_(-2.0)
    x_TD = tokens(30)
    expert_TK, _ = rows(module(x_TD, RouterContext()), 4)
    for score_E, chosen in zip(torch.sigmoid(x_TD @ module.weight.t()).tolist(), expert_TK.tolist(), strict=True):
        groups = [score_E[3 * g : 3 * g + 3] for g in range(4)]
        rank = [sum(sorted(g)[-2:]) if use_bias else max(g) for g in groups]
        kept = sorted(range(4), key=lambda g: -rank[g])[:2]
        allowed = [e for g in kept for e in range(3 * g, 3 * g + 3)]
        assert sorted(chosen) == sorted(sorted(allowed, key=lambda e: -score_E[e])[:4])


def test_padding_is_not_dispatched():
    valid_T = torch.tensor([True, False, True, False, False])
    routing = router()(tokens(5), RouterContext(valid_T=valid_T))
    expert_TK, weight_TK = rows(routing, 2)
    assert (expert_TK[~valid_T] == 8).all()
    assert (weight_TK[~valid_T] == 0).all()
    plain_TK, _ = rows(router()(tokens(5), RouterContext()), 2)
    assert torch.equal(expert_TK[valid_T], plain_TK[valid_T])


class TestJitter:
    def logits(self, module: TopKRouter, positions: Tensor, step: int = 0) -> Tensor:
        return module(tokens(40)[positions], RouterContext(seed=1, step=step, position_T=positions)).logits_TE

    def test_is_the_same_wherever_a_token_is_computed(self):
        module = router(router_jitter_noise=0.3).train()
        whole = self.logits(module, torch.arange(40))
        parts = [self.logits(module, torch.arange(start, start + 8)) for start in range(0, 40, 8)]
        assert torch.equal(whole, torch.cat(parts))

    def test_changes_with_step_seed_and_layer_and_stays_in_range(self):
        module = router(router_jitter_noise=0.3).train()
        x_TD, position_T = torch.ones(200, D), torch.arange(200)
        noised = [
            module._noised(x_TD, RouterContext(seed=seed, step=step, position_T=position_T))
            for seed, step in itertools.product((0, 1), (0, 1))
        ]
        assert all(not torch.equal(a, b) for a, b in itertools.combinations(noised, 2))
        sample = torch.stack(noised)
        assert sample.min() >= 0.7
        assert sample.max() <= 1.3
        assert sample.mean().item() == pytest.approx(1.0, abs=0.01)
        assert sample.std().item() == pytest.approx(0.3 / math.sqrt(3), rel=0.05)

    def test_is_off_outside_training_and_leaves_the_input_alone(self):
        module = router(router_jitter_noise=0.3)
        x_TD = tokens(5)
        kept = x_TD.clone()
        module.train()(x_TD, RouterContext(position_T=torch.arange(5)))
        assert torch.equal(x_TD, kept)
        plain = router()(x_TD, RouterContext()).logits_TE
        assert torch.equal(module.eval()(x_TD, RouterContext()).logits_TE, plain)

    def test_without_positions_is_refused(self):
        with pytest.raises(ValueError, match="position_T"):
            router(router_jitter_noise=0.3).train()(tokens(2), RouterContext())


@pytest.mark.parametrize(
    ("K", "fields", "message"),
    [
        (9, {}, "num_experts_per_tok = 9 must lie in 1..num_experts = 8"),
        (0, {}, "num_experts_per_tok = 0"),
        (1, {"norm_topk_prob": True}, "no gradient"),
        (1, {"softmax_after_topk": True}, "no gradient"),
        (2, {"n_group": 3}, "n_group = 3 does not divide num_experts = 8"),
        (2, {"n_group": 8}, "at least 2"),
        (5, {"n_group": 4, "topk_group": 2}, "raise topk_group"),
        (2, {"n_group": 2, "topk_group": 3}, "topk_group = 3"),
        (2, {"softmax_after_topk": True, "scoring_func": "sigmoid"}, "softmax_after_topk"),
        (2, {"router_jitter_noise": 1.0}, "router_jitter_noise = 1.0"),
        (2, {"bias_update_rate": -1.0}, "bias_update_rate"),
    ],
)
def test_impossible_settings_are_refused_with_the_limit(K, fields, message):
    config = TopKConfig(**fields)
    with pytest.raises(ValueError, match=message):  # noqa: PT012 either of the two refuses
        config.validate(num_experts=8, num_experts_per_tok=K)
        config.check_learns(num_experts_per_tok=K)
