"""What each balance scope costs, as a share of a training step, on one process with accumulation.

    python benchmarks/bench_balance.py                            # prints a table
    python benchmarks/bench_balance.py --machine cpu_2core_epyc   # and adds rows to results/balance_cpu_2core_epyc.csv

Two measurements. `step`: whole optimizer steps, with and without balance, taking turns, so that a busy machine slows
all of them alike. `balance`: statistics and loss alone, forward and backward, for all micro-batches of a step; the
difference of two steps is too noisy for it. Scope exact also counts: one more forward of every micro-batch, without
gradients. One process has nobody to talk to: what the all-reduces of the other scopes cost is not in these figures.
"""

import dataclasses
import datetime
import statistics
import time
from pathlib import Path
from typing import Literal

import torch
import tyro
from result_rows import append_rows, current_commit
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moe.balance.load import BalanceConfig, GlobalLoad
from moe.balance.statistics import collect
from moe.initial import initialise
from moe.model import Model, ModelConfig
from moe.parallel.groups import ParallelGroups
from moe.routers.topk import TopKConfig
from moe.routing import Routing
from moe.train.loss import language_model_loss, micro_batch_loss
from moe.train.optimizer import parameter_groups

RESULTS = Path(__file__).parent / "results"
WARMUP_ROUNDS = 2

Variant = Literal["none", "sequence", "micro", "ranks", "global", "exact", "lagged"]
VARIANTS: tuple[Variant, ...] = ("none", "sequence", "micro", "ranks", "global", "exact", "lagged")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Time training steps under every balance scope. The default model is OLMoE-1B-7B at a quarter of its widths."""

    machine: str = ""
    """Name of the kind of machine: rows are added to results/balance_<machine>.csv. Empty: only print."""
    rounds: int = 9
    layers: int = 2
    hidden_size: int = 512
    num_experts: int = 64
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 256
    vocab_size: int = 4096
    accumulation: int = 4
    micro_sequences: int = 2
    sequence_length: int = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of results: one scope. Milliseconds on one core, medians over rounds."""

    date: str
    commit: str
    torch: str
    layers: int
    hidden_size: int
    num_experts: int
    num_experts_per_tok: int
    accumulation: int
    micro_tokens: int
    scope: str
    balance_ms: float  # statistics and loss, forward and backward, of all micro-batches of a step
    balance_share: float  # of the step without balance
    counting_ms: float  # scope exact: the extra forward of all micro-batches
    step_ms: float
    step_to_none: float  # median of the ratios within a round


class Loop:
    """A plain training loop over one repeated step of random tokens; the scopes take turns on one model."""

    def __init__(self, options: Options) -> None:
        o = options
        config = ModelConfig(
            vocab_size=o.vocab_size,
            hidden_size=o.hidden_size,
            num_hidden_layers=o.layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=o.sequence_length,
            tie_word_embeddings=False,
            num_experts=o.num_experts,
            num_experts_per_tok=o.num_experts_per_tok,
            moe_intermediate_size=o.moe_intermediate_size,
            qk_norm="full",
            router=TopKConfig(),
        )
        self._model = Model(config, groups=ParallelGroups.single())
        initialise(self._model, seed=0)
        self._optimizer = torch.optim.AdamW(parameter_groups(self._model, weight_decay=0.1), lr=1e-4)
        self._balance = BalanceConfig(coefficient=0.008)
        self._loads = {scope: GlobalLoad(scope=scope, group=None) for scope in VARIANTS if scope != "none"}
        generator = torch.Generator().manual_seed(0)
        shape = (o.accumulation, o.micro_sequences, o.sequence_length + 1)
        self._batches = torch.randint(o.vocab_size, shape, generator=generator)
        self._num_tokens = self._batches[:, :, 1:].numel()

    def step(self, variant: Variant) -> float:
        """Run one optimizer step and return its milliseconds on this core."""
        start = time.thread_time()
        if variant == "exact":
            self._loads[variant].expect(self._count())
        for batch in self._batches:
            logits_BSV, routings = self._model(batch[:, :-1])
            label_BS = batch[:, 1:]
            lm_sum = language_model_loss(logits_BSV, label_BS, torch.ones_like(label_BS, dtype=torch.bool))
            self._loss(variant, lm_sum, routings).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._end_step(variant)
        return (time.thread_time() - start) * 1e3

    def count_alone(self) -> float:
        """Return the milliseconds of the counting pass of one step."""
        start = time.thread_time()
        self._count()
        return (time.thread_time() - start) * 1e3

    def balance_alone(self, variant: Variant) -> float:
        """Return the milliseconds of statistics, loss and their backward down to the router's probabilities."""
        with torch.no_grad():
            steps = [self._model(batch[:, :-1])[1] for batch in self._batches]
        expected_LE = torch.stack([collect(routings).tokens_per_expert_LE for routings in steps]).sum(0)
        leaves = [[_leaf(routing) for routing in routings] for routings in steps]
        lm_sum = torch.zeros(())
        start = time.thread_time()
        if variant == "exact":
            self._loads[variant].expect(expected_LE)
        for routings in leaves:
            self._loss(variant, lm_sum, routings).backward()
        self._end_step(variant)
        return (time.thread_time() - start) * 1e3

    def _loss(self, variant: Variant, lm_sum: Tensor, routings: list[Routing]) -> Tensor:
        if variant == "none":
            return lm_sum / self._num_tokens
        # only scope sequence reads the counts of single sequences, but a training step always collects them
        return micro_batch_loss(
            lm_sum=lm_sum,
            statistics=collect(routings, num_sequences=self._batches.shape[1]),
            load=self._loads[variant],
            balance=self._balance,
            num_tokens=self._num_tokens,
        ).total

    def _end_step(self, variant: Variant) -> None:
        if variant != "none":
            load = self._loads[variant]
            load.remember(load.end_step())

    @torch.no_grad()
    def _count(self) -> Tensor:
        counts = [collect(self._model(batch[:, :-1])[1]).tokens_per_expert_LE for batch in self._batches]
        return torch.stack(counts).sum(0)


