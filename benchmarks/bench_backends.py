"""Time every expert backend that runs here, and the implementations of others, after checking their answers.

    python benchmarks/bench_backends.py                            # prints a table
    python benchmarks/bench_backends.py --machine cpu_2core_epyc   # adds rows to results/backends_cpu_2core_epyc.csv
    python benchmarks/bench_backends.py --device cuda --shapes olmoe_1b_7b --tokens 2048 8192 32768 --dtypes bf16
    python benchmarks/bench_backends.py --saved                    # only prints the bytes kept per token

On a CPU every timed call gets a routing of its own, as every training step does: what is slow on row counts it has
not met shows it. Contenders take turns within a round, so that a busy machine slows all alike; `dense` is one dense
product of as many FLOPs. On CUDA one routing is timed, each contender by itself and for as long as --repeat-ms says,
with the L2 cache flushed before every pass; its line is printed when it is done, the table at the end.

Answers are checked against the reference in float64: on a CPU on a few tokens of the same widths, as it goes row by
row; on CUDA on the very case that is timed. So tuners meet no other sizes than those that are timed, and an offset
too large for its type shows.

Contenders: BACKENDS, and peers.py.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import tyro
from cuda_timing import peak_mib, time_on_cuda
from layers import CARD, LAYERS, Layer, least_ms
from peers import PEERS, Request, compiling_in_parallel
from result_rows import append_rows, describe_device, print_rows, provenance
from torch import Tensor

from moe_kernels.backends import BACKENDS, ExpertsBackend
from moe_kernels.testing import (
    Case,
    Result,
    assert_close,
    call,
    leaves_of,
    make_case,
    make_rows,
    run,
    run_reference,
    run_reference_by_expert,
    saved_bytes,
)

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 3e-6, "bf16": 1e-2}
# per row, times D x F: three products of that size forward, twice as many backward
FLOPS = {"forward": 6, "backward": 12}
WARMUP_ROUNDS = 2
CHECKED_TOKENS = 64  # on a CPU, where the reference goes row by row

SHAPES = {
    "quickstart": Layer(T=1024, D=256, F=256, E=16, K=2),
    "olmoe_small": Layer(T=2048, D=512, F=256, E=64, K=8),  # OLMoE-1B-7B's routing at a quarter of its widths
    **LAYERS,
}
Times = dict[str, list[dict[str, float]]]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is measured of one contender: milliseconds by mode, one entry per call, and the memory it takes."""

    times: list[dict[str, float]]
    saved_mib: float | None = None
    peak_mib: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of results: one contender, one shape, forward or backward. Empty: not measured there."""

    date: str
    commit: str
    device: str
    driver: str
    torch: str
    triton: str
    threads: int
    clock: str
    dtype: str
    T: int
    D: int
    F: int
    E: int
    K: int
    skew: str
    backend: str
    mode: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    ratio_to_naive: float | None
    gflops: float
    percent_of_dense: float | None
    percent_of_least: float | None
    saved_mib: float | None
    peak_mib: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Time the expert backends and their peers."""

    machine: str = ""
    """Name of the kind of machine: rows are added to results/backends_<machine>.csv. Empty: only print."""
    shapes: tuple[str, ...] = ("quickstart", "olmoe_small")
    """Names in SHAPES: the two small ones, and the layers of published models (layers.py) for GPUs."""
    tokens: tuple[int, ...] = ()
    """Numbers of tokens in the place of each shape's own."""
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    skews: tuple[Literal["random", "balanced", "skewed", "heavy"], ...] = ("random", "skewed")
    """random: every expert as likely; balanced: in turn; skewed: very unequal, and differently so in every round;
    heavy: one expert gets half the rows, the others as in random."""
    backends: tuple[str, ...] = ()
    """Names of contenders; empty: all that run here."""
    rounds: int = 15
    """Timed calls of each contender on a CPU."""
    repeat_ms: float = 200
    """For how long each contender is timed on CUDA, forward and backward together."""
    device: str = "cpu"
    threads: int = dataclasses.field(default_factory=torch.get_num_threads)
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: the time this thread spends on a core, for machines that others use too; needs --threads 1."""
    saved: bool = False
    """Print the bytes that each contender keeps per token for the backward pass, and nothing else."""


def draw_rows(skew: str, shape: Layer, generator: torch.Generator) -> Tensor:
    """Return expert_N of a fresh routing."""
    _, expert_N = make_rows("random" if skew == "heavy" else skew, T=shape.T, E=shape.E, K=shape.K, generator=generator)
    if skew == "heavy":
        expert_N[::2] = 0
    return expert_N


def draw_case(skew: str, shape: Layer, dtype: str, device: torch.device) -> Case:
    """Return a case of that skew."""
    case = make_case(**shape._asdict(), dtype=DTYPES[dtype], device=device, drawn_on=device)
    return dataclasses.replace(case, expert_N=draw_rows(skew, shape, torch.Generator().manual_seed(1)).to(device))


def note(device: torch.device, text: str) -> None:
    """Print what is going on, at once, where minutes are dear: a run that is cut short has said how far it came."""
    if device.type == "cuda":
        print(f"  {text}", flush=True)


def refuse_unknown(wanted: tuple[str, ...]) -> None:
    """Raise ValueError if one of the names is no contender's."""
    unknown = sorted(set(wanted) - {*BACKENDS, *PEERS})
    if unknown:
        raise ValueError(f"no contender is called {', '.join(unknown)}; known are {', '.join([*BACKENDS, *PEERS])}")


