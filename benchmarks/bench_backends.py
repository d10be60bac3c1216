"""Time every expert backend that runs here, side by side with the plain loop, after checking its answer.

    python benchmarks/bench_backends.py                            # prints a table
    python benchmarks/bench_backends.py --machine cpu_2core_epyc   # and adds rows to results/cpu_2core_epyc.csv

Every timed call gets a routing of its own, as every training step does: a backend that is slow on row counts it
has not met shows it. Backends take turns within a round, so that a busy machine slows all of them alike.
"""

import csv
import dataclasses
import datetime
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from moe_kernels.backends import BACKENDS, ExpertsBackend
from moe_kernels.testing import (
    Case,
    assert_close,
    call,
    make_case,
    make_rows,
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of one expert layer: tokens, widths, experts, experts per token."""

    T: int
    D: int
    F: int
    E: int
    K: int


SHAPES = {
    "quickstart": Shape(T=1024, D=256, F=256, E=16, K=2),
    "olmoe_small": Shape(T=2048, D=512, F=256, E=64, K=8),  # OLMoE-1B-7B's routing at a quarter of its widths
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of results: one backend, one shape, forward or backward."""

    date: str
    commit: str
    device: str
    torch: str
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
    ratio_to_naive: float
    gflops: float
    saved_mib: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Time the expert backends."""

    machine: str = ""
    """Name of the kind of machine: rows are added to results/<machine>.csv. Empty: only print."""
    shapes: tuple[Literal["quickstart", "olmoe_small"], ...] = ("quickstart", "olmoe_small")
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    skews: tuple[Literal["random", "skewed"], ...] = ("random", "skewed")
    """random: every expert as likely; skewed: very unequal, and differently so in every round."""
    rounds: int = 15
    device: str = "cpu"
    threads: int = dataclasses.field(default_factory=torch.get_num_threads)
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: the time this thread spends on a core, for machines that others use too; needs --threads 1."""


def describe_device(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU and how many threads it runs at once."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x{len(names)}" if names else platform.machine()


def current_commit() -> str:
    """Return the commit checked out, marked "-dirty" if files differ from it, or "none" outside a repository."""
    git = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    answer = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else "none"


def check_answer(backend: ExpertsBackend, shape: Shape, dtype: str, skew: str, device: torch.device) -> None:
    """Raise AssertionError unless output and gradients on these widths equal the reference."""
    sizes = dataclasses.asdict(shape) | {"T": min(shape.T, CHECKED_TOKENS)}
    case = make_case(skew, **sizes, dtype=DTYPES[dtype], device=device)
    assert_close(run(backend, case), run_reference(case), tolerance=TOLERANCE[dtype])


def time_once(backend: ExpertsBackend, case: Case, clock: str) -> dict[str, float]:
    """Return the milliseconds of one forward and one backward pass, by mode."""

    def now() -> float:
        if case.x_TD.is_cuda:
            torch.cuda.synchronize()
        return (time.thread_time() if clock == "cpu" else time.perf_counter()) * 1e3

    tensors = (case.x_TD, case.weight_N, case.gate_up_E2FD, case.down_EDF)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    start = now()
    y_TD = call(backend, case, leaves)
    middle = now()
    torch.autograd.grad(y_TD, leaves, case.dy_TD)
    return {"forward": middle - start, "backward": now() - middle}


def time_in_turns(case: Case, shape: Shape, skew: str, options: Options, names: list[str]) -> dict[str, list[dict]]:
    """Return the timings of every backend, one entry per round. Each call gets fresh rows; turns rotate."""
    timings: dict[str, list[dict]] = {name: [] for name in names}
    generator = torch.Generator().manual_seed(1)
    for turn in range(WARMUP_ROUNDS + options.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            _, expert_N = make_rows(skew, T=shape.T, E=shape.E, K=shape.K, generator=generator)
            fresh = dataclasses.replace(case, expert_N=expert_N.to(case.expert_N.device))
            timings[name].append(time_once(BACKENDS[name], fresh, options.clock))
    return {name: rows[WARMUP_ROUNDS:] for name, rows in timings.items()}


def bench(shape: Shape, dtype: str, skew: str, options: Options) -> list[Row]:
    """Return the rows of all backends that run here on one shape, checked before they are timed."""
    device = torch.device(options.device)
    widths = (shape.D, shape.F)
    names = [n for n, b in BACKENDS.items() if b.refusal(device=device, dtype=DTYPES[dtype], widths=widths) is None]
    for name in names:
        check_answer(BACKENDS[name], shape, dtype, skew, device)
    case = make_case(skew, **dataclasses.asdict(shape), dtype=DTYPES[dtype], device=device)
    timings = time_in_turns(case, shape, skew, options, names)
    rows = []
    for name in names:
        saved_mib = saved_bytes(BACKENDS[name], case) / 2**20
        for mode, flops in FLOPS.items():
            times = [round_[mode] for round_ in timings[name]]
            ratios = [round_[mode] / plain[mode] for round_, plain in zip(timings[name], timings["naive"], strict=True)]
            p20_ms, p50_ms, p80_ms = (sorted(times)[int(q * (len(times) - 1))] for q in (0.2, 0.5, 0.8))
            rows.append(
                Row(
                    date=datetime.date.today().isoformat(),
                    commit=current_commit(),
                    device=describe_device(device),
                    torch=torch.__version__,
                    threads=options.threads,
                    clock=options.clock,
                    dtype=dtype,
                    **dataclasses.asdict(shape),
                    skew=skew,
                    backend=name,
                    mode=mode,
                    p20_ms=round(p20_ms, 3),
                    p50_ms=round(p50_ms, 3),
                    p80_ms=round(p80_ms, 3),
                    ratio_to_naive=round(statistics.median(ratios), 3),
                    gflops=round(flops * shape.T * shape.K * shape.D * shape.F / p50_ms / 1e6, 1),
                    saved_mib=round(saved_mib, 2),
                )
            )
    return rows


def append_rows(path: Path, rows: list[Row]) -> None:
    """Add rows to a CSV. Raises ValueError if its columns are not those of Row."""
    columns = [field.name for field in dataclasses.fields(Row)]
    is_new = not path.exists()
    if not is_new:
        found = path.read_text().splitlines()[0].split(",")
        if found != columns:
            raise ValueError(f"{path} has the columns {found}, not {columns}; choose another --machine")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)


def print_rows(console: Console, title: str, rows: list[Row]) -> None:
    """Print rows as a table."""
    heads = ("backend", "mode", "p20 ms", "p50 ms", "p80 ms", "to naive", "GFLOP/s", "saved MiB")
    table = Table(*heads, box=None, pad_edge=False)
    for row in rows:
        times = (f"{milliseconds:.1f}" for milliseconds in (row.p20_ms, row.p50_ms, row.p80_ms))
        ratio, gflops, saved_mib = f"{row.ratio_to_naive:.2f}", f"{row.gflops:.0f}", f"{row.saved_mib:.1f}"
        table.add_row(row.backend, row.mode, *times, ratio, gflops, saved_mib)
    console.print(f"\n{title}")
    console.print(table)


def main(options: Options) -> None:
    """Check, time, print, and add to the results if a machine is named."""
    if options.clock == "cpu" and (options.threads != 1 or options.device != "cpu"):
        raise ValueError(f"--clock cpu sees one CPU thread, not {options.threads} on {options.device}; use --threads 1")
    torch.set_num_threads(options.threads)
    console = Console()
    for name in options.shapes:
        for dtype in options.dtypes:
            for skew in options.skews:
                rows = bench(SHAPES[name], dtype, skew, options)
                print_rows(
                    console, f"{SHAPES[name]} {dtype} {skew}, {options.threads} threads, {options.clock} time", rows
                )
                if options.machine:
                    append_rows(RESULTS / f"{options.machine}.csv", rows)


if __name__ == "__main__":
    main(tyro.cli(Options))
