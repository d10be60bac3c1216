"""What the studies of single papers share: two kinds of text, a small model, a training loop, rows and a table.

Text, both kinds over the same 64 tokens, one kind per sequence:

    easy    the next token is a function of this one
    hard    the next token is one of four, equally likely, which four depends on the last two: 1.39 nats at best

So a router that spends experts where they are needed has something to spend them on. Plain torch on one process: the
studies compare routers, and what the engine adds is the same for all of them.
"""

import csv
import dataclasses
import datetime
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moe.balance.load import BalanceConfig, GlobalLoad
from moe.balance.statistics import collect
from moe.initial import initialise
from moe.model import Model, ModelConfig
from moe.parallel.groups import ParallelGroups
from moe.routers import RouterConfig
from moe.routing import RouterContext
from moe.train.loss import language_model_loss, micro_batch_loss
from moe.train.optimizer import parameter_groups
from moe.train.schedule import ScheduleConfig
from moe.train.step import end_routers_step

ROOT = Path(__file__).parents[2]
VOCABULARY, SEQUENCE, SEQUENCES = 64, 64, 32  # of a step; half of the sequences are easy
VALIDATION = 64  # sequences of each kind
HARD_CHOICES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One thing to train: a router, how many experts there are, and the losses on routing."""

    router: RouterConfig
    num_experts: int = 8
    num_experts_per_tok: int = 2
    balance: BalanceConfig = dataclasses.field(default_factory=lambda: BalanceConfig(coefficient=0.01))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One run. Losses in nats on held-out text; experts are real ones run per token and layer."""

    date: str
    commit: str
    torch: str
    steps: int
    variant: str
    seed: int
    loss: float
    loss_easy: float
    loss_hard: float
    experts_first: float  # mean over the first step
    experts_last: float  # mean over the last 50 steps
    experts_easy: float  # on held-out text
    experts_hard: float
    experts_std: float  # over tokens, on held-out text
    load_violation: float  # max / mean - 1 of a step, mean over the last 50
    step_ms: float  # median, time on the core


def make_text(seed: int, num_sequences: int) -> Tensor:
    """Return int64 [2, num_sequences, SEQUENCE + 1]: easy, then hard."""
    draw = torch.Generator().manual_seed(seed)
    next_V = torch.randperm(VOCABULARY, generator=draw)
    next_VVC = torch.rand(VOCABULARY, VOCABULARY, VOCABULARY, generator=draw).topk(HARD_CHOICES).indices
    easy = [torch.randint(VOCABULARY, (num_sequences,), generator=draw)]
    hard = [torch.randint(VOCABULARY, (num_sequences,), generator=draw) for _ in range(2)]
    for _ in range(SEQUENCE):
        easy.append(next_V[easy[-1]])
        choice = torch.randint(HARD_CHOICES, (num_sequences,), generator=draw)
        hard.append(next_VVC[hard[-2], hard[-1], choice])
    return torch.stack((torch.stack(easy, 1), torch.stack(hard[1:], 1)))


def make_model(variant: Variant, seed: int) -> Model:
    """Return a two-layer model of width 64 with the first weights of `seed`."""
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=SEQUENCE,
        tie_word_embeddings=False,
        num_experts=variant.num_experts,
        num_experts_per_tok=variant.num_experts_per_tok,
        moe_intermediate_size=64,
        router=variant.router,
    )
    model = Model(config, groups=ParallelGroups.single())
    initialise(model, seed=seed)
    return model


