"""Time a training step of OLMoE-1B-7B, cut to a few layers, on one GPU, here and in transformers.

    python benchmarks/bench_step_gpu.py                         prints everything
    python benchmarks/bench_step_gpu.py --machine h200          and adds rows to results/step_gpu_h200.csv and
                                                                step_parts_h200.csv, and draws the parts beside them
    python benchmarks/bench_step_gpu.py --tiny                  a toy, on a CPU if need be: whether this script works

All widths, all 64 experts, real routing, 4 sequences of 4,096 random tokens. A step is forward, backward, clipping and
AdamW; it ends when the loss is on the host. Contenders hold the same weights and see the same tokens. They are built
one after the other, ours first; the losses of two steps are compared before transformers' model is timed.

The work is not the same: ours keeps float32 masters and moments and sums gradients in float32; transformers' model, its
gradients and its moments are bfloat16 alone. Ours also counts its experts and computes all the figures of its log.

Ours takes three kinds of steps in turns. Coefficient 0.01 is the step of a recipe. Coefficient 0 does the same work, as
the loss stays in the graph. "none" hides the routings from the step: no statistics, no loss, no figures. So the cost of
the global load-balancing loss, with everything that is logged beside it, is the difference of the first to the last.
"""

import gc
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from result_rows import append_rows, provenance
from step_contenders import Contender, ours, theirs
from step_profile import PartRow, draw, part_rows, print_kernels, print_parts, print_waits, profile, wait_for
from torch import Tensor

from moe.counts import count_parameters, flops_per_token
from moe.model import ModelConfig
from moe.parallel.groups import start_process_group
from moe.presets import olmoe_1b_7b
from moe.train import prepare_environment

RESULTS = Path(__file__).parent / "results"
NOMINAL_TFLOPS = 989.0  # dense bfloat16 of an H100 or H200 SXM, NVIDIA's data sheet without sparsity
TOLERANCE = 5e-3  # of the loss: both models are bfloat16
TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
TINY_STEP = {"layers": 2, "sequences": 2, "length": 16}
Times = dict[float | None, list[float]]  # milliseconds, by balance coefficient


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time training steps on one GPU."""

    layers: int = 4
    sequences: int = 4
    """Of one micro-batch."""
    micro_batches: int = 1
    """Of one step, whose gradients are summed. The published batch has 32 of 4 sequences on each of 8 GPUs."""
    length: int = 4096
    rounds: int = 16
    """Timed steps of each kind."""
    warmup: int = 2
    """Untimed ones of each kind."""
    contenders: tuple[str, ...] = ("ours", "grouped_mm")
    """`ours`, and experts implementations of transformers."""
    profiled: int = 3
    """Profiled steps of each contender; 0 profiles nothing."""
    dense_tflops: float = 0.0
    """Measured speed of a dense product; 0 measures one."""
    machine: str = ""
    """Name of the kind of machine in the names of the files. Empty: only print."""
    results: Path = RESULTS
    """Folder of the files."""
    keep_traces: bool = False
    """Keep the raw profiles in the same folder."""
    tiny: bool = False
    """A toy model and short sequences; runs on a CPU as well."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of results: one kind of step."""

    date: str
    commit: str
    device: str
    driver: str
    torch: str
    triton: str
    transformers: str
    layers: int
    micro_batches: int
    sequences: int  # of the whole step
    length: int
    contender: str
    balance_coefficient: float | None  # None: no statistics either
    p20_ms: float
    p50_ms: float
    p80_ms: float
    tokens_per_s: float
    tflops: float
    mfu_percent: float
    percent_of_dense: float | None
    peak_gib: float | None
    loss: float  # of the second step, before anything was timed
    max_over_mean: float | None  # load of the fullest expert in the last step


def step_flops(config: ModelConfig, *, sequences: int, length: int) -> float:
    """Return the FLOPs of a step: 3 forward passes of every token, as the backward pass costs two.

    A forward pass of a token: 2 for each element of the matrices it meets (attention projections, router, K experts of
    E, head), not those of the embedding table, which is looked up; and 4 H d in each layer for each token it sees, for
    scores and values. Causal: a token sees half the sequence on average. Recomputation is not counted.
    """
    return 3.0 * flops_per_token(config, length) * sequences * length


def expected_memory(config: ModelConfig, tokens: int) -> dict[str, tuple[float, float]]:
    """Return what is expected to fill memory at the start of backward, in GiB: (ours, transformers)."""
    total = count_parameters(config).total
    per_parameter = {
        "weights bf16": (2, 2),
        "masters fp32": (4, 0),
        "moments fp32, bf16": (8, 4),
        "gradients bf16": (2, 2),
        "summed gradients fp32": (4, 0),
    }
    parts = {name: (a * total / 2**30, b * total / 2**30) for name, (a, b) in per_parameter.items()}
    rows = tokens * config.num_experts_per_tok
    # ours keeps of each row the hidden 2F; grouped_mm also the gathered D, the activated F and the output D, twice
    hidden, width = config.moe_intermediate_size, config.hidden_size
    dense = 24 * tokens * width
    ours, theirs = dense + 4 * rows * hidden, dense + rows * (8 * hidden + 6 * width)
    parts["kept for backward"] = (
        config.num_hidden_layers * ours / 2**30,
        config.num_hidden_layers * theirs / 2**30,
    )
    # bf16 and float32, log-probabilities, their gradient
    logits = 14 * tokens * config.vocab_size / 2**30
    parts["logits and loss"] = (logits, logits)
    return parts


