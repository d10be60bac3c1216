"""Where the time of a training step goes: kernels of a torch profile by part and phase, as rows and as a picture.

    python benchmarks/step_profile.py benchmarks/results/step_parts_h200.csv docs/images/step_h200.svg      draws again

A phase is forward (with statistics and the log), backward or update. Profiled steps wait for the GPU between phases, so
a kernel belongs to the phase in whose span it ran. Idle time is that of the timed steps: their p50 less the time in
which the profiled ones kept the GPU busy.
"""

import csv
import json
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

PHASES = ("forward", "backward", "update")
MARK = "phase: "
GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
OTHER, IDLE = "other", "GPU idle"
# the first pattern found in the name of a kernel decides; our own kernels are named in full
PARTS: tuple[tuple[str, str], ...] = (
    (
        "experts: products",
        r"^(experts_fwd_up|grouped_matmul_fwd|experts_bwd_down|grouped_matmul_bwd_weight)_kernel"
        r"|GroupProblemShape|grouped_gemm|grouped_mm",
    ),
    ("experts: rows and sums", r"^(combine_fwd|weight_gradient|row_dot|segment_sum|count|scan|place)_kernel"),
    ("communication", r"nccl"),
    ("attention core", r"flash|fmha|sdpa|attention"),
    # everything that multiplies matrices does so in bfloat16, but for our router: float32
    (
        "dense products",
        r"^(?!.*(sgemm|f32f32|nvjet_sss)).*(nvjet|gemm|cutlass|xmma|gemv|splitK|cublas)",
    ),
    ("router and sorting", r"sgemm|f32f32|nvjet_sss|[sS]ort|[tT]op[kK]|bitonic|[sS]catter|[gG]ather|index|histogram"),
    ("optimizer and norm", r"multi_tensor_apply|[aA]dam|NormTwoOps|[lL]p_?[nN]orm"),
    (
        "norms, softmax, loss",
        r"[nN]orm|GammaBeta|[sS]oft[mM]ax|nll_loss|cross_entropy|[eE]mbedding|compute_grad_weight",
    ),
    ("elementwise, copies, sums", r"elementwise|[cC]opy|Mem(cpy|set)|[fF]ill|reduce_kernel|CatArray|[tT]ranspose"),
)


@dataclass(frozen=True, kw_only=True)
class PartRow:
    """One line of results: a part of the step of one contender in one phase; idle time has no phase."""

    date: str
    commit: str
    device: str
    driver: str
    torch: str
    triton: str
    layers: int
    micro_batches: int
    sequences: int
    length: int
    contender: str
    part: str
    phase: str
    ms_per_step: float
    kernels_per_step: float
    percent_of_step: float


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """All launches of the kernels of one name in one phase, per step."""

    name: str
    part: str
    phase: str
    ms_per_step: float
    launches_per_step: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Kernels, those that took longest first, and how long the GPU did anything at all."""

    kernels: list[Kernel]
    busy_ms_per_step: float


class Phases:
    """Marks the phases of a step in a profile; does nothing while `is_recorded` is False."""

    def __init__(self, device: torch.device) -> None:
        self.is_recorded = False
        self._device = device

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Mark what runs inside as the phase `name`."""
        if not self.is_recorded:
            yield
            return
        wait_for(self._device)
        with torch.profiler.record_function(MARK + name):
            yield
            wait_for(self._device)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, marked as the phase `name`."""

        def marked(*args: Any, **kwargs: Any) -> Any:
            with self.of(name):
                return function(*args, **kwargs)

        return marked


def wait_for(device: torch.device) -> None:
    """Wait for all work on a GPU; a CPU has none left."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile(
    step: Callable[[Tensor], Any], tokens: list[Tensor], phases: Phases, device: torch.device, *, trace: Path | None
) -> Profile:
    """Return the profile of one step for each of `tokens`; the raw trace is kept at `trace`.

    On a CPU the operators are counted in the place of kernels, and those that call others count their time again.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    phases.is_recorded = True
    with torch.profiler.profile(activities=activities) as profiler:
        for token in tokens:
            step(token)
        wait_for(device)
    phases.is_recorded = False
    categories = GPU_CATEGORIES if device.type == "cuda" else ("cpu_op",)
    with tempfile.TemporaryDirectory() as folder:
        path = trace if trace is not None else Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read_trace(json.loads(path.read_text()), categories=categories, num_steps=len(tokens))


def read_trace(trace: dict[str, Any], *, categories: tuple[str, ...], num_steps: int) -> Profile:
    """Return the profile in a Chrome trace of torch.profiler, whose times are microseconds."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    spans = [
        (event["ts"], event["ts"] + event["dur"], event["name"].removeprefix(MARK))
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(MARK)
    ]
    totals: dict[tuple[str, str], list[float]] = {}
    busy, end = 0.0, 0.0
    for event in sorted((e for e in events if e.get("cat") in categories), key=lambda e: e["ts"]):
        start, duration = event["ts"], event["dur"]
        phase = next((name for first, last, name in spans if first <= start < last), "forward")
        total = totals.setdefault((event["name"], phase), [0.0, 0])
        total[0] += duration
        total[1] += 1
        # kernels of several streams may overlap
        busy += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    kernels = [
        Kernel(
            name=name,
            part=part_of(name),
            phase=phase,
            ms_per_step=microseconds / 1000 / num_steps,
            launches_per_step=launches / num_steps,
        )
        for (name, phase), (microseconds, launches) in totals.items()
    ]
    kernels.sort(key=lambda kernel: -kernel.ms_per_step)
    return Profile(kernels=kernels, busy_ms_per_step=busy / 1000 / num_steps)


