"""Time every expert backend that runs here, and the implementations of others, after checking their answers.

    python benchmarks/bench_backends.py                            # prints a table
    python benchmarks/bench_backends.py --machine cpu_2core_epyc   # adds rows to results/backends_cpu_2core_epyc.csv
    python benchmarks/bench_backends.py --device cuda --shapes olmoe_1b_7b --tokens 2048 8192 32768 --dtypes bf16
    python benchmarks/bench_backends.py --saved                    # only prints the bytes kept per token

On a CPU every timed call gets a routing of its own, as every training step does: what is slow on row counts it has
not met shows it. Contenders take turns within a round, so that a busy machine slows all alike; `dense` is one dense
product of as many FLOPs. On CUDA triton's do_bench times one routing, with the L2 cache flushed between the calls.

Contenders: BACKENDS, and peers.py. The CUDA half has never been run.
"""

import dataclasses
import datetime
import statistics
import time
from pathlib import Path
from typing import Literal

import torch
import tyro
from layers import LAYERS, Layer, least_ms
from peers import PEERS, Request
from result_rows import append_rows, current_commit, describe_device, driver, print_rows, triton_version
from torch import Tensor

from moe_kernels.backends import BACKENDS, ExpertsBackend
from moe_kernels.testing import (
    Case,
    assert_close,
    call,
    leaves_of,
    make_case,
    make_rows,
    rms_ratio,
    run,
    run_reference,
    saved_bytes,
)

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 3e-6, "bf16": 1e-2}
# per row, times D x F: three products of that size forward, twice as many backward
FLOPS = {"forward": 6, "backward": 12}
WARMUP_ROUNDS = 2
CHECKED_TOKENS = 64  # the reference goes row by row, so answers are checked on the same widths with fewer tokens

SHAPES = {
    "quickstart": Layer(T=1024, D=256, F=256, E=16, K=2),
    "olmoe_small": Layer(T=2048, D=512, F=256, E=64, K=8),  # OLMoE-1B-7B's routing at a quarter of its widths
    **LAYERS,
}
Times = dict[str, list[dict[str, float]]]


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
    case = make_case(T=shape.T, D=shape.D, F=shape.F, E=shape.E, K=shape.K, dtype=DTYPES[dtype], device=device)
    return dataclasses.replace(case, expert_N=draw_rows(skew, shape, torch.Generator().manual_seed(1)).to(device))


def contenders(
    shape: Layer, dtype: str, skew: str, device: torch.device, wanted: tuple[str, ...]
) -> tuple[dict[str, ExpertsBackend], dict[str, str]]:
    """Return what runs here, output and gradients equal to the reference, by name, and why the others are left out."""
    unknown = sorted(set(wanted) - {*BACKENDS, *PEERS})
    if unknown:
        raise ValueError(f"no contender is called {', '.join(unknown)}; known are {', '.join([*BACKENDS, *PEERS])}")
    request = Request(**shape._asdict(), dtype=DTYPES[dtype], device=device)
    checked = draw_case(skew, shape._replace(T=min(shape.T, CHECKED_TOKENS)), dtype, device)
    expected = run_reference(checked)
    running: dict[str, ExpertsBackend] = {}
    skipped: dict[str, str] = {}
    for name in (name for name in (*BACKENDS, *PEERS) if not wanted or name in wanted):
        if name in BACKENDS:
            reason = BACKENDS[name].refusal(device=device, dtype=DTYPES[dtype], widths=(shape.D, shape.F))
        else:
            reason = PEERS[name][0](request)
        if reason is not None:
            skipped[name] = reason
            continue
        try:
            contender = BACKENDS[name] if name in BACKENDS else PEERS[name][1](request)
            assert_close(run(contender, checked), expected, tolerance=TOLERANCE[dtype])
        except Exception as error:  # a foreign adapter may fail in any way; our own must not
            if name in BACKENDS:
                raise
            skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        running[name] = contender
    return running, skipped


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