def checked_case(case: Case, shape: Layer, dtype: str, skew: str) -> tuple[Case, Result]:
    """Return the case that answers are checked on, and the truth for it."""
    if case.x_TD.is_cuda:
        return case, run_reference_by_expert(case)
    few = draw_case(skew, shape._replace(T=min(shape.T, CHECKED_TOKENS)), dtype, case.x_TD.device)
    return few, run_reference(few)


def contenders(
    request: Request, checked: tuple[Case, Result], dtype: str, wanted: tuple[str, ...], skipped: dict[str, str]
) -> Iterator[tuple[str, ExpertsBackend]]:
    """Yield what runs here, output and gradients equal to the reference, by name; add to `skipped` why others do not.

    They come one after another, each checked when it is asked for.
    """
    case, expected = checked
    for name in (name for name in (*BACKENDS, *PEERS) if not wanted or name in wanted):
        if name in BACKENDS:
            reason = BACKENDS[name].refusal(device=request.device, dtype=request.dtype, widths=(request.D, request.F))
        else:
            reason = PEERS[name][0](request)
        if reason is not None:
            skipped[name] = reason
            continue
        note(request.device, f"{name} is built, tuned and checked")
        try:
            contender = BACKENDS[name] if name in BACKENDS else PEERS[name][1](request)
            with compiling_in_parallel(request.device):
                result = run(contender, case)
            assert_close(result, expected, tolerance=TOLERANCE[dtype])
            del result
        except Exception as error:  # a foreign adapter may fail in any way; our own must not, but by lack of memory
            if name in BACKENDS and not isinstance(error, torch.OutOfMemoryError):
                raise
            skipped[name] = first_line(error)
            note(request.device, f"{name} is left out: {skipped[name]}")
            continue
        yield name, contender