def make_config(options: Options) -> ModelConfig:
    """Return OLMoE-1B-7B, or the toy, with as many layers and positions as asked for."""
    changes = TINY if options.tiny else {}
    sizes = {"num_hidden_layers": options.layers, "max_position_embeddings": options.length}
    return replace(olmoe_1b_7b(), **sizes, **changes)


def make_tokens(seed: int, config: ModelConfig, options: Options) -> Tensor:
    """Return random tokens [micro_batches * sequences, length + 1] on the host."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        config.vocab_size, (options.micro_batches * options.sequences, options.length + 1), generator=generator
    )


def dense_tflops(device: torch.device, size: int = 8192, repeats: int = 20) -> float:
    """Return the speed of a dense bfloat16 product of random matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(5):
        wait_for(device)
        started = time.perf_counter()
        for _ in range(repeats):
            a @ b
        wait_for(device)
        times.append((time.perf_counter() - started) / repeats)
    return 2 * size**3 / statistics.median(times) / 1e12


def measure(contender: Contender, rounds: int, tokens: Callable[[int], Tensor], device: torch.device) -> Times:
    """Return milliseconds per step of each kind; kinds take turns, each round in another order."""
    times: Times = {coefficient: [] for coefficient in contender.steps}
    kinds = list(contender.steps.items())
    for index in range(rounds):
        token = tokens(100 + index)
        for coefficient, step in kinds[index % len(kinds) :] + kinds[: index % len(kinds)]:
            wait_for(device)
            started = time.perf_counter()
            contender.last[coefficient] = step(token)
            wait_for(device)
            times[coefficient].append(1000 * (time.perf_counter() - started))
    return times


def check(contender: Contender, tokens: Callable[[int], Tensor], reference: list[float]) -> list[float]:
    """Return the losses of two steps, the second after an update.

    Raises AssertionError if they are not those of `reference`, where there is one.
    """
    step = list(contender.steps.values())[-1]
    losses = [step(tokens(seed)).loss for seed in (0, 1)]
    for loss, expected in zip(losses, reference, strict=False):
        assert abs(loss - expected) <= TOLERANCE * expected, (contender.name, losses, reference)
    return losses


def cost_of_balance(times: Times) -> dict[float, float]:
    """Return how much longer a step takes with each coefficient than without statistics, per cent: median of rounds."""
    plain = times[None]
    return {
        coefficient: 100 * statistics.median((ms - base) / base for ms, base in zip(values, plain, strict=True))
        for coefficient, values in times.items()
        if coefficient is not None
    }


