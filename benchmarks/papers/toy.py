"""The small model that studies of single papers train, its loop and its figures.

Plain torch on one process: the studies compare routers, and what the engine adds is the same for all of them. Texts are
those of texts.py. A seed fixes text, order and, by name, first weights; the variants of a seed share them, so losses
are compared seed by seed.
"""

import dataclasses
import datetime
import statistics
import time
from collections.abc import Callable

import torch
from texts import KINDS, SEQUENCE, TEXTS
from torch import Tensor

from moe.balance.load import BalanceConfig, GlobalLoad
from moe.balance.statistics import collect
from moe.blocks.block import end_routers_step
from moe.blocks.chain import ChainConfig
from moe.counts import flops_per_token
from moe.initial import initialise
from moe.model import Model, ModelConfig
from moe.parallel.groups import ParallelGroups
from moe.routers import RouterConfig
from moe.routers.cross_layer import ReuseConfig
from moe.routing import RouterContext
from moe.train.loss import language_model_loss, micro_batch_loss
from moe.train.optimizer import parameter_groups
from moe.train.schedule import ScheduleConfig

SEQUENCES = 16  # of a step, the same number of every kind
VALIDATION = 64  # sequences of each kind
WIDTH, EXPERT_WIDTH = 64, 32
WINDOW = 50  # figures of load and counts are means over the last steps
CURVE = 25  # steps in a point of a curve


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One thing to train: a router, how many experts there are, and the losses on routing."""

    router: RouterConfig
    num_experts: int = 8
    num_experts_per_tok: int = 2
    num_hidden_layers: int = 2
    chain: ChainConfig = dataclasses.field(default_factory=ChainConfig)
    reuse: ReuseConfig = dataclasses.field(default_factory=ReuseConfig)
    balance: BalanceConfig = dataclasses.field(default_factory=lambda: BalanceConfig(scope="micro", coefficient=0.01))
    micro_batches: int = 1
    """Of a step. As many as there are kinds of text: each holds one kind only."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One run. Losses in nats on held-out text; experts are real ones run per token and layer."""

    date: str
    commit: str
    torch: str
    text: str
    steps: int
    variant: str
    seed: int
    loss: float  # mean over kinds
    easiest: str  # kind of the lowest loss
    hardest: str
    loss_easiest: float
    loss_hardest: float
    experts_first: float  # mean over the first step
    experts_last: float  # mean over the last 50 steps
    experts_easiest: float  # on held-out text
    experts_hardest: float
    experts_std: float  # over tokens, on held-out text
    mflops: float  # of a token's forward pass with experts_last experts
    load_violation: float  # max / mean - 1 of a layer's counts in a step, mean over layers and the last 50 steps
    load_tail: float  # the same, 95th percentile
    load_pool: float  # the same of counts summed over the layers that share experts, mean
    step_ms: float  # median, time on the core


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A point of a training curve: means over 25 steps, of which `step` is the last."""

    text: str
    steps: int
    variant: str
    seed: int
    step: int
    loss: float
    experts: float


@dataclasses.dataclass(kw_only=True, slots=True)
class Trace:
    """What every step of a run left."""

    losses: list[float] = dataclasses.field(default_factory=list)
    experts: list[float] = dataclasses.field(default_factory=list)
    counts_SLE: list[Tensor] = dataclasses.field(default_factory=list)
    times_ms: list[float] = dataclasses.field(default_factory=list)

    def points(self, **names: str | int) -> list[Point]:
        """Return the curve."""
        return [
            Point(
                step=start + CURVE,
                loss=round(statistics.mean(self.losses[start : start + CURVE]), 4),
                experts=round(statistics.mean(self.experts[start : start + CURVE]), 3),
                **names,
            )
            for start in range(0, len(self.losses) - CURVE + 1, CURVE)
        ]


def make_config(variant: Variant, vocabulary: int) -> ModelConfig:
    """Return a model of width 64."""
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        num_hidden_layers=variant.num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=SEQUENCE,
        tie_word_embeddings=False,
        num_experts=variant.num_experts,
        num_experts_per_tok=variant.num_experts_per_tok,
        moe_intermediate_size=EXPERT_WIDTH,
        router=variant.router,
        chain=variant.chain,
        reuse=variant.reuse,
    )


def train(
    text: str, name: str, variant: Variant, seed: int, steps: int, *, commit: str, report: Callable[[str], None]
) -> tuple[Row, list[Point]]:
    """Train one model and return its figures and its curve."""
    per_step = SEQUENCES // len(KINDS[text])
    drawn = TEXTS[text](seed, steps * per_step, VALIDATION)
    model = Model(make_config(variant, drawn.vocabulary), groups=ParallelGroups.single())
    initialise(model, seed=seed)
    trace = Trace()
    schedule = ScheduleConfig(kind="cosine", warmup_steps=20, min_ratio=0.1)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), betas=(0.9, 0.95))
    load = GlobalLoad(scope=variant.balance.scope, group=None)
    for step in range(steps):
        batch = drawn.training[:, step * per_step : (step + 1) * per_step].flatten(0, 1)
        context = RouterContext(
            seed=seed, step=step, progress=step / steps, position_T=torch.arange(SEQUENCES * SEQUENCE)
        )
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * schedule.factor(step, steps=steps)
        train_step(model, optimizer, load, variant, batch, context, trace)
        if (step + 1) % 100 == 0:
            report(f"{text} {name} seed {seed} step {step + 1}: {trace.losses[-1]:.3f}, {trace.experts[-1]:.2f}")
    figures = held_out_figures(model, drawn.validation, KINDS[text]) | load_figures(trace, variant.reuse.group_size)
    row = Row(
        date=datetime.date.today().isoformat(),
        commit=commit,
        torch=torch.__version__,
        text=text,
        steps=steps,
        variant=name,
        seed=seed,
        experts_first=round(trace.experts[0], 4),
        experts_last=round(statistics.mean(trace.experts[-WINDOW:]), 4),
        mflops=round(forward_flops(model.config, statistics.mean(trace.experts[-WINDOW:])) / 1e6, 4),
        step_ms=round(statistics.median(trace.times_ms), 2),
        **figures,
    )
    return row, trace.points(text=text, steps=steps, variant=name, seed=seed)


def train_step(
    model: Model,
    optimizer: torch.optim.Optimizer,
    load: GlobalLoad,
    variant: Variant,
    batch: Tensor,
    context: RouterContext,
    trace: Trace,
) -> None:
    """Take one optimizer step on sequences [B, SEQUENCE + 1] and note it."""
    start = time.thread_time()
    num_tokens, loss = batch[:, 1:].numel(), 0.0
    assert context.position_T is not None
    positions = context.position_T.chunk(variant.micro_batches)
    for micro_batch, position_T in zip(batch.chunk(variant.micro_batches), positions, strict=True):
        own = dataclasses.replace(context, position_T=position_T)
        logits_BSV, routings = model(micro_batch[:, :-1], context=own)
        label_BS = micro_batch[:, 1:]
        terms = micro_batch_loss(
            lm_sum=language_model_loss(logits_BSV, label_BS, torch.ones_like(label_BS, dtype=torch.bool)),
            statistics=collect(routings),
            load=load,
            balance=variant.balance,
            num_tokens=num_tokens,
        )
        terms.total.backward()
        loss += terms.lm.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    counts_LE = load.end_step()
    end_routers_step(model, counts_LE, context, num_tokens=num_tokens)
    trace.times_ms.append((time.thread_time() - start) * 1e3)
    trace.losses.append(loss)
    trace.experts.append(counts_LE.sum().item() / len(model.layers) / num_tokens)
    trace.counts_SLE.append(counts_LE)


def forward_flops(config: ModelConfig, experts: float) -> float:
    """Return operations of a token's forward pass if a layer runs `experts` experts on average."""
    of_one = 6 * config.hidden_size * config.moe_intermediate_size * config.num_hidden_layers
    return flops_per_token(config, SEQUENCE) + of_one * (experts - config.chain.rounds * config.mean_experts_per_tok)