def part_of(kernel: str) -> str:
    """Return the part of the step that a kernel of this name belongs to."""
    return next((part for part, pattern in PARTS if re.search(pattern, kernel)), OTHER)


def part_rows(measured: Profile, *, step_ms: float, **stamp: Any) -> list[PartRow]:
    """Return a row for each part and phase with any kernel, and one for idle time.

    Args:
        step_ms: p50 of the timed steps.
        stamp: the fields that all rows share.
    """
    rows = []
    for part in (*(name for name, _ in PARTS), OTHER):
        for phase in PHASES:
            mine = [kernel for kernel in measured.kernels if (kernel.part, kernel.phase) == (part, phase)]
            ms, launches = sum(k.ms_per_step for k in mine), sum(k.launches_per_step for k in mine)
            if mine:
                rows.append(_row(part, phase, ms, launches, step_ms, stamp))
    idle_ms = max(0.0, step_ms - measured.busy_ms_per_step)
    return [*rows, _row(IDLE, "", idle_ms, 0.0, step_ms, stamp)]


def _row(part: str, phase: str, ms: float, launches: float, step_ms: float, stamp: dict[str, Any]) -> PartRow:
    percent = 100 * ms / step_ms
    return PartRow(**stamp, part=part, phase=phase, ms_per_step=ms, kernels_per_step=launches, percent_of_step=percent)


def print_waits(step: Callable[[Tensor], Any], token: Tensor, device: torch.device) -> None:
    """Print where a step makes the host wait for the GPU, as torch sees it, and how often."""
    if device.type != "cuda":
        return
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(token)
    torch.cuda.set_sync_debug_mode("default")
    waits = Counter(f"{w.filename}:{w.lineno}" for w in caught if "synchronizing" in str(w.message))
    print(f"{waits.total()} waits of the host in a step")
    for place, count in waits.most_common(20):
        print(f"{count:6d}x {place}")


def print_kernels(measured: Profile, count: int = 40) -> None:
    """Print the kernels that took longest, so that one in the wrong part is seen."""
    for kernel in measured.kernels[:count]:
        name = kernel.name.replace("at::native::", "").replace("void ", "")
        head = f"{kernel.ms_per_step:8.3f} ms {kernel.launches_per_step:6.1f}x {kernel.phase:8s} {kernel.part:25s}"
        print(f"{head} {name[:100]}")


def print_parts(rows: list[PartRow]) -> None:
    """Print each part with its phases side by side."""
    print(f"{'part':26s}" + "".join(f"{phase:>10s}" for phase in PHASES) + "     total      %")
    for part in dict.fromkeys(row.part for row in rows):
        mine = [row for row in rows if row.part == part]
        values = [sum(row.ms_per_step for row in mine if row.phase == phase) for phase in PHASES]
        total, percent = sum(row.ms_per_step for row in mine), sum(row.percent_of_step for row in mine)
        print(f"{part:26s}" + "".join(f"{value:10.2f}" for value in values) + f"{total:10.2f} {percent:6.1f}")


def draw(path: Path, rows: list[PartRow]) -> None:
    """Write a picture: a panel for each contender, a bar for each part, its phases side by side in it."""
    contenders = list(dict.fromkeys(row.contender for row in rows))
    parts = [name for name, _ in PARTS] + [OTHER, IDLE]
    parts = [part for part in parts if any(row.part == part and row.ms_per_step > 0 for row in rows)]
    figure = Figure(figsize=(4.2 + 3.2 * len(contenders), 4.0), dpi=100, layout="constrained")
    all_axes = figure.subplots(1, len(contenders), squeeze=False, sharex=True, sharey=True)[0]
    for axes, contender in zip(all_axes, contenders, strict=True):
        left = dict.fromkeys(parts, 0.0)
        for number, phase in enumerate((*PHASES, "")):
            mine = {row.part: row.ms_per_step for row in rows if (row.contender, row.phase) == (contender, phase)}
            widths = [mine.get(part, 0.0) for part in parts]
            color = f"C{number}" if phase else "0.7"
            axes.barh(parts, widths, left=list(left.values()), color=color, label=phase or "idle", height=0.7)
            left = {part: left[part] + width for part, width in zip(parts, widths, strict=True)}
        for part, total in left.items():
            axes.annotate(f" {total:.1f}", (total, part), va="center", fontsize=7)
        axes.set_title(f"{contender}: {sum(left.values()):.0f} ms a step", fontsize=9)
        axes.set_xlabel("ms", fontsize=8)
        axes.tick_params(labelsize=8)
    widest = max(sum(r.ms_per_step for r in rows if (r.contender, r.part) == (c, p)) for c in contenders for p in parts)
    all_axes[0].set_xlim(0, 1.15 * widest)
    all_axes[0].invert_yaxis()
    all_axes[-1].legend(fontsize=7, loc="lower right")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})


def read_rows(path: Path) -> list[PartRow]:
    """Return the rows of a CSV of parts."""
    numbers = ("ms_per_step", "kernels_per_step", "percent_of_step")
    with path.open(newline="") as file:
        return [PartRow(**{k: float(v) if k in numbers else v for k, v in row.items()}) for row in csv.DictReader(file)]  # type: ignore[arg-type]


if __name__ == "__main__":
    draw(Path(sys.argv[2]), read_rows(Path(sys.argv[1])))
