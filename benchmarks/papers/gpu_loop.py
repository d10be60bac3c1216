"""One process, one GPU: the loop that trains a model of routers_on_gpu.py, in bfloat16 with float32 masters.

Plain torch and no engine, as in toy.py. The model holds working weights; AdamW moves float32 copies of them, and
gradients of micro-batches are summed in float32. Figures stay on the device between two points of the curve: on the
way nothing waits but what a router or the statistics wait for.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe.balance.health import load_figures
from moe.balance.load import BalanceConfig, GlobalLoad
from moe.balance.statistics import collect
from moe.blocks.block import end_routers_step
from moe.data.batching import BatchConfig
from moe.data.store import PreparedData
from moe.data.tokens import Batch, BatchStream
from moe.initial import initialise
from moe.model import Model, ModelConfig
from moe.parallel.groups import ParallelGroups
from moe.routing import RouterContext
from moe.train.evaluate import evaluate
from moe.train.loss import language_model_loss, micro_batch_loss
from moe.train.optimizer import OptimizerConfig, parameter_groups
from moe.train.schedule import ScheduleConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """All that a run is a function of, and how often it writes."""

    model: ModelConfig
    balance: BalanceConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    seed: int
    steps: int
    log_every: int
    eval_every: int
    eval_sequences: int  # of each domain
    seconds: float  # after so long the run ends with an evaluation, however many steps are left


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """A point of a curve. Losses in nats; held-out ones only where the step was evaluated."""

    step: int
    tokens: int
    epochs: float  # mean over domains, which are read at different paces
    seconds: float  # since the first step, evaluations included
    tokens_per_s: float  # since the point before, evaluations left out; the GPU may be shared
    loss: float  # of the language model on training text, mean since the point before
    grad_norm: float
    experts_per_token: float  # that ran, per layer (all rounds of a chain together)
    load_max_over_mean: float
    peak_gib: float
    held_out: dict[str, float] | None


class Masters:
    """Float32 copies of a model's weights, which AdamW moves.

    Args:
        model: holds the working weights, in any dtype.
        optimizer: AdamW settings.
    """

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig) -> None:
        groups = parameter_groups(model, weight_decay=optimizer.weight_decay)
        self._weights: list[nn.Parameter] = [weight for group in groups for weight in group["params"]]
        copies = [{**group, "params": [w.detach().float().clone() for w in group["params"]]} for group in groups]
        self._copies: list[Tensor] = [copy for group in copies for copy in group["params"]]
        for copy in self._copies:
            copy.grad = torch.zeros_like(copy)
        self._adamw = torch.optim.AdamW(copies, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.eps, fused=True)
        self._max_grad_norm = optimizer.max_grad_norm

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Take in the gradients of a micro-batch and clear them. A weight that no loss touched adds nothing."""
        for weight, copy in zip(self._weights, self._copies, strict=True):
            if weight.grad is not None:
                assert copy.grad is not None
                copy.grad += weight.grad
                weight.grad = None

    @torch.no_grad()
    def step(self, *, learning_rate: float) -> Tensor:
        """Clip, update, and return the norm of the gradient, on its device."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        norm = nn.utils.clip_grad_norm_(self._copies, self._max_grad_norm)
        self._adamw.step()
        torch._foreach_copy_(self._weights, self._copies)
        torch._foreach_zero_([copy.grad for copy in self._copies])
        return norm


class Loop:
    """Trains one model; `run` hands every point of the curve to `report` as soon as it is known."""

    def __init__(self, setup: Setup, data: PreparedData, *, device: torch.device, dtype: torch.dtype) -> None:
        self._setup, self._data, self._device = setup, data, device
        self._groups = ParallelGroups.single(device)
        with torch.device(device):
            self.model = Model(setup.model, groups=self._groups)
        initialise(self.model, seed=setup.seed)
        # the masters are copies of the weights as drawn: rounding comes after
        self._masters = Masters(self.model, setup.optimizer)
        self.model.to(dtype)
        self._load = GlobalLoad(scope=setup.balance.scope, group=None)
        self.stream = BatchStream(
            data=data,
            seed=setup.seed,
            global_sequences=setup.batch.global_sequences,
            sequence_length=setup.batch.sequence_length,
        )

    def run(self, report: Callable[[Figures], Any]) -> None:
        """Train to the last step, or until time is up; the last point is an evaluation in either case."""
        setup, started = self._setup, time.perf_counter()
        report(self._first_point())
        window = _Window()
        for step in range(setup.steps):
            norm, counts_LE = self._step(step, window)
            done = step + 1
            is_last = done == setup.steps or time.perf_counter() - started > setup.seconds
            is_evaluated = is_last or done % setup.eval_every == 0
            if is_evaluated or done % setup.log_every == 0:
                figures = self._figures(done, window, norm, counts_LE)
                held_out = self._held_out(done) if is_evaluated else None
                seconds = round(time.perf_counter() - started, 2)
                report(dataclasses.replace(figures, seconds=seconds, held_out=held_out))
                window = _Window()
            if is_last:
                return

    def _step(self, step: int, window: "_Window") -> tuple[Tensor, Tensor]:
        """Take one optimizer step; return the norm of its gradient and its counts, both on the device."""
        setup = self._setup
        micro_batches = setup.batch.micro_batches(rank=0, world_size=1)
        batches = [self.stream.batch(step, indices) for indices in micro_batches]
        num_tokens = sum(batch.num_valid for batch in batches)  # on the CPU: waits for nothing
        context = RouterContext(seed=setup.seed, step=step, progress=step / setup.steps)
        self.model.train()
        for batch in batches:
            loss, window.active_LE = self._micro_step(batch.to(self._device), context, num_tokens)
            window.losses.append(loss)
            self._masters.add_gradients()
        rate = setup.optimizer.learning_rate * setup.schedule.factor(step, steps=setup.steps)
        norm = self._masters.step(learning_rate=rate)
        counts_LE = self._load.end_step()
        self._load.remember(counts_LE)
        end_routers_step(self.model, counts_LE, context, num_tokens=num_tokens)
        window.num_tokens += num_tokens
        window.num_steps += 1
        return norm, counts_LE

    def _micro_step(self, batch: Batch, context: RouterContext, num_tokens: int) -> tuple[Tensor, Tensor | None]:
        """Run forward and backward; return the share of the step's language-model loss, and which experts are open."""
        context = dataclasses.replace(context, position_T=batch.position_BS.flatten())
        logits_BSV, routings = self.model(batch.token_BS, valid_BS=batch.valid_BS, context=context)
        statistics = collect(routings, num_sequences=batch.token_BS.shape[0])
        terms = micro_batch_loss(
            lm_sum=language_model_loss(logits_BSV, batch.label_BS, batch.valid_BS),
            statistics=statistics,
            load=self._load,
            balance=self._setup.balance,
            num_tokens=num_tokens,
        )
        terms.total.backward()
        return terms.lm, statistics.active_LE

    def _figures(self, step: int, window: "_Window", norm: Tensor, counts_LE: Tensor) -> Figures:
        """Return the point without what takes an evaluation. Waits for the device."""
        loss = (torch.stack(window.losses).double().sum() / window.num_steps).item()
        elapsed = time.perf_counter() - window.started
        setup = self._setup
        rows = counts_LE.sum().item() / setup.batch.tokens / setup.model.num_hidden_layers
        is_cuda = self._device.type == "cuda"
        return Figures(
            step=step,
            tokens=step * setup.batch.tokens,
            epochs=self._epochs(step),
            seconds=0.0,
            tokens_per_s=round(window.num_tokens / elapsed),
            loss=round(loss, 5),
            grad_norm=round(norm.item(), 4),
            experts_per_token=round(rows, 4),
            load_max_over_mean=round(load_figures(counts_LE, window.active_LE).max_over_mean, 4),
            peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2) if is_cuda else 0.0,
            held_out=None,
        )

    def _first_point(self) -> Figures:
        """Return the point before the first step: an evaluation, and nothing trained."""
        return Figures(
            step=0,
            tokens=0,
            epochs=0.0,
            seconds=0.0,
            tokens_per_s=0.0,
            loss=float("nan"),
            grad_norm=float("nan"),
            experts_per_token=float("nan"),
            load_max_over_mean=float("nan"),
            peak_gib=0.0,
            held_out=self._held_out(0),
        )

    def _held_out(self, step: int) -> dict[str, float]:
        """Return the held-out loss of each domain, with routers as they stand at this step."""
        setup = self._setup
        context = RouterContext(seed=setup.seed, step=step, progress=step / setup.steps)
        results = evaluate(
            self.model,
            self._data,
            groups=self._groups,
            sequence_length=setup.batch.sequence_length,
            batch_sequences=setup.batch.micro_sequences,
            max_sequences=setup.eval_sequences,
            context=context,
        )
        return {name: round(result.loss, 5) for name, result in results.items()}

    def _epochs(self, step: int) -> float:
        shares = self.stream.epochs(step).values()
        return round(sum(shares) / len(shares), 3)


@dataclasses.dataclass(kw_only=True, slots=True)
class _Window:
    """What the steps since the last point left."""

    losses: list[Tensor] = dataclasses.field(default_factory=list)
    num_tokens: int = 0
    num_steps: int = 0
    active_LE: Tensor | None = None  # of the last step
    started: float = dataclasses.field(default_factory=time.perf_counter)


def only_folder(cache_dir: Path) -> Path:
    """Return the one folder of prepared text in `cache_dir`. Raises ValueError with the remedy if there is none."""
    found = sorted(cache_dir.glob("prepared-*"))
    if len(found) != 1:
        raise ValueError(f"{cache_dir} holds {len(found)} folders of prepared text, not one; run --prepare there first")
    return found[0]
