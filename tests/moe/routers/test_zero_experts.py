"""Zero-computation experts: against formulas and transformers' LongCat-Flash, and the budget that the bias holds."""

import pytest
import torch
from torch import Tensor

from moe.experts import Experts
from moe.layer import MoELayer
from moe.parallel.dispatch import LocalDispatcher
from moe.parallel.groups import ParallelGroups
from moe.routers.topk import TopKConfig
from moe.routers.zero_experts import ZeroExpertsConfig, ZeroExpertsRouter
from moe.routing import RouterContext

D, F, N, K = 8, 6, 5, 3


def fill(module: torch.nn.Module, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / D**0.5)


def router(num_experts: int = N, num_experts_per_tok: int = K, **fields) -> ZeroExpertsRouter:
    config = ZeroExpertsConfig(**fields)
    module = config.build(
        hidden_size=D, num_experts=num_experts, num_experts_per_tok=num_experts_per_tok, layer_index=0
    )
    fill(module)
    return module


def layer(module: ZeroExpertsRouter) -> MoELayer:
    experts = Experts(
        num_experts=module.num_candidates,
        hidden_size=D,
        intermediate_size=F,
        groups=ParallelGroups.single(),
        backend="naive",
    )
    fill(experts, seed=1)
    return MoELayer(router=module, dispatcher=LocalDispatcher(), experts=experts)


def tokens(T: int, seed: int = 2) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed))


def test_without_zero_computation_experts_it_is_a_biased_softmax_top_k():
    module = router(num_identity_experts=0)
    plain = TopKConfig(use_selection_bias=True).build(
        hidden_size=D, num_experts=N, num_experts_per_tok=K, layer_index=0
    )
    bias = torch.linspace(-0.2, 0.2, N)
    with torch.no_grad():
        plain.weight.copy_(module.weight)
        plain.selection_bias.copy_(bias)
        module.selection_bias.copy_(bias)
    ours, theirs = (r(tokens(40), RouterContext()).assignment for r in (module, plain))
    assert torch.equal(ours.expert_N, theirs.expert_N)
    assert torch.equal(ours.weight_N, theirs.weight_N)


def test_a_token_that_chooses_identity_experts_alone_comes_back_weighted_and_runs_nothing():
    module = router(num_identity_experts=K, routed_scaling_factor=6.0)
    module.selection_bias[N:] = 10.0
    x_TD = tokens(7)
    y_BSD, (routing,) = layer(module)(x_TD.unsqueeze(0), RouterContext())
    assert (routing.assignment.expert_N == N).all()
    weight_T = 6.0 * torch.softmax(x_TD @ module.weight.T, -1)[:, N:].sum(-1)
    torch.testing.assert_close(y_BSD[0], weight_T.unsqueeze(1) * x_TD)


def test_zero_and_constant_experts_equal_the_formula():
    module = router(num_identity_experts=1, num_zero_experts=1, num_constant_experts=2, num_experts_per_tok=4)
    x_TD = tokens(60)
    y_BSD, (routing,) = layer(module)(x_TD.unsqueeze(0), RouterContext())
    score_TS = torch.softmax(x_TD @ module.weight.T, -1)
    chosen_TK = score_TS.topk(4).indices
    real_BSD = y_BSD[0] - routing.identity_weight_T.unsqueeze(1) * x_TD - routing.added_TD
    seen = set()
    for t, x_D in enumerate(x_TD):
        expected_D = real_BSD[t].clone()
        for s in chosen_TK[t].tolist():
            if s < N or s == N + 1:
                continue
            if s == N:
                expected_D += score_TS[t, s] * x_D
            else:
                c = s - N - 2
                a1, a2 = torch.softmax(module.constant_weight[c] @ x_D, 0)
                expected_D += score_TS[t, s] * (a1 * x_D + a2 * module.constant_value[c])
            seen.add(s)
        torch.testing.assert_close(y_BSD[0, t], expected_D, rtol=1e-5, atol=1e-5)
    assert seen == {N, N + 2, N + 3}