def time_on_cuda(contender: ExpertsBackend, case: Case, first_y_TD: Tensor | None, dtype: str) -> tuple[Times, Tensor]:
    """Return p20, p50 and p80 in three entries, and y; raises AssertionError if y is not that of the first one."""
    from triton.testing import do_bench

    leaves = leaves_of(case)
    y_TD = call(contender, case, leaves)
    if first_y_TD is not None:  # the answer was checked on few tokens: here, too large an offset would show
        ratio = rms_ratio(y_TD.detach(), first_y_TD)
        assert ratio <= 2 * TOLERANCE[dtype], f"y differs from that of the first contender by {ratio:.1e}"
    quantiles = [0.2, 0.5, 0.8]
    forward = do_bench(lambda: call(contender, case, leaves), warmup=100, rep=400, quantiles=quantiles)
    backward = do_bench(
        lambda: torch.autograd.grad(y_TD, leaves, case.dy_TD, retain_graph=True),
        warmup=100,
        rep=400,
        quantiles=quantiles,
    )
    entries = [{"forward": f, "backward": b} for f, b in zip(forward, backward, strict=True)]
    return {"times": entries}, y_TD.detach()


def peak_mib(contender: ExpertsBackend, case: Case) -> float | None:
    """Return how far one forward and backward pass raises the memory in use, on CUDA."""
    if not case.x_TD.is_cuda:
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(contender, case)
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)


def time_all_on_cuda(running: dict[str, ExpertsBackend], case: Case, dtype: str, skipped: dict[str, str]) -> Times:
    """Return the timings of every contender that gets through; the others are added to `skipped`."""
    timings: Times = {}
    first_y_TD = None
    for name, contender in running.items():
        try:
            timing, y_TD = time_on_cuda(contender, case, first_y_TD, dtype)
        except Exception as error:  # too large for the card, or a foreign adapter that fails: named, and left out
            if name in BACKENDS and not isinstance(error, torch.OutOfMemoryError):
                raise
            skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            torch.cuda.empty_cache()
            continue
        timings[name], first_y_TD = timing["times"], y_TD if first_y_TD is None else first_y_TD
    return timings


def paired(rows: list[dict[str, float]], others: list[dict[str, float]] | None, mode: str) -> float | None:
    """Return the median over the rounds of the first time divided by the second."""
    if others is None:
        return None
    return statistics.median(row[mode] / other[mode] for row, other in zip(rows, others, strict=True))


def bench(shape: Layer, dtype: str, skew: str, options: Options) -> tuple[list[Row], dict[str, str]]:
    """Return the rows of all contenders on one shape, checked before they are timed, and why others are missing."""
    device = torch.device(options.device)
    is_cuda = device.type == "cuda"
    running, skipped = contenders(shape, dtype, skew, device, options.backends)
    case = draw_case(skew, shape, dtype, device)
    if is_cuda:
        timings = time_all_on_cuda(running, case, dtype, skipped)
    else:
        timings = time_in_turns(running, case, shape, skew, options)
    rows = []
    for name, times in timings.items():
        contender = running.get(name)
        saved = None if contender is None else round(saved_bytes(contender, case) / 2**20, 2)
        peak = None if contender is None else peak_mib(contender, case)
        for mode, flops in FLOPS.items():
            ordered = sorted(entry[mode] for entry in times)
            p20_ms, p50_ms, p80_ms = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))
            to_naive, to_dense = (paired(times, timings.get(other), mode) for other in ("naive", "dense"))
            row = Row(
                date=datetime.date.today().isoformat(),
                commit=current_commit(),
                device=describe_device(device),
                driver=driver() if is_cuda else "",
                torch=torch.__version__,
                triton=triton_version(),
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
                percent_of_least=round(100 * least_ms(shape, mode) / p50_ms, 1) if is_cuda else None,
                saved_mib=saved,
                peak_mib=peak,
            )
            rows.append(row)
    return rows, skipped


def print_saved(shape: Layer, dtype: str, options: Options) -> None:
    """Print the bytes that every contender keeps per token for the backward pass, beside its arguments."""
    device = torch.device(options.device)
    running, skipped = contenders(shape, dtype, "random", device, options.backends)
    case = draw_case("random", shape, dtype, device)
    print(f"\n{shape} {dtype}: bytes kept per token, beside x, the weights and the routing")
    for name, contender in running.items():
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