def make_rows(
    contender: Contender, times: Times, stamp: dict[str, Any], *, flops: float, dense: float | None, peak: float | None
) -> list[Row]:
    """Return a row for each kind of step."""
    rows = []
    for coefficient, values in times.items():
        p20, p50, p80 = (statistics.quantiles(values, n=10, method="inclusive")[k] for k in (1, 4, 7))
        tflops = flops / p50 / 1e9
        rows.append(
            Row(
                **stamp,
                transformers=importlib.metadata.version("transformers"),
                contender=contender.name,
                balance_coefficient=coefficient,
                p20_ms=p20,
                p50_ms=p50,
                p80_ms=p80,
                tokens_per_s=1000 * stamp["sequences"] * stamp["length"] / p50,
                tflops=tflops,
                mfu_percent=100 * tflops / NOMINAL_TFLOPS,
                percent_of_dense=100 * tflops / dense if dense else None,
                peak_gib=peak,
                loss=contender.losses[-1],
                max_over_mean=contender.last[coefficient].max_over_mean,
            )
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all contenders share."""

    options: Options
    config: ModelConfig
    device: torch.device
    dense: float | None  # TFLOP/s
    stamp: dict[str, Any]
    started: float

    def say(self, text: str) -> None:
        """Print a line under the seconds since the start."""
        print(f"[{time.perf_counter() - self.started:5.1f} s] {text}", flush=True)

    def build(self, name: str) -> Contender:
        """Return the contender of that name."""
        if name == "ours":
            backend = "segments" if self.device.type == "cpu" else "triton"
            return ours(self.config, self.device, backend, self.options.micro_batches)
        return theirs(self.config, self.device, name, self.options.micro_batches)

    def tokens(self, seed: int) -> Tensor:
        """Return random tokens on the host."""
        return make_tokens(seed, self.config, self.options)

    def run(self, name: str, reference: list[float]) -> tuple[list[float], list[PartRow]]:
        """Build, check, time and profile one contender, write its rows, and return (its losses, rows of its parts)."""
        options, device, on_gpu = self.options, self.device, self.device.type == "cuda"
        before = torch.cuda.memory_allocated(device) if on_gpu else 0
        contender = self.build(name)
        self.say(f"{contender.name}: built")
        contender.losses = check(contender, self.tokens, reference)
        self.say(f"{contender.name}: losses {contender.losses}, before {reference}")
        measure(contender, options.warmup, self.tokens, device)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        times = measure(contender, options.rounds, self.tokens, device)
        peak = (torch.cuda.max_memory_allocated(device) - before) / 2**30 if on_gpu else None
        flops = step_flops(self.config, sequences=self.stamp["sequences"], length=options.length)
        rows = make_rows(contender, times, self.stamp, flops=flops, dense=self.dense, peak=peak)
        self.show(rows, times)
        if options.machine:
            append_rows(options.results / f"step_gpu_{options.machine}.csv", rows)
        parts = self.parts(contender, rows[-1]) if options.profiled else []
        contender.close()
        return contender.losses, parts

    def parts(self, contender: Contender, row: Row) -> list[PartRow]:
        """Return where the time of the steps of `row` goes, printed and written."""
        options = self.options
        trace = options.results / f"trace_{contender.name.replace(' ', '_')}.json" if options.keep_traces else None
        tokens = [self.tokens(1000 + index) for index in range(options.profiled)]
        step = contender.steps[row.balance_coefficient]
        measured = profile(step, tokens, contender.phases, self.device, trace=trace)
        rows = part_rows(measured, step_ms=row.p50_ms, contender=contender.name, **self.stamp)
        self.say(f"{contender.name}: parts of a step of {row.p50_ms:.1f} ms, busy {measured.busy_ms_per_step:.1f} ms")
        print_parts(rows)
        print_kernels(measured)
        if options.machine:
            append_rows(options.results / f"step_parts_{options.machine}.csv", rows)
        print_waits(step, self.tokens(2000), self.device)
        return rows

    def show(self, rows: list[Row], times: Times) -> None:
        """Print the rows, and what the balance costs."""
        for row in rows:
            of_dense = "" if row.percent_of_dense is None else f" {row.percent_of_dense:.1f} % of dense,"
            load = "" if row.max_over_mean is None else f" fullest expert {row.max_over_mean:.2f} of the mean,"
            memory = "" if row.peak_gib is None else f" peak {row.peak_gib:.1f} GiB"
            coefficient = "none" if row.balance_coefficient is None else row.balance_coefficient
            self.say(
                f"{row.contender}, balance {coefficient}: p20 {row.p20_ms:.1f} p50 {row.p50_ms:.1f} p80 "
                f"{row.p80_ms:.1f} ms, {row.tokens_per_s:,.0f} tokens/s, {row.tflops:.0f} TFLOP/s, MFU "
                f"{row.mfu_percent:.1f} %,{of_dense}{load}{memory}"
            )
        if None in times:
            for coefficient, percent in cost_of_balance(times).items():
                self.say(f"a step with balance {coefficient} takes {percent:+.2f} % longer than one without statistics")


def show_expected(config: ModelConfig, options: Options) -> None:
    """Print what the model is, and what is expected to fill memory."""
    counted = count_parameters(config)
    print(
        f"{config.num_hidden_layers} layers, {counted.total / 1e9:.3f} B parameters, {counted.active / 1e9:.3f} active"
    )
    tokens = options.sequences * options.length
    sequences = options.micro_batches * options.sequences
    print(f"{step_flops(config, sequences=sequences, length=options.length) / 1e12:.2f} TFLOP a step")
    parts = expected_memory(config, tokens)
    parts["sum"] = (sum(a for a, _ in parts.values()), sum(b for _, b in parts.values()))
    print(f"{'expected memory, GiB':26s}{'ours':>8s}{'transformers':>14s}")
    for name, (mine, other) in parts.items():
        print(f"{name:26s}{mine:8.1f}{other:14.1f}")


def main(options: Options) -> None:
    """Build, check, time and profile the contenders one after the other."""
    started = time.perf_counter()
    if options.tiny:
        options = replace(options, **TINY_STEP)
    device = start_process_group(timeout_s=120)
    assert options.tiny or device.type == "cuda", "no GPU here; --tiny runs a toy on the CPU"
    # DeepSpeed reads it when it is imported, with our engine
    prepare_environment(device.type)
    config = make_config(options)
    show_expected(config, options)
    dense = options.dense_tflops or (dense_tflops(device) if device.type == "cuda" else None)
    stamp = {
        **provenance(device),
        "layers": options.layers,
        "micro_batches": options.micro_batches,
        "sequences": options.micro_batches * options.sequences,
        "length": options.length,
    }
    bench = Bench(options=options, config=config, device=device, dense=dense, stamp=stamp, started=started)
    bench.say(f"{stamp['device']}, dense product {dense or 0:.0f} TFLOP/s")
    losses: list[float] = []
    parts: list[PartRow] = []
    for name in options.contenders:
        losses, more = bench.run(name, losses)
        parts += more
        # engines and their models hold each other
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            bench.say(f"{torch.cuda.memory_allocated(device) / 2**30:.1f} GiB are still held")
        if options.machine and parts:
            draw(options.results / f"step_{options.machine}.svg", parts)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