def first_line(error: Exception) -> str:
    """Return kind and first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def time_once(contender: ExpertsBackend, case: Case, clock: str) -> dict[str, float]:
    """Return the milliseconds of one forward and one backward pass, by mode."""
    now = time.thread_time if clock == "cpu" else time.perf_counter
    leaves = leaves_of(case)
    start = now()
    y_TD = call(contender, case, leaves)
    middle = now()
    torch.autograd.grad(y_TD, leaves, case.dy_TD)
    end = now()
    return {"forward": (middle - start) * 1e3, "backward": (end - middle) * 1e3}


def time_dense(shape: Layer, dtype: torch.dtype, clock: str) -> dict[str, float]:
    """Return the milliseconds of one product [T K, D] x [D, 3F], and of [T K, D] x [D, 6F]: as many FLOPs by mode."""
    now = time.thread_time if clock == "cpu" else time.perf_counter
    x_ND = torch.randn(shape.T * shape.K, shape.D).to(dtype)
    times = {}
    for mode, multiple in (("forward", 3), ("backward", 6)):
        weight_OD = torch.randn(multiple * shape.F, shape.D).to(dtype)
        out_NO = torch.zeros(x_ND.shape[0], multiple * shape.F, dtype=dtype)
        start = now()
        torch.mm(x_ND, weight_OD.T, out=out_NO)
        times[mode] = (now() - start) * 1e3
    return times


def time_in_turns(running: dict[str, ExpertsBackend], case: Case, shape: Layer, skew: str, options: Options) -> Times:
    """Return the timings of every contender, one entry per round. Each call gets fresh rows; turns rotate."""
    names = [*running, "dense"]
    timings: Times = {name: [] for name in names}
    generator = torch.Generator().manual_seed(1)
    for turn in range(WARMUP_ROUNDS + options.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name == "dense":
                timings[name].append(time_dense(shape, case.x_TD.dtype, options.clock))
                continue
            fresh = dataclasses.replace(case, expert_N=draw_rows(skew, shape, generator))
            timings[name].append(time_once(running[name], fresh, options.clock))
    return {name: rows[WARMUP_ROUNDS:] for name, rows in timings.items()}


def measure_on_cuda(
    running: Iterator[tuple[str, ExpertsBackend]], case: Case, options: Options, skipped: dict[str, str]
) -> dict[str, Measured]:
    """Return what is measured of every contender that gets through; the others are added to `skipped`."""
    measured: dict[str, Measured] = {}
    start = time.perf_counter()
    for name, contender in running:
        checked_after = time.perf_counter() - start
        try:
            times = time_on_cuda(contender, case, options.repeat_ms)
            entry = Measured(times, round(saved_bytes(contender, case) / 2**20, 2), peak_mib(contender, case))
        except Exception as error:  # too large for the card, or a foreign adapter that fails: named, and left out
            if name in BACKENDS and not isinstance(error, torch.OutOfMemoryError):
                raise
            skipped[name] = first_line(error)
            torch.cuda.empty_cache()
            continue
        measured[name] = entry
        forward_ms, backward_ms = (statistics.median(time[mode] for time in times) for mode in FLOPS)
        note(
            torch.device(options.device),
            f"{name:<24} forward {forward_ms:.3f} ms, backward {backward_ms:.3f} ms, {len(times)} passes, "
            f"saved {entry.saved_mib} MiB, peak {entry.peak_mib} MiB; built and checked in {checked_after:.1f} s, "
            f"measured in {time.perf_counter() - start - checked_after:.1f} s",
        )
        start = time.perf_counter()
    return measured


def paired(rows: list[dict[str, float]], others: list[dict[str, float]] | None, mode: str) -> float | None:
    """Return the median over the rounds of the first time divided by the second; on CUDA, there are no rounds."""
    if others is None:
        return None
    if len(rows) != len(others):
        return statistics.median(row[mode] for row in rows) / statistics.median(other[mode] for other in others)
    return statistics.median(row[mode] / other[mode] for row, other in zip(rows, others, strict=True))


def bench(shape: Layer, dtype: str, skew: str, options: Options) -> tuple[list[Row], dict[str, str]]:
    """Return the rows of all contenders on one shape, checked before they are timed, and why others are missing."""
    device = torch.device(options.device)
    is_cuda = device.type == "cuda"
    refuse_unknown(options.backends)
    if is_cuda:
        print(f"\n{shape} {dtype} {skew}", flush=True)
    start = time.perf_counter()
    case = draw_case(skew, shape, dtype, device)
    checked = checked_case(case, shape, dtype, skew)
    request = Request(**shape._asdict(), dtype=DTYPES[dtype], device=device)
    skipped: dict[str, str] = {}
    running = contenders(request, checked, dtype, options.backends, skipped)
    if is_cuda:
        torch.cuda.synchronize()
        note(device, f"case and reference after {time.perf_counter() - start:.1f} s")
        measured = measure_on_cuda(running, case, options, skipped)
    else:
        on_cpu = dict(running)
        timings = time_in_turns(on_cpu, case, shape, skew, options)
        saved = {name: round(saved_bytes(contender, case) / 2**20, 2) for name, contender in on_cpu.items()}
        measured = {name: Measured(times, saved.get(name)) for name, times in timings.items()}
    is_measured_card = is_cuda and CARD in describe_device(device)
    rows, place = [], provenance(device)
    for name, entry in measured.items():
        for mode, flops in FLOPS.items():
            ordered = sorted(times[mode] for times in entry.times)
            p20_ms, p50_ms, p80_ms = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))
            others = (measured.get(other) for other in ("naive", "dense"))
            to_naive, to_dense = (paired(entry.times, other and other.times, mode) for other in others)
            row = Row(
                **place,
                threads=options.threads,
                clock="cuda" if is_cuda else options.clock,
                dtype=dtype,
                **shape._asdict(),
                skew=skew,
                backend=name,
                mode=mode,
                p20_ms=round(p20_ms, 3),
                p50_ms=round(p50_ms, 3),
                p80_ms=round(p80_ms, 3),
                ratio_to_naive=None if to_naive is None else round(to_naive, 3),
                gflops=round(flops * shape.T * shape.K * shape.D * shape.F / p50_ms / 1e6, 1),
                percent_of_dense=None if to_dense is None else round(100 / to_dense, 1),
                percent_of_least=round(100 * least_ms(shape, mode) / p50_ms, 1) if is_measured_card else None,
                saved_mib=entry.saved_mib,
                peak_mib=entry.peak_mib,
            )
            rows.append(row)
    return rows, skipped


def print_saved(shape: Layer, dtype: str, options: Options) -> None:
    """Print the bytes that every contender keeps per token for the backward pass, beside its arguments."""
    device = torch.device(options.device)
    refuse_unknown(options.backends)
    case = draw_case("random", shape, dtype, device)
    checked = checked_case(case, shape, dtype, "random")
    request = Request(**shape._asdict(), dtype=DTYPES[dtype], device=device)
    skipped: dict[str, str] = {}
    print(f"\n{shape} {dtype}: bytes kept per token, beside x, the weights and the routing")
    for name, contender in contenders(request, checked, dtype, options.backends, skipped):
        print(f"  {name:<24} {saved_bytes(contender, case) / shape.T:>12,.0f}")
    for name, reason in skipped.items():
        print(f"  {name:<24} skipped: {reason}")


def main(options: Options) -> None:
    """Check, time, print, and add to the results if a machine is named."""
    if options.clock == "cpu" and (options.threads != 1 or options.device != "cpu"):
        raise ValueError(f"--clock cpu sees one CPU thread, not {options.threads} on {options.device}; use --threads 1")
    unknown = sorted(set(options.shapes) - set(SHAPES))
    if unknown:
        raise ValueError(f"no shape is called {', '.join(unknown)}; known are {', '.join(SHAPES)}")
    torch.set_num_threads(options.threads)
    shapes = [SHAPES[name]._replace(T=T) for name in options.shapes for T in options.tokens or (SHAPES[name].T,)]
    for shape in shapes:
        for dtype in options.dtypes:
            if options.saved:
                print_saved(shape, dtype, options)
                continue
            for skew in options.skews:
                rows, skipped = bench(shape, dtype, skew, options)
                clock = f"{options.threads} threads, {options.clock} time" if options.device == "cpu" else "CUDA events"
                print_rows(f"{shape} {dtype} {skew}, {clock}", rows, skipped)
                if options.machine:
                    append_rows(RESULTS / f"backends_{options.machine}.csv", rows)


if __name__ == "__main__":
    main(tyro.cli(Options))