def _leaf(routing: Routing) -> Routing:
    return dataclasses.replace(
        routing,
        probs_TE=routing.probs_TE.clone().requires_grad_(),
        logits_TE=routing.logits_TE.clone().requires_grad_(),
    )


def bench(options: Options) -> list[Row]:
    """Return one row per scope."""
    loop = Loop(options)
    steps: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    alone: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    counting: list[float] = []
    for turn in range(WARMUP_ROUNDS + options.rounds):
        start = turn % len(VARIANTS)
        for variant in VARIANTS[start:] + VARIANTS[:start]:
            steps[variant].append(loop.step(variant))
            alone[variant].append(0.0 if variant == "none" else loop.balance_alone(variant))
        counting.append(loop.count_alone())
    none_ms = steps["none"][WARMUP_ROUNDS:]
    rows = []
    for variant in VARIANTS:
        step_ms, balance_ms = steps[variant][WARMUP_ROUNDS:], statistics.median(alone[variant][WARMUP_ROUNDS:])
        rows.append(
            Row(
                date=datetime.date.today().isoformat(),
                commit=current_commit(),
                torch=torch.__version__,
                layers=options.layers,
                hidden_size=options.hidden_size,
                num_experts=options.num_experts,
                num_experts_per_tok=options.num_experts_per_tok,
                accumulation=options.accumulation,
                micro_tokens=options.micro_sequences * options.sequence_length,
                scope=variant,
                balance_ms=round(balance_ms, 3),
                balance_share=round(balance_ms / statistics.median(none_ms), 5),
                counting_ms=round(statistics.median(counting[WARMUP_ROUNDS:]) if variant == "exact" else 0.0, 2),
                step_ms=round(statistics.median(step_ms), 2),
                step_to_none=round(statistics.median(a / b for a, b in zip(step_ms, none_ms, strict=True)), 4),
            )
        )
    return rows


def main(options: Options) -> None:
    """Time, print, and add to the results if a machine is named."""
    torch.set_num_threads(1)  # the clock sees one thread
    rows = bench(options)
    table = Table("scope", "balance ms", "share", "counting ms", "step ms", "to none", box=None, pad_edge=False)
    for row in rows:
        counting = f"{row.counting_ms:.0f}" if row.counting_ms else "-"
        share = f"{row.balance_share:.2%}"
        table.add_row(
            row.scope, f"{row.balance_ms:.1f}", share, counting, f"{row.step_ms:.0f}", f"{row.step_to_none:.3f}"
        )
    Console().print(table)
    if options.machine:
        append_rows(RESULTS / f"balance_{options.machine}.csv", rows)


if __name__ == "__main__":
    main(tyro.cli(Options))
