"""Runs of the layout matrix: one layout in each of the three parts of the proof, and how far it is from the plain loop.

Rounding differs between layouts and may flip a top-k choice, from where two right runs part. So:

    fp64      a small model with shared experts, router noise and selection bias: 20 free steps at ZeRO 0, rounding
              1e-16. Stages 1 and 2 keep float32 masters: 6 steps, to what float32 updates allow
    fp32      recipes/debug.py as a user launches it, 6 free steps: too few for a flip
    replayed  fp32, 20 steps, every layout given the expert choices of the plain loop
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import astuple, dataclass, fields, replace
from functools import cache, partial
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from layouts import Layout
from moe.balance.load import BalanceConfig, Scope
from moe.data.batching import BatchConfig
from moe.data.prepare import prepare
from moe.data.tokens import Batch, BatchStream
from moe.initial import initialise
from moe.model import Model
from moe.parallel.groups import ParallelConfig, ParallelGroups
from moe.recipe import Recipe, launch
from moe.routers.topk import TopKConfig, TopKRouter
from moe.routing import RouterContext, Routing
from moe.train.optimizer import OptimizerConfig
from plain_loop import Curve, Row, Task, plain_loop
from pool import Pool
from runs import small_recipe, without_report
from tiny import tiny_config

SEQUENCES, LENGTH, VOCAB = 8, 12, 37
SEED = 3


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """The worst over all steps and ranks. Losses and norms are relative, parameters an RMS ratio by tensor."""

    loss: float  # of the loss and of its language-model part
    balance: float  # of the load-balancing loss
    z_loss: float
    grad_norm: float
    parameters: float  # 0 where they are not compared
    counts: int  # expert counts that differ

    def over(self, limit: "Deviation") -> list[str]:
        """Return the names of the figures beyond `limit`; nan is beyond any."""
        pairs = zip(fields(self), astuple(self), astuple(limit), strict=True)
        return [f"{field.name} {value:.1e} > {most:.1e}" for field, value, most in pairs if not value <= most]


LIMITS = {
    "fp64": Deviation(loss=1e-9, balance=1e-9, z_loss=1e-9, grad_norm=1e-9, parameters=1e-10, counts=0),
    # the norm, computed in float32, is known to no more than 1.2e-7
    "fp64, fp32 masters": Deviation(loss=1e-7, balance=1e-7, z_loss=1e-7, grad_norm=3e-7, parameters=1e-6, counts=0),
    "fp32": Deviation(loss=1e-6, balance=1e-6, z_loss=1e-5, grad_norm=1e-5, parameters=0.0, counts=0),
    "replayed": Deviation(loss=1e-5, balance=1e-5, z_loss=1e-4, grad_norm=5e-4, parameters=1e-3, counts=0),
}


def run_fp64(pool: Pool, layout: Layout) -> tuple[str, Deviation]:
    """Return (the name of its limits, the deviation) of free steps in float64."""
    part, steps = ("fp64", 20) if layout.stage == 0 else ("fp64, fp32 masters", 6)
    task, reference = reference_of(dtype=torch.float64, steps=steps, is_padded=layout.is_padded)
    return part, deviation(pool.run(train_layout, task, layout, world_size=layout.world[0]), reference, layout)


def run_replayed(pool: Pool, layout: Layout, *, steps: int = 20) -> tuple[str, Deviation]:
    """Return ("replayed", the deviation) of float32 steps with the expert choices of the plain loop."""
    task, reference = reference_of(dtype=torch.float32, steps=steps, is_padded=layout.is_padded)
    router = ReplayConfig(**vars(task.model.router), choices=reference.choices)
    task = replace(task, model=replace(task.model, router=router))
    return "replayed", deviation(pool.run(train_layout, task, layout, world_size=layout.world[0]), reference, layout)


def run_launched(
    pool: Pool, layout: Layout, *, root: Path, data_dir: Path, scope: Scope = "exact"
) -> tuple[str, Deviation]:
    """Return ("fp32", the deviation) of the debug recipe, launched under `root` on data prepared in `data_dir`."""
    recipe = launched_recipe(root, layout, data_dir=data_dir, scope=scope)
    curves = pool.run(launch_and_record, recipe, world_size=layout.world[0])
    return "fp32", deviation(curves, launched_reference(data_dir, layout.is_padded, scope), layout)


def launched_recipe(root: Path, layout: Layout, *, data_dir: Path, scope: Scope = "exact") -> Recipe:
    """The debug recipe on `layout`, with both losses on."""
    return small_recipe(
        root,
        f"{layout}-{scope}",
        batch={"micro_sequences": layout.micro},
        data={"packing": "pad" if layout.is_padded else "concatenate", "cache_dir": str(data_dir)},
        parallel={
            "ep_size": layout.world[1],
            "zero_stage": layout.stage,
            "activation_checkpointing": layout.is_checkpointed,
        },
        balance={"scope": scope, "coefficient": 0.02, "z_coefficient": 0.001},
    )


@cache
def launched_reference(data_dir: Path, is_padded: bool, scope: Scope) -> Curve:
    """The plain loop over what the recipe says, layout left out."""
    layout = Layout(world=(1, 1), stage=0, micro=1, is_checkpointed=False, is_padded=is_padded)
    recipe = launched_recipe(data_dir, layout, data_dir=data_dir, scope=scope)
    stream = BatchStream(
        data=prepare(recipe.data, report=lambda _: None),
        seed=recipe.seed,
        global_sequences=recipe.batch.global_sequences,
        sequence_length=recipe.batch.sequence_length,
    )
    steps, peak = recipe.trainer.steps, recipe.optimizer.learning_rate
    task = Task(
        model=recipe.model,
        optimizer=recipe.optimizer,
        balance=recipe.balance,
        dtype=torch.float32,
        seed=recipe.seed,
        steps=steps,
        sequences=recipe.batch.global_sequences,
        batch=stream.batch,
        learning_rate=lambda step: peak * recipe.schedule.factor(step, steps=steps),
    )
    return plain_loop(task)


def launch_and_record(recipe: Recipe) -> Curve:
    """Launch, on the ranks of the pool, and return what every step gave: a row of the log has no counts."""
    from moe.train import step as step_module

    rows: list[Row] = []

    class Recorder(step_module.TrainStep):
        def run(self, *args: Any, **arguments: Any) -> step_module.StepRecord:
            record = super().run(*args, **arguments)
            rows.append(row_of(record))
            return record

    with patch.object(step_module, "TrainStep", Recorder), redirect_stdout(StringIO()), without_report():
        launch(recipe)
    return Curve(rows=rows, weights={}, choices={})


def row_of(record: Any) -> Row:
    """A StepRecord; typed loosely, as naming its class would import DeepSpeed into the test process."""
    return Row(
        loss=record.loss,
        lm_loss=record.lm_loss,
        load_balancing_loss=record.load_balancing_loss,
        z_loss=record.z_loss,
        grad_norm=record.grad_norm,
        tokens_per_expert=record.tokens_per_expert_LE.tolist(),
    )


@cache
def reference_of(*, dtype: torch.dtype, steps: int, is_padded: bool) -> tuple[Task, Curve]:
    """The small task of the fp64 and replayed parts, and its plain loop."""
    router = TopKConfig(norm_topk_prob=True, router_jitter_noise=0.05, use_selection_bias=True, bias_update_rate=0.01)
    task = Task(
        # wide initial weights, so that experts and routers matter from the first step
        model=tiny_config(num_hidden_layers=2, mlp_only_layers=(), num_experts=8, initializer_range=0.2, router=router),
        optimizer=OptimizerConfig(max_grad_norm=1.8),
        balance=BalanceConfig(scope="exact", coefficient=0.02, z_coefficient=0.001),
        dtype=dtype,
        seed=SEED,
        steps=steps,
        sequences=SEQUENCES,
        batch=partial(batch_of, is_padded=is_padded),
        learning_rate=learning_rate,
    )
    return task, plain_loop(task)


def learning_rate(step: int) -> float:
    """Warm-up, then constant."""
    return 3e-3 * min(1.0, (step + 1) / 4)


def batch_of(step: int, indices: Sequence[int], *, is_padded: bool) -> Batch:
    """Random tokens; where padded, sequences of 0 to 12 valid tokens, and two neighbours with none.

    The two make a micro-batch or, without accumulation, a whole rank without a token; in every fourth step four
    sequences are empty, so that one of two ranks has none. Padding holds tokens like any other.
    """
    generator = torch.Generator().manual_seed(100 + step)
    token_BS = torch.randint(VOCAB, (SEQUENCES, LENGTH + 1), generator=generator)
    lengths = [0, 0, 12, 3, 0, 0, 7, 12] if step % 4 == 3 else [12, 3, 12, 7, 0, 0, 1, 9]
    length_B = torch.tensor(lengths).roll(2 * (step % 4)) if is_padded else torch.full((SEQUENCES,), LENGTH)
    valid_BS = torch.arange(LENGTH) < length_B[:, None]
    row = torch.tensor(list(indices))
    zero_BS = torch.zeros(len(row), LENGTH, dtype=torch.int64)
    return Batch(
        token_BS=token_BS[row, :-1],
        label_BS=token_BS[row, 1:],
        valid_BS=valid_BS[row],
        document_BS=zero_BS,
        domain_B=zero_BS[:, 0],
        position_BS=row[:, None] * LENGTH + torch.arange(LENGTH),
    )


def train_layout(task: Task, layout: Layout) -> Curve:
    """The task on the ranks of the pool, through the engine; `weights` are those of this rank."""
    from moe.train.engine import Engine
    from moe.train.step import TrainStep

    ep = layout.world[1]
    parallel = ParallelConfig(ep_size=ep, zero_stage=layout.stage, activation_checkpointing=layout.is_checkpointed)  # type: ignore[arg-type]
    groups = ParallelGroups.create(ep_size=ep, device=torch.device("cpu"))
    model = Model(task.model, groups=groups, activation_checkpointing=layout.is_checkpointed).to(task.dtype)
    initialise(model, seed=task.seed)
    batch = BatchConfig(global_sequences=task.sequences, micro_sequences=layout.micro, sequence_length=LENGTH)
    micro_batches = batch.micro_batches(rank=groups.rank, world_size=groups.world_size)
    with float64_allowed():
        engine = Engine(model=model, groups=groups, optimizer=task.optimizer, parallel=parallel)
        if layout.stage == 0:
            engine._engine.communication_data_type = task.dtype
        train_step = TrainStep(engine=engine, groups=groups, balance=task.balance, seed=task.seed)
        rows = []
        for step in range(task.steps):
            batches = [task.batch(step, indices) for indices in micro_batches]
            rate = task.learning_rate(step)
            record = train_step.run(batches, step=step, progress=step / task.steps, learning_rate=rate)
            rows.append(row_of(record))
        # arrays and not tensors: those of four ranks would travel as file descriptors
        weights = {name: p.detach().numpy().copy() for name, p in engine.module.named_parameters()}
        engine.close()
    return Curve(rows=rows, weights=weights, choices={})


@contextmanager
def float64_allowed() -> Iterator[None]:
    """Let DeepSpeed reduce float64 gradients on a CPU, which it refuses at stage 0 although gloo can."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    dtypes = [*accelerator.supported_dtypes(), torch.float64]
    with patch.object(type(accelerator), "supported_dtypes", lambda self: dtypes):
        yield


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(TopKConfig):
    """A top-k router that is told what to choose."""

    choices: dict[tuple[int, int], Tensor]  # (step, layer): experts [T, K] of the global batch

    def build(self, *, layer_index: int, **arguments: Any) -> TopKRouter:
        return ReplayRouter(config=self, layer_index=layer_index, **arguments)


