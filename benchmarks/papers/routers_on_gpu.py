"""The routers of the papers at a size that no CPU reaches: 117 M active parameters, equal tokens, one GPU.

    python benchmarks/papers/routers_on_gpu.py --prepare                   # once, on any machine: 1 minute of one core
    python benchmarks/papers/routers_on_gpu.py --steps 300 --minutes 8     # all five at once, a process each
    python benchmarks/papers/routers_on_gpu.py --plot                      # table, picture, rows in results/
    python benchmarks/papers/routers_on_gpu.py --tiny --steps 6            # the same program in seconds on a CPU

12 layers of width 768, experts of width 384, 8 of 32 a token; parameters by moe.counts, total and active in millions:

    top-k               371.5   116.7   8 of 32, weights normalised (recipes/quickstart.py)
    dynamic confidence  371.5   116.7   up to 16, the mean held at 8 by the threshold (2403.07652)
    chain of experts    371.8   117.0   two rounds of 4 (2506.18945)
    cross-layer reuse   371.8   117.0   8 of 64: pairs of layers share 2 x 32, which open during the run (2510.17483)
    zero experts        371.7   116.9   12 of 32 real and 16 identity ones, the mean of real ones held at 8 (2509.01322)

All get the same text in the same order and, by name, the same first weights. The schedule is one of steps, so a run
that time cuts short is behind, not different: compare at the last step that all have evaluated, as the table does.
Weights of dynamic confidence are not normalised, as in its paper; those of zero experts are scaled so that they sum to
one while the router knows nothing (48 candidates / 12).

The built-in text is small: 10.7 million tokens, of which maths 4.8, C++ 3.3, Python 1.9 and prose 0.7 (library of 3.11,
torch 2.13), each domain a quarter of every batch. 300 steps of 65,536 tokens read maths once and prose seven times.
Where held-out loss turns upwards while training loss falls, the model learns text by heart; the table names the lowest
held-out loss and its step beside the last.

A run writes OUT/NAME.csv a row at a time, and can be killed at any time. Five share one GPU, so tokens per second say
nothing about a run alone.
"""

import dataclasses
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro
from gpu_loop import Figures, Loop, Setup, only_folder
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1]))  # a script finds its own folder, not the one above
from result_rows import append_rows, provenance

from moe.balance.load import BalanceConfig
from moe.blocks.chain import ChainConfig
from moe.data.batching import BatchConfig
from moe.data.store import open_prepared
from moe.model import ModelConfig
from moe.routers.cross_layer import ReuseConfig
from moe.routers.dynamic_confidence import DynamicConfidenceConfig
from moe.routers.topk import TopKConfig
from moe.routers.zero_experts import ZeroExpertsConfig
from moe.train.optimizer import OptimizerConfig
from moe.train.schedule import ScheduleConfig

NAME = "routers_on_gpu"
ROOT = Path(__file__).parents[2]
DOMAINS = ("cpp", "maths", "prose", "python")
BUILTIN_BYTES = 10_000_000  # of each domain, where an installation has so much
BASE = ModelConfig(
    vocab_size=4096,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=12,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    num_experts=32,
    num_experts_per_tok=8,
    moe_intermediate_size=384,
    qk_norm="head",
    router=TopKConfig(norm_topk_prob=True),
)
BATCH = BatchConfig(global_sequences=64, micro_sequences=8, sequence_length=1024)
TINY_BATCH = BatchConfig(global_sequences=4, micro_sequences=2, sequence_length=32)
BALANCE = BalanceConfig(z_coefficient=0.001)  # as in the quickstart


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """A model, and the losses on its routing."""

    model: ModelConfig
    balance: BalanceConfig = BALANCE


