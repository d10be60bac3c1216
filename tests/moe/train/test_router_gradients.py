"""The ratio of router gradients against one backward pass per loss, and the same on every layout."""

from dataclasses import replace

import pytest
import torch

from moe.balance.load import BalanceConfig, GlobalLoad
from moe.balance.statistics import collect
from moe.routers.dynamic_confidence import DynamicConfidenceConfig
from moe.routers.hash import HashConfig
from moe.routers.relu import ReLUConfig
from moe.routers.topk import TopKConfig
from moe.routers.zero_experts import ZeroExpertsConfig
from moe.train.loss import language_model_loss, micro_batch_loss
from moe.train.router_gradients import RouterGradients, mean_ratio
from runs import curve, small_recipe, train
from tiny import tiny_config, tiny_model, tiny_tokens

BALANCE = BalanceConfig(
    scope="micro", coefficient=0.3, local_coefficient=0.1, z_coefficient=0.2, entropy_coefficient=0.1
)


@pytest.mark.parametrize(
    "router",
    [
        TopKConfig(norm_topk_prob=True),
        TopKConfig(scoring_func="sigmoid"),
        TopKConfig(softmax_after_topk=True),
        DynamicConfidenceConfig(),
        ReLUConfig(),
        ZeroExpertsConfig(num_identity_experts=2, num_constant_experts=2),
    ],
    ids=lambda router: router.kind,
)
@pytest.mark.parametrize("padded", [False, True])
def test_both_gradients_equal_a_backward_pass_of_their_own(router, padded):
    # one MoE layer: no loss of a deeper one comes through its weights
    config = replace(tiny_config(), mlp_only_layers=(0, 2), router=router)
    token_BS = tiny_tokens(3, 9)
    valid_BS = (torch.arange(8) < torch.tensor([[8], [5], [1]])) if padded else torch.ones(3, 8, dtype=torch.bool)
    scale = 7.0

    def forward():
        logits_BSV, routings = tiny_model(config, dtype=torch.float64).train()(token_BS[:, :-1], valid_BS=valid_BS)
        statistics = collect(routings, num_sequences=3)
        terms = micro_batch_loss(
            lm_sum=language_model_loss(logits_BSV, token_BS[:, 1:], valid_BS),
            statistics=statistics,
            load=GlobalLoad(scope="micro", group=None),
            balance=BALANCE,
            num_tokens=int(valid_BS.sum()),
        )
        lm = language_model_loss(logits_BSV, token_BS[:, 1:], valid_BS) / int(valid_BS.sum())
        return routings, statistics, terms, lm

    routings, statistics, terms, lm = forward()
    by_balance, by_lm = (
        torch.autograd.grad(loss, routings[0].logits_TE, retain_graph=True)[0].norm() for loss in (terms.balance, lm)
    )
    gradients = RouterGradients(loss_scale=scale)
    routings, statistics, terms, _ = forward()
    gradients.watch(routings, statistics, terms.balance)
    (terms.total * scale).backward()
    gradients.finish()
    torch.testing.assert_close(gradients.squares().sqrt()[:, 0], torch.stack((by_balance, by_lm)), rtol=1e-9, atol=0)
    assert mean_ratio(gradients.squares()) == pytest.approx((by_balance / by_lm).item())


def test_layers_of_a_growing_pool_count_with_the_scale_of_their_open_experts():
    probs_TE = torch.rand(4, 3, requires_grad=True, dtype=torch.float64)
    logits_TE = (probs_TE * 2).log()
    routings = [
        replace(routing, logits_TE=logits, probs_TE=torch.softmax(logits, -1))
        for routing, logits in zip(two_routings(), (logits_TE, logits_TE * 1.5), strict=True)
    ]
    statistics = collect(routings)
    balance = (statistics.prob_sum_LE * torch.arange(6, dtype=torch.float64).view(2, 3)).sum()
    expected = [torch.autograd.grad(balance, r.logits_TE, retain_graph=True)[0] for r in routings[1:]]
    gradients = RouterGradients(loss_scale=1.0)
    gradients.watch(routings, statistics, balance)
    gradients.finish()
    assert gradients.squares()[0, 1].item() == pytest.approx(expected[0].square().sum().item())


def two_routings():
    router = TopKConfig().build(hidden_size=5, num_experts=3, num_experts_per_tok=1, layer_index=0).double()
    from moe.routing import RouterContext

    with torch.no_grad():
        router.weight.normal_(generator=torch.Generator().manual_seed(0))
    x_TD = torch.randn(4, 5, dtype=torch.float64)
    open_E = torch.tensor([True, False, True])
    return [router(x_TD, RouterContext()), router(x_TD, RouterContext(open_E=open_E))]


def test_a_router_that_learns_nothing_has_no_ratio():
    assert torch.isnan(torch.tensor(mean_ratio(torch.zeros(2, 3, dtype=torch.float64))))
    model = tiny_model(replace(tiny_config(), router=HashConfig())).train()
    logits_BSV, routings = model(tiny_tokens(2, 8))
    statistics = collect(routings)
    gradients = RouterGradients(loss_scale=1.0)
    gradients.watch(routings, statistics, statistics.prob_sum_LE.square().sum() + 0.0 * logits_BSV.sum())
    logits_BSV.sum().backward()
    gradients.finish()
    assert gradients.squares()[1].abs().sum() == 0


def test_the_ratio_is_logged_and_the_same_on_every_layout(pool, run_root):
    balance = {"scope": "exact", "coefficient": 0.05}
    one = small_recipe(run_root, "one", steps=4, balance=balance, trainer={"log_every": 2})
    two = small_recipe(
        run_root,
        "two",
        steps=4,
        balance=balance,
        trainer={"log_every": 2},
        parallel={"ep_size": 2, "zero_stage": 2, "activation_checkpointing": True},
        batch={"micro_sequences": 1},
    )
    pool.run(train, one, world_size=1)
    pool.run(train, two, world_size=2)
    ratios = [[row["moe/router_grad_ratio"] for row in curve(recipe)] for recipe in (one, two)]
    assert len(ratios[0]) == 2 and all(ratio > 0 for ratio in ratios[0])
    assert ratios[1] == pytest.approx(ratios[0], rel=1e-4)