class ReplayRouter(TopKRouter):
    """Everything as in TopKRouter, but the choice comes from a table by step, layer and global token."""

    config: ReplayConfig

    def forward(self, x_TD: Tensor, context: RouterContext) -> Routing:
        assert context.position_T is not None
        self._chosen_TK = self.config.choices[context.step, self.layer_index][context.position_T]
        return super().forward(x_TD, context)

    def _choose(self, score_TE: Tensor) -> Tensor:
        return self._chosen_TK


def deviation(curves: list[Curve], reference: Curve, layout: Layout) -> Deviation:
    """Return how far the ranks of a layout are from the plain loop, at worst."""
    pairs = [pair for curve in curves for pair in zip(curve.rows, reference.rows, strict=True)]

    def worst(*names: str) -> float:
        # max() would lose a nan
        return float(
            np.max([relative(getattr(row, n), getattr(expected, n)) for row, expected in pairs for n in names])
        )

    counts = [np.array(row.tokens_per_expert) != np.array(expected.tokens_per_expert) for row, expected in pairs]
    return Deviation(
        loss=worst("loss", "lm_loss"),
        balance=worst("load_balancing_loss"),
        z_loss=worst("z_loss"),
        grad_norm=worst("grad_norm"),
        parameters=parameter_deviation(curves, reference, ep_size=layout.world[1]),
        counts=int(np.sum(counts)),
    )


def relative(actual: float, expected: float) -> float:
    return abs(actual - expected) / abs(expected)


def parameter_deviation(curves: list[Curve], reference: Curve, *, ep_size: int) -> float:
    """Return the worst RMS ratio over all parameters; those of experts are put together from each expert group."""
    ratios = [0.0]
    for name in curves[0].weights:
        expected = reference.weights[name]
        pieces = [curve.weights[name] for curve in curves]
        if ".experts." in name:
            pieces = [np.concatenate(pieces[i : i + ep_size]) for i in range(0, len(pieces), ep_size)]
        ratios += [float(np.linalg.norm(piece - expected) / np.linalg.norm(expected)) for piece in pieces]
    return float(np.max(ratios))