CONTENDERS = {
    "top-k": Contender(model=BASE),
    "dynamic_confidence": Contender(
        model=replace(BASE, router=DynamicConfidenceConfig(threshold=0.25, max_k=16, target_experts_per_tok=8.0)),
        balance=replace(BALANCE, entropy_coefficient=1e-4),
    ),
    "chain_of_experts": Contender(model=replace(BASE, num_experts_per_tok=4, chain=ChainConfig(rounds=2))),
    "cross_layer": Contender(model=replace(BASE, reuse=ReuseConfig(group_size=2, schedule="linear"))),
    "zero_experts": Contender(
        model=replace(
            BASE,
            num_experts_per_tok=12,
            router=ZeroExpertsConfig(num_identity_experts=16, target_experts_per_tok=8.0, routed_scaling_factor=4.0),
        )
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A row of a curve. Held-out losses: nan where the step was not evaluated. All else: nan or 0 at step 0."""

    date: str
    commit: str
    device: str
    driver: str
    torch: str
    triton: str
    contender: str
    seed: int
    steps: int  # of the schedule
    step: int
    tokens: int
    epochs: float
    seconds: float
    tokens_per_s: float
    loss: float
    grad_norm: float
    experts_per_token: float
    load_max_over_mean: float
    peak_gib: float
    held_out: float = math.nan  # mean over domains
    cpp: float = math.nan
    maths: float = math.nan
    prose: float = math.nan
    python: float = math.nan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Train the routers of the papers side by side on one GPU."""

    contenders: tuple[str, ...] = tuple(CONTENDERS)
    """Which to train. Several: each in a process of its own, all at once."""
    steps: int = 300
    """Of the schedule; tokens are steps x 65,536."""
    minutes: float = 60.0
    """A run still going then evaluates and ends."""
    seed: int = 0
    micro_sequences: int = 0
    """Of one forward pass; 0 takes 8. More need more memory, fewer more time."""
    learning_rate: float = 1e-3
    log_every: int = 5
    eval_every: int = 50
    eval_sequences: int = 32
    """Held-out sequences of each domain."""
    data: str = "data/routers_on_gpu"
    """Folder that --prepare fills; nothing else may be in it."""
    out: str = "runs/routers_on_gpu"
    """Folder for the curves, a CSV for each contender."""
    prepare: bool = False
    """Only prepare the text."""
    plot: bool = False
    """Only print, draw, and add the rows found in OUT to benchmarks/results."""
    tiny: bool = False
    """Two small layers and short sequences: does the program run?"""


def tiny(model: ModelConfig) -> ModelConfig:
    """Return the model at a size for tests: the same router, two layers of width 32."""
    return replace(
        model,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        moe_intermediate_size=16,
    )


def setup_of(name: str, options: Options) -> Setup:
    """Return the run of a contender."""
    contender = CONTENDERS[name]
    batch = TINY_BATCH if options.tiny else BATCH
    return Setup(
        model=tiny(contender.model) if options.tiny else contender.model,
        balance=contender.balance,
        batch=replace(batch, micro_sequences=options.micro_sequences or batch.micro_sequences),
        optimizer=OptimizerConfig(learning_rate=options.learning_rate),
        schedule=ScheduleConfig(warmup_steps=min(40, options.steps // 4)),
        seed=options.seed,
        steps=options.steps,
        log_every=options.log_every,
        eval_every=options.eval_every,
        eval_sequences=options.eval_sequences,
        seconds=60 * options.minutes,
    )


def train(name: str, options: Options) -> None:
    """Train one contender, a row a point in OUT/NAME.csv. Raises ValueError if that file is there already."""
    path = ROOT / options.out / f"{name}.csv"
    if path.exists():
        raise ValueError(f"{path} holds a run already; move it away, or choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if is_cuda else "cpu")
    data = open_prepared(only_folder(ROOT / options.data), weights={})
    loop = Loop(setup_of(name, options), data, device=device, dtype=torch.bfloat16 if is_cuda else torch.float32)
    place = {
        **provenance(device),
        "contender": name,
        "seed": options.seed,
        "steps": options.steps,
    }

    def report(figures: Figures) -> None:
        point = point_of(figures, place)
        append_rows(path, [point])
        held_out = "" if math.isnan(point.held_out) else f", held out {point.held_out:.4f}"
        print(
            f"{name} {point.step}/{options.steps}: loss {point.loss:.4f}{held_out}, {point.tokens_per_s:,.0f} tokens/s"
            f", {point.experts_per_token:.2f} experts, load {point.load_max_over_mean:.2f}, {point.peak_gib:.1f} GiB",
            flush=True,
        )

    loop.run(report)


def point_of(figures: Figures, place: dict[str, Any]) -> Point:
    """Return the row of a point. Domains that the data lack stay empty."""
    values = dataclasses.asdict(figures)
    held_out = values.pop("held_out")
    if held_out:
        values["held_out"] = round(sum(held_out.values()) / len(held_out), 5)
        values |= {domain: held_out[domain] for domain in DOMAINS if domain in held_out}
    return Point(**place, **values)


def train_all(options: Options) -> int:
    """Start a process for every contender, wait for all, and return how many failed."""
    flags = ["--steps", options.steps, "--minutes", options.minutes, "--seed", options.seed]
    flags += ["--micro-sequences", options.micro_sequences, "--learning-rate", options.learning_rate]
    flags += ["--log-every", options.log_every, "--eval-every", options.eval_every]
    flags += ["--eval-sequences", options.eval_sequences, "--data", options.data, "--out", options.out]
    flags += ["--tiny"] if options.tiny else []
    command = [sys.executable, __file__, *map(str, flags), "--contenders"]
    started = time.perf_counter()
    processes = {name: subprocess.Popen([*command, name]) for name in options.contenders}
    failed = [name for name, process in processes.items() if process.wait() != 0]
    print(f"{len(processes)} runs in {time.perf_counter() - started:.0f} s; failed: {', '.join(failed) or 'none'}")
    return len(failed)


def prepare_text(options: Options) -> None:
    """Tokenise the built-in text, and print how much there is of each domain."""
    from moe.data.prepare import DataConfig, prepare  # brings pyarrow in, which runs do without

    config = DataConfig(cache_dir=str(ROOT / options.data), builtin_bytes=BUILTIN_BYTES, vocab_size=BASE.vocab_size)
    data = prepare(config)
    for domain in data.domains:
        print(f"{domain.name}: {domain.train.num_tokens:,} tokens an epoch, {domain.validation.num_tokens:,} held out")
    print(f"all: {sum(domain.train.num_tokens for domain in data.domains):,} tokens, in {data.directory}")


def plot(options: Options) -> None:
    """Add the rows of OUT to the results, print a table and draw the picture of docs/images."""
    # with what a machine that only trains need not have: matplotlib, and what studies on CPUs import
    from gpu_pictures import draw
    from study import IMAGES, RESULTS, read

    points = [point for path in sorted((ROOT / options.out).glob("*.csv")) for point in read(path, Point)]
    if not points:
        raise ValueError(f"{ROOT / options.out} holds no curves; train first, or name their folder with --out")
    points.sort(key=lambda point: (list(CONTENDERS).index(point.contender), point.step))
    results = RESULTS / f"{NAME}.csv"
    known = {_key(point) for point in read(results, Point)}
    append_rows(results, [point for point in points if _key(point) not in known])
    Console(width=160).print(table_of(points))
    draw(IMAGES / f"{NAME}.svg", points)


def _key(point: Point) -> tuple[Any, ...]:
    # a row read back holds nan, which equals nothing
    return tuple(str(value) for value in dataclasses.astuple(point))


def table_of(points: list[Point]) -> Table:
    """Return the held-out losses at the last step that all have evaluated, and each one's lowest."""
    evaluated = {
        name: {p.step: p for p in points if p.contender == name and not math.isnan(p.held_out)}
        for name in dict.fromkeys(point.contender for point in points)
    }
    common = max(set.intersection(*(set(steps) for steps in evaluated.values())))
    headings = (
        "router",
        "held out",
        *DOMAINS,
        "train",
        "experts",
        "max/mean",
        "tokens/s",
        "GiB",
        "lowest",
        "last step",
    )
    table = Table(*headings, title=f"step {common}", box=None, pad_edge=False)
    for name, steps in evaluated.items():
        here = steps[common]
        lowest = min(steps.values(), key=lambda point: point.held_out)
        losses = (f"{getattr(here, field):.4f}" for field in ("held_out", *DOMAINS, "loss"))
        loads = (f"{here.experts_per_token:.2f}", f"{here.load_max_over_mean:.2f}", f"{here.tokens_per_s:,.0f}")
        last = max(point.step for point in points if point.contender == name)
        table.add_row(
            name, *losses, *loads, f"{here.peak_gib:.1f}", f"{lowest.held_out:.4f} at {lowest.step}", str(last)
        )
    return table


def main(options: Options) -> None:
    """Prepare, plot, or train."""
    unknown = sorted(set(options.contenders) - set(CONTENDERS))
    if unknown:
        raise ValueError(f"no contender is called {', '.join(unknown)}; known are {', '.join(CONTENDERS)}")
    if options.prepare:
        prepare_text(options)
    elif options.plot:
        plot(options)
    elif len(options.contenders) > 1:
        sys.exit(1 if train_all(options) else 0)
    else:
        train(options.contenders[0], options)


if __name__ == "__main__":
    main(tyro.cli(Options))
