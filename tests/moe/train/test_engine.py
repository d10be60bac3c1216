"""The engine against a plain torch loop of one process: losses, clipped norms and every weight after three steps."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moe.balance.load import BalanceConfig
from moe.data.tokens import Batch
from moe.initial import initialise
from moe.model import Model
from moe.parallel.groups import ParallelConfig, ParallelGroups
from moe.train.optimizer import OptimizerConfig, parameter_groups
from tiny import tiny_config

SEQUENCES, LENGTH, VOCAB, STEPS = 8, 12, 37, 3
BALANCE = BalanceConfig(coefficient=0.02, z_coefficient=0.001)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, max_grad_norm=0.3)


def tokens_of(step: int) -> tuple[Tensor, Tensor]:
    """Tokens [8, 13] and how many of each row are valid: uneven, and one row holds padding alone."""
    generator = torch.Generator().manual_seed(100 + step)
    token = torch.randint(VOCAB, (SEQUENCES, LENGTH + 1), generator=generator)
    length = torch.tensor([12, 3, 12, 7, 0, 12, 1, 9])
    return token, torch.arange(LENGTH) < length.unsqueeze(1)


def batch_of(step: int, start: int, stop: int) -> Batch:
    token, valid_BS = tokens_of(step)
    token, valid_BS = token[start:stop], valid_BS[start:stop]
    zeros = torch.zeros_like(token[:, 1:])
    return Batch(
        token_BS=token[:, :-1],
        label_BS=token[:, 1:],
        valid_BS=valid_BS,
        document_BS=zeros,
        domain_B=zeros[:, 0],
        position_BS=torch.arange(start * LENGTH, stop * LENGTH).view(-1, LENGTH),
    )


def plain_loop() -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """No engine, no dispatch, no statistics of ours: the losses written out."""
    model = Model(tiny_config(), groups=ParallelGroups.single(), backend="naive").train()
    initialise(model, seed=0)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, weight_decay=OPTIMIZER.weight_decay), lr=1e-2, betas=(0.9, 0.95), eps=1e-8
    )
    curve = []
    for step in range(STEPS):
        batch = batch_of(step, 0, SEQUENCES)
        mask = batch.valid_BS.flatten()
        logits, routings = model(batch.token_BS, valid_BS=batch.valid_BS)
        loss = F.cross_entropy(logits.flatten(0, 1)[mask], batch.label_BS.flatten()[mask])
        for routing in routings:
            z = routing.logits_TE[mask]
            E = z.shape[1]
            chosen = z.topk(2).indices
            share = torch.bincount(chosen.flatten(), minlength=E) / chosen.numel()
            loss = loss + 0.02 * E * (share * torch.softmax(z, -1).mean(0)).sum()
            loss = loss + 0.001 * torch.logsumexp(z, -1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    return curve, {name: p.detach().clone() for name, p in model.named_parameters()}


def engine_loop(parallel: ParallelConfig) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    from moe.train.engine import Engine
    from moe.train.step import TrainStep

    groups = ParallelGroups.create(ep_size=parallel.ep_size, device=torch.device("cpu"))
    model = Model(tiny_config(), groups=groups, activation_checkpointing=parallel.activation_checkpointing)
    initialise(model, seed=0)
    engine = Engine(model=model, groups=groups, optimizer=OPTIMIZER, parallel=parallel)
    train_step = TrainStep(engine=engine, groups=groups, balance=BALANCE, seed=0)
    share = SEQUENCES // groups.world_size
    curve: list[Any] = []
    for step in range(STEPS):
        batch = batch_of(step, groups.rank * share, (groups.rank + 1) * share)
        record = train_step.run([batch], step=step, progress=0.0, learning_rate=1e-2)
        curve.append((record.loss, record.grad_norm))
    weights = {name: p.detach().float().clone() for name, p in engine.module.named_parameters()}
    engine.close()
    return curve, weights


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (1, ParallelConfig(zero_stage=0)),
        (1, ParallelConfig(zero_stage=1, activation_checkpointing=True)),
        (2, ParallelConfig(zero_stage=0, ep_size=2)),
        (2, ParallelConfig(zero_stage=1)),
        (4, ParallelConfig(zero_stage=0, ep_size=2, activation_checkpointing=True)),
        (4, ParallelConfig(zero_stage=1, ep_size=2)),
        (2, ParallelConfig(zero_stage=2, ep_size=2)),
    ],
    ids=str,
)
def test_engine_equals_a_plain_loop(pool, world, parallel):
    expected, expected_weights = plain_loop()
    assert all(norm > OPTIMIZER.max_grad_norm for _, norm in expected), "the case must clip"
    results = pool.run(engine_loop, parallel, world_size=world)
    for curve, _ in results:
        for (loss, norm), (expected_loss, expected_norm) in zip(curve, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-6)
            assert norm == pytest.approx(expected_norm, rel=1e-5)
    ep = parallel.ep_size
    for name, expected_weight in expected_weights.items():
        pieces = [weights[name] for _, weights in results]
        groups = range(0, world, ep) if ".experts." in name else range(0, world)
        for start in groups:
            whole = torch.cat(pieces[start : start + ep]) if ".experts." in name else pieces[start]
            # AdamW's first steps have size lr whatever the gradient: rounding of tiny gradients shows, so an RMS ratio
            error = (whole - expected_weight).square().mean().sqrt() / expected_weight.square().mean().sqrt()
            assert error < 2e-5, (name, start, error)


def test_bfloat16_follows_float32(pool):
    expected, _ = plain_loop()
    for stage in (1, 2):
        curve, _ = pool.run(engine_loop, ParallelConfig(zero_stage=stage, ep_size=2, dtype="bf16"), world_size=2)[0]
        for (loss, norm), (expected_loss, expected_norm) in zip(curve, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=2e-3)
            assert norm == pytest.approx(expected_norm, rel=3e-2)


def summed_loop(is_ours: bool) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Steps of two micro-batches in bfloat16, their gradients summed by ours or by DeepSpeed's own way."""
    from moe.train import engine as module
    from moe.train.step import TrainStep

    ours = module._sum_gradients_in_one_pass
    if not is_ours:
        module._sum_gradients_in_one_pass = lambda optimizer: None
    try:
        groups = ParallelGroups.create(ep_size=2, device=torch.device("cpu"))
        model = Model(tiny_config(), groups=groups)
        initialise(model, seed=0)
        parallel = ParallelConfig(zero_stage=1, ep_size=2, dtype="bf16")
        engine = module.Engine(model=model, groups=groups, optimizer=OPTIMIZER, parallel=parallel)
    finally:
        module._sum_gradients_in_one_pass = ours
    assert ("_sum_gradients_in_one_pass" in engine.zero_optimizer._update_hp_grad.__qualname__) == is_ours
    train_step = TrainStep(engine=engine, groups=groups, balance=BALANCE, seed=0)
    curve: list[Any] = []
    for step in range(STEPS):
        start = 4 * groups.rank
        batches = [batch_of(step, start, start + 2), batch_of(step, start + 2, start + 4)]
        record = train_step.run(batches, step=step, progress=0.0, learning_rate=1e-2)
        curve.append((record.loss, record.grad_norm))
    weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    engine.close()
    return curve, weights