def load_figures(trace: Trace, group_size: int) -> dict[str, float]:
    """Return violations max / mean - 1 over the last steps; layers share their experts in groups of `group_size`."""
    counts_SLE = torch.stack(trace.counts_SLE[-WINDOW:]).double()
    pools_SGE = torch.stack([layers.sum(1) for layers in counts_SLE.split(group_size, dim=1)], dim=1)
    of_layers, of_pools = (counts.amax(-1) / counts.mean(-1) - 1 for counts in (counts_SLE, pools_SGE))
    return {
        "load_violation": round(of_layers.mean().item(), 4),
        "load_tail": round(of_layers.quantile(0.95).item(), 4),
        "load_pool": round(of_pools.mean().item(), 4),
    }


@torch.no_grad()
def held_out_figures(model: Model, validation: Tensor, kinds: tuple[str, ...]) -> dict[str, float | str]:
    """Return losses and counts of real experts on held-out text, and which kinds had the lowest and highest loss."""
    model.eval()
    losses, counts = [], []
    for sequences in validation:
        logits_BSV, routings = model(sequences[:, :-1])
        label_BS = sequences[:, 1:]
        total = language_model_loss(logits_BSV, label_BS, torch.ones_like(label_BS, dtype=torch.bool))
        losses.append(total.item() / label_BS.numel())
        used = [r.assignment.token_N[r.assignment.expert_N < r.assignment.num_experts] for r in routings]
        counts_LT = torch.stack([torch.bincount(token_N, minlength=label_BS.numel()) for token_N in used]).double()
        counts.append(counts_LT * model.config.chain.rounds)
    model.train()
    low, high = losses.index(min(losses)), losses.index(max(losses))
    return {
        "loss": round(statistics.mean(losses), 5),
        "easiest": kinds[low],
        "hardest": kinds[high],
        "loss_easiest": round(losses[low], 5),
        "loss_hardest": round(losses[high], 5),
        "experts_easiest": round(counts[low].mean().item(), 4),
        "experts_hardest": round(counts[high].mean().item(), 4),
        "experts_std": round(torch.cat(counts, 1).std(1).mean().item(), 4),
    }