def train(name: str, variant: Variant, seed: int, steps: int, report: Callable[[str], None]) -> Row:
    """Train one model and return its figures. Variants of a seed share text, order and, by name, first weights."""
    per_step = SEQUENCES // 2
    text = make_text(seed, steps * per_step + VALIDATION)
    model, load = make_model(variant, seed), GlobalLoad(scope="micro", group=None)
    schedule = ScheduleConfig(kind="cosine", warmup_steps=20, min_ratio=0.1)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), betas=(0.9, 0.95))
    num_tokens = SEQUENCES * SEQUENCE
    position_T = torch.arange(num_tokens)
    experts, violations, times_ms = [], [], []
    for step in range(steps):
        batch = text[:, step * per_step : (step + 1) * per_step].flatten(0, 1)
        context = RouterContext(seed=seed, step=step, progress=step / steps, position_T=position_T)
        start = time.thread_time()
        logits_BSV, routings = model(batch[:, :-1], context=context)
        label_BS = batch[:, 1:]
        terms = micro_batch_loss(
            lm_sum=language_model_loss(logits_BSV, label_BS, torch.ones_like(label_BS, dtype=torch.bool)),
            statistics=collect(routings),
            load=load,
            balance=variant.balance,
            num_tokens=num_tokens,
        )
        terms.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * schedule.factor(step, steps=steps)
        optimizer.step()
        optimizer.zero_grad()
        counts_LE = load.end_step()
        end_routers_step(model, counts_LE, context, num_tokens=num_tokens)
        times_ms.append((time.thread_time() - start) * 1e3)
        experts.append(counts_LE.sum().item() / counts_LE.shape[0] / num_tokens)
        violations.append((counts_LE.amax(-1) / counts_LE.double().mean(-1) - 1).mean().item())
        if (step + 1) % 100 == 0:
            report(f"{name} seed {seed} step {step + 1}: lm {terms.lm.item():.3f}, experts {experts[-1]:.2f}")
    losses, easy, hard, std = validate(model, text[:, -VALIDATION:])
    return Row(
        date=datetime.date.today().isoformat(),
        commit=current_commit(),
        torch=torch.__version__,
        steps=steps,
        variant=name,
        seed=seed,
        loss=round(statistics.mean(losses), 5),
        loss_easy=round(losses[0], 5),
        loss_hard=round(losses[1], 5),
        experts_first=round(experts[0], 4),
        experts_last=round(statistics.mean(experts[-50:]), 4),
        experts_easy=round(easy, 4),
        experts_hard=round(hard, 4),
        experts_std=round(std, 4),
        load_violation=round(statistics.mean(violations[-50:]), 4),
        step_ms=round(statistics.median(times_ms), 2),
    )


@torch.no_grad()
def validate(model: Model, text: Tensor) -> tuple[list[float], float, float, float]:
    """Return the loss of each kind, the mean experts of a token of each, and their spread over all tokens."""
    model.eval()
    losses, counts = [], []
    for sequences in text:
        logits_BSV, routings = model(sequences[:, :-1])
        label_BS = sequences[:, 1:]
        total = language_model_loss(logits_BSV, label_BS, torch.ones_like(label_BS, dtype=torch.bool))
        losses.append(total.item() / label_BS.numel())
        used = [r.assignment.token_N[r.assignment.expert_N < r.assignment.num_experts] for r in routings]
        counts.append(torch.stack([torch.bincount(token_N, minlength=label_BS.numel()) for token_N in used]).double())
    model.train()
    easy, hard = counts
    return losses, easy.mean().item(), hard.mean().item(), torch.cat((easy, hard), 1).std(1).mean().item()


def current_commit() -> str:
    """Return the commit checked out, marked if files differ from it."""
    git = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or "none"


def study(variants: dict[str, Variant], path: Path, *, seeds: tuple[int, ...], steps: int, resume: bool) -> list[Row]:
    """Train every variant with every seed, seed by seed, append rows to a CSV file and return all of them.

    With `resume`, runs of as many steps that the file holds already are taken from it.
    """
    torch.set_num_threads(1)
    console = Console()
    known = {(row.variant, row.seed): row for row in read(path) if row.steps == steps} if resume else {}
    rows = []
    for seed in seeds:
        for name, variant in variants.items():
            row = known.get((name, seed))
            if row is None:
                row = train(name, variant, seed, steps, console.log)
                append(path, row)
            rows.append(row)
    show(console, rows)
    return rows


def read(path: Path) -> list[Row]:
    """Return the rows of a CSV file, none if there is no file."""
    if not path.exists():
        return []
    kinds: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(Row)}
    with path.open(newline="") as file:
        return [Row(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]


def append(path: Path, row: Row) -> None:
    """Add a row to a CSV file."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(dataclasses.asdict(row))


def show(console: Console, rows: list[Row]) -> None:
    """Print mean and spread over seeds: a line per figure, a column per variant."""
    names = list(dict.fromkeys(row.variant for row in rows))
    table = Table("", *names, box=None, pad_edge=False)
    for figure in (field.name for field in dataclasses.fields(Row) if field.type is float):
        cells = []
        for name in names:
            values = [getattr(row, figure) for row in rows if row.variant == name]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} +-{spread:.3f}")
        table.add_row(figure.replace("_", " "), *cells)
    console.print(table)