def test_gradients_of_micro_batches_are_summed_as_deepspeed_sums_them_to_the_bit(pool):
    ours, theirs = (pool.run(summed_loop, is_ours, world_size=2) for is_ours in (True, False))
    for (curve, weights), (expected, expected_weights) in zip(ours, theirs, strict=True):
        assert curve == expected
        assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)


def skip_loop(stage: int) -> tuple[bool, bool, bool, bool]:
    """Train, poison one gradient on one rank, train on."""
    from moe.train.engine import Engine

    groups = ParallelGroups.create(ep_size=1, device=torch.device("cpu"))
    model = Model(tiny_config(), groups=groups)
    initialise(model, seed=0)
    engine = Engine(model=model, groups=groups, optimizer=OPTIMIZER, parallel=ParallelConfig(zero_stage=stage))

    def step(poison: bool):
        token, _ = tokens_of(0)
        logits, _ = engine(token[:, :-1])
        loss = logits.float().square().mean()
        if poison and dist.get_rank() == 1:
            loss = loss * float("nan")
        engine.backward(loss)
        return engine.step(learning_rate=1e-2)

    first = step(False)
    before = [p.detach().clone() for p in engine.module.parameters()]
    bad = step(True)
    is_unmoved = all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True))
    after = step(False)
    is_finite = all(torch.isfinite(p).all() for p in engine.module.parameters())
    engine.close()
    return first.is_skipped, bad.is_skipped and is_unmoved, after.is_skipped, bool(is_finite)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_gradient_that_is_not_finite_moves_nothing_on_any_rank(pool, stage):
    assert pool.run(skip_loop, stage, world_size=2) == [(False, True, False, True)] * 2


def untouched_loop(dtype: str) -> float:
    """Return by how much a step shrinks the head, from a loss that does not see it."""
    from moe.train.engine import Engine

    groups = ParallelGroups.create(ep_size=1, device=torch.device("cpu"))
    model = Model(tiny_config(), groups=groups)
    initialise(model, seed=0)
    parallel = ParallelConfig(zero_stage=1, dtype=dtype)  # type: ignore[arg-type]
    engine = Engine(model=model, groups=groups, optimizer=OptimizerConfig(weight_decay=0.5), parallel=parallel)
    assert model.lm_head is not None
    before = model.lm_head.weight.detach().float().norm()
    engine.backward(model.embed_tokens(tokens_of(0)[0]).float().square().mean())
    engine.step(learning_rate=1.0)
    after = model.lm_head.weight.detach().float().norm()
    engine.close()
    return float(after / before)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_parameter_that_no_loss_touches_decays_on_one_rank_as_on_two(pool, dtype):
    assert pool.run(untouched_loop, dtype, world_size=1) == pytest.approx([0.5])
    assert pool.run(untouched_loop, dtype, world_size=2) == pytest.approx([0.5, 0.5])


def test_the_norm_of_a_large_tensor_is_exact():
    from moe.train.engine import global_norm

    # torch's own float32 norm on a CPU is 2e-4 off here
    gradient = torch.randn(16, 512, 512, generator=torch.Generator().manual_seed(0)).pow(3)
    norm = global_norm([(torch.nn.Parameter(gradient), gradient)], ParallelGroups.single())
    assert norm == pytest.approx(gradient.double().norm().item(), rel=1e-7)