def test_the_layer_equals_transformers_longcat_flash():
    from transformers import LongcatFlashConfig
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE

    config = LongcatFlashConfig(
        hidden_size=D, expert_ffn_hidden_size=F, n_routed_experts=N, zero_expert_num=2, moe_topk=K,
        routed_scaling_factor=2.5, num_layers=1, num_attention_heads=2, experts_implementation="eager",
    )  # fmt: skip
    theirs = LongcatFlashMoE(config)
    fill(theirs, seed=3)
    module = router(num_identity_experts=2, routed_scaling_factor=2.5)
    ours = layer(module)
    bias = torch.tensor([0.1, -0.1, 0.05, 0.0, -0.05, 0.0, 0.0])
    with torch.no_grad():
        theirs.router.e_score_correction_bias.copy_(bias)
        module.selection_bias.copy_(bias)
        module.weight.copy_(theirs.router.classifier.weight)
        ours.experts.gate_up_proj.copy_(theirs.experts.gate_up_proj[:N])
        ours.experts.down_proj.copy_(theirs.experts.down_proj[:N])
    x_BSD = tokens(24).view(2, 12, D).requires_grad_()
    expected_BSD = theirs(x_BSD)
    y_BSD, _ = ours(x_BSD, RouterContext())
    torch.testing.assert_close(y_BSD, expected_BSD, rtol=1e-5, atol=1e-5)
    dy_BSD = tokens(24, seed=5).view(2, 12, D)
    (got,) = torch.autograd.grad(y_BSD, x_BSD, dy_BSD)
    (want,) = torch.autograd.grad(expected_BSD, x_BSD, dy_BSD)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fields", [{}, {"bias_update_rule": "pid", "proportional_gain": 0.05}], ids=["proportional", "pid"]
)
def test_the_bias_holds_the_budget_and_evens_the_load(fields):
    T, experts, k, target = 4096, 8, 4, 2.5
    module = router(experts, k, num_identity_experts=4, target_experts_per_tok=target, bias_update_rate=0.1, **fields)
    skew = torch.linspace(-1.0, 1.0, 12)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():  # tokens are the logits
        module.weight.copy_(torch.zeros(12, D))
    means, violations, spreads = [], [], []
    for _ in range(200):
        logits_TS = skew + torch.randn(T, 12, generator=draw)
        module.logits = lambda x_TD, logits_TS=logits_TS: logits_TS
        rows = module(torch.zeros(T, D), RouterContext()).assignment.expert_N
        counts_E = torch.bincount(rows, minlength=experts + 1)[:experts]
        per_token_T = (rows.view(T, k) < experts).sum(1).float()
        means.append(counts_E.sum().item() / T)
        violations.append(counts_E.max().item() / counts_E.float().mean().item() - 1)
        spreads.append(per_token_T.std().item())
        module.end_step(counts_E, RouterContext(), num_tokens=T)
    assert sum(means[-20:]) / 20 == pytest.approx(target, rel=0.01)
    assert sum(violations[-20:]) / 20 < 0.1
    assert violations[0] > 0.3
    assert min(spreads) > 0.3
    assert module.selection_bias[experts:].count_nonzero() == 0
    assert not module.selection_bias.requires_grad


def test_at_the_target_the_bias_rests():
    module = router(4, 4, num_identity_experts=2, target_experts_per_tok=2.0)
    module.end_step(torch.full((4,), 50), RouterContext(), num_tokens=100)
    assert module.selection_bias.count_nonzero() == 0


def test_the_device_loss_is_its_coefficient_where_loads_are_on_target():
    # two tokens of four choices over 4 real experts in 2 groups and 2 identity experts, each real expert once
    module = router(4, 2, num_identity_experts=4, target_experts_per_tok=1.0, device_loss_coefficient=0.3,
                    num_device_groups=2)  # fmt: skip
    logits_TS = torch.full((4, 8), -20.0)
    for t in range(4):
        logits_TS[t, t] = logits_TS[t, 4 + t] = 0.0
    module.logits = lambda x_TD: logits_TS
    routing = module(torch.zeros(4, D), RouterContext())
    assert routing.loss_sum.item() / 4 == pytest.approx(0.3, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_identity_experts": -1}, "must not be negative"),
        ({"target_experts_per_tok": 4.0}, r"must lie in 0\.\.3"),
        ({"num_identity_experts": 1, "target_experts_per_tok": 1.0}, "cannot be reached"),
        ({"num_device_groups": 2}, "does not divide 5"),
        ({"device_loss_coefficient": 0.1}, "needs 0 < target"),
        ({"routed_scaling_factor": 0.0}, "must be positive"),
    ],
)
def test_bad_values_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ZeroExpertsConfig(**fields).validate(num_experts=N, num_experts_per_tok=K)
