"""Bugs of other projects that the tests of single parts do not hold; docs/load_balancing.md has the whole list."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe.balance.load import BalanceConfig, GlobalLoad
from moe.balance.losses import frequency, load_balancing_loss
from moe.balance.statistics import collect
from moe.model import Model
from moe.parallel.groups import ParallelConfig, ParallelGroups
from moe.routers.topk import TopKConfig, TopKRouter
from moe.routing import RouterContext
from moe.train.loss import micro_batch_loss
from tiny import tiny_config, tiny_model, tiny_tokens

D, E, K = 6, 5, 2


def router(**fields) -> TopKRouter:
    module = TopKConfig(**fields).build(hidden_size=D, num_experts=E, num_experts_per_tok=K, layer_index=0)
    with torch.no_grad():
        module.weight.copy_(torch.randn(E, D, generator=torch.Generator().manual_seed(0)))
    return module


def test_the_loss_reads_probabilities_of_one_softmax():
    """R1. A softmax of a softmax is nearly uniform: its loss is near 1 whatever the router does."""
    x_TD = torch.rand(40, D)  # all positive, so that some experts are preferred by every token
    module = router()
    statistics = collect([module(x_TD, RouterContext())])
    loss = load_balancing_loss(frequency(statistics.tokens_per_expert_LE), statistics.prob_sum_LE, 40).item()
    z_TE = x_TD.double() @ module.weight.detach().double().t()
    p_TE = z_TE.exp() / z_TE.exp().sum(-1, keepdim=True)
    share_E = torch.bincount(z_TE.topk(K).indices.flatten(), minlength=E).double() / (40 * K)
    assert loss == pytest.approx(E * (share_E * p_TE.mean(0)).sum().item(), rel=1e-6)
    assert loss > 1.3, "the case must tell one softmax from two"


def test_the_router_gradient_of_a_micro_batch_is_affine_in_the_coefficient():
    """R3. The balance loss reaches the router through the loss that is trained on, with the recipe's weight."""
    module, x_TD = router(), torch.randn(9, D)

    def gradient(coefficient: float) -> Tensor:
        module.weight.grad = None
        routing = module(x_TD, RouterContext())
        terms = micro_batch_loss(
            lm_sum=routing.assignment.weight_N.square().sum(),
            statistics=collect([routing]),
            load=GlobalLoad(scope="global", group=None),
            balance=BalanceConfig(coefficient=coefficient),
            num_tokens=9,
        )
        terms.total.backward()
        assert module.weight.grad is not None
        return module.weight.grad.clone()

    without = gradient(0.0)
    once, thrice = gradient(1.0) - without, gradient(3.0) - without
    assert once.norm() > 1e-3
    torch.testing.assert_close(thrice, 3 * once, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scope", ["micro", "global", "exact"])
def test_uneven_micro_batches_of_equal_frequencies_give_the_gradient_of_the_whole(scope):
    """R5. 4 + 4 + 4 valid tokens, or 6 + 2 + 4: the frequencies are the same, so the gradient must be."""
    x_TD = torch.rand(12, D)
    choose = torch.zeros(E, D)
    choose[0], choose[1] = 2.0, 1.0  # every token takes experts 0 and 1, with probabilities of its own
    base = router()

    def gradient(sizes: list[int]) -> Tensor:
        module = router()
        with torch.no_grad():
            module.weight.copy_(0.2 * base.weight + choose)
        load = GlobalLoad(scope=scope, group=None)
        start = 0
        for size in sizes:
            # padded to six tokens, as in a real micro-batch
            padded_TD = torch.cat([x_TD[start : start + size], torch.ones(6 - size, D)])
            routing = module(padded_TD, RouterContext(valid_T=torch.arange(6) < size))
            assert set(routing.assignment.expert_N[: 2 * size].tolist()) == {0, 1}
            terms = micro_batch_loss(
                lm_sum=torch.zeros(()),
                statistics=collect([routing]),
                load=load,
                balance=BalanceConfig(coefficient=1.0),
                num_tokens=12,
            )
            terms.total.backward()
            start += size
        assert module.weight.grad is not None
        return module.weight.grad

    p_TE = torch.softmax(x_TD.double() @ (0.2 * base.weight + choose).detach().double().t(), -1)
    f_E = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0], dtype=torch.float64)
    dz_TE = E / 12 * p_TE * (f_E - (p_TE @ f_E).unsqueeze(1))
    expected = (dz_TE.t() @ x_TD.double()).float()
    for sizes in ([4, 4, 4], [6, 2, 4]):
        torch.testing.assert_close(gradient(sizes), expected, rtol=1e-4, atol=1e-6)


def test_recomputation_counts_no_token_twice():
    """R7. The counts a step ends with, after every backward, with and without activation checkpointing."""
    config, token_BS = tiny_config(), tiny_tokens(2, 3, 9)
    results, num_routed = [], []
    for checkpointing in (False, True):
        model = tiny_model(config, activation_checkpointing=checkpointing).train()
        calls = []
        for module in model.modules():
            if isinstance(module, TopKRouter):
                module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        load = GlobalLoad(scope="global", group=None)
        for micro_batch in token_BS:
            logits_BSV, routings = model(micro_batch)
            statistics = collect(routings)
            (logits_BSV.square().mean() + load.balance_loss(statistics, 54).sum()).backward()
        results.append([load.end_step(), *(parameter.grad for parameter in model.parameters())])
        num_routed.append(len(calls))
    assert num_routed == [4, 4]  # two MoE layers, two micro-batches
    assert results[0][0].sum(-1).tolist() == [54 * 2, 54 * 2]
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def bias_after_engine() -> tuple[torch.dtype, torch.dtype, float]:
    from moe.blocks.block import end_routers_step
    from moe.initial import initialise
    from moe.train.engine import Engine
    from moe.train.optimizer import OptimizerConfig

    groups = ParallelGroups.create(ep_size=1, device=torch.device("cpu"))
    config = tiny_config()
    config = replace(config, router=TopKConfig(scoring_func="sigmoid", use_selection_bias=True, bias_update_rate=1e-3))
    model = Model(config, groups=groups)
    initialise(model, seed=0)
    parallel = ParallelConfig(zero_stage=1, dtype="bf16")
    engine = Engine(model=model, groups=groups, optimizer=OptimizerConfig(), parallel=parallel)
    counts_LE = torch.tensor([[0, 2, 2, 2, 2, 4]] * 2)
    for _ in range(1000):
        end_routers_step(engine.module, counts_LE, RouterContext(), num_tokens=8)
    module = next(m for m in engine.module.modules() if isinstance(m, TopKRouter))
    result = module.weight.dtype, module.selection_bias.dtype, module.selection_bias[0].item()
    engine.close()
    return result


def test_the_selection_bias_stays_float32_in_a_bfloat16_engine(pool):
    """R8. In bfloat16, steps of 1e-3 stop adding up at a bias of 0.5."""
    weight_dtype, bias_dtype, bias = pool.run(bias_after_engine, world_size=1)[0]
    assert (weight_dtype, bias_dtype) == (torch.bfloat16, torch.float32)
    assert bias == pytest.approx(1.0, abs=1e-4)
