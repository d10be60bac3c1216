"""Everything that only a GPU can show, in one command of at most 8 minutes: tests, sanitizers, every benchmark.

    make gpu                                                        # with the python3 that has torch
    python3 benchmarks/run_on_gpu.py --machine h200 --parts tests kernels
    python3 benchmarks/run_on_gpu.py --list

A part that is done leaves runs/gpu/COMMIT/PART.done, and a second call does what is missing; delete the file to run it
again. Every part has a share of the budget, after which it is killed and counts as failed; fewer parts get longer
shares. Its log lies beside the mark. A part that the budget has no time left for waits for the next call. What a part
needs and does not find is skipped by name.

Where the files are a copy without their repository, MOE_COMMIT=... says of which commit: rows and marks carry it.

Exit code: 0 all done or skipped, 1 a part failed, 2 none failed but some are left. This program imports no torch: it
answers at once, and nothing of it holds the GPU.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from checkout import current_commit

ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = 480.0
LEAST_S = 5.0  # with less left, no part is started
MODELS = ("--shapes", "qwen3_30b_a3b", "olmoe_1b_7b")
OTHER_MODELS = ("--shapes", "mixtral_8x7b", "qwen3_next_80b", "gpt_oss_20b", "deepseek_v3_4_local")
TAIL = 12  # lines of a log that a failure shows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Commands that run one after the other, until one fails."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    limit_s: float  # all commands together; longer where other parts leave their share of the budget
    results: tuple[str, ...] = ()  # CSV files that get rows
    needs: tuple[str, ...] = ()  # programs on PATH, or files
    unsupported: str = ""  # what a log says where the machine, not the code, refuses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a part."""

    name: str
    state: str  # done, failed, skipped, left, before (done by an earlier call)
    seconds: float = 0.0
    note: str = ""
    tail: tuple[str, ...] = ()


def gpu_test_files(root: Path) -> tuple[str, ...]:
    """Return the files of tests that ask for a GPU and can be imported; the log of the part names them."""
    files = sorted((root / "tests").rglob("test_*.py"))
    texts = {str(file.relative_to(root)): file.read_text(encoding="utf-8") for file in files}
    # tests that draw their own cases need one package more
    lacks_hypothesis = importlib.util.find_spec("hypothesis") is None
    return tuple(
        name
        for name, text in texts.items()
        if "pytest.mark.gpu" in text and not (lacks_hypothesis and "hypothesis" in text)
    )


def parts(machine: str, python: str = sys.executable) -> tuple[Part, ...]:
    """Return all parts, in the order in which they run."""
    # compiling kernels takes most of the time of the tests, and is done once per process
    workers = ("-n", "12") if importlib.util.find_spec("xdist") else ()
    # the settings of all tests, in tests/conftest.py, import what only training needs
    pytest = (python, "-m", "pytest", "-q", "-m", "gpu", "--confcutdir=tests/moe_kernels", *workers)
    smallest = (python, "benchmarks/smallest_layer.py")
    sanitizer = ("compute-sanitizer", "--error-exitcode=1", "--report-api-errors=no", "--tool")
    # sonicmoe_one is untuned: tuning SonicMoE or Liger takes longer than all of this (docs/performance.md)
    torch_s = ("torch_grouped", "transformers_grouped_mm")
    peers = (*torch_s, "scattermoe", "sonicmoe_one")
    backends = (python, "benchmarks/bench_backends.py", "--machine", machine, "--device", "cuda", "--dtypes", "bf16")
    step = (python, "benchmarks/bench_step_gpu.py", "--machine", machine)
    return (
        Part(name="tests", commands=((*pytest, *gpu_test_files(ROOT)),), limit_s=85),
        Part(
            name="kernels",
            commands=((python, "benchmarks/bench_kernels.py", "--machine", machine),),
            limit_s=40,
            results=(f"kernels_{machine}.csv",),
        ),
        Part(
            name="backends",
            commands=(
                (*backends, *MODELS, "--skews", "random", "skewed", "--backends", "triton", *peers),
                (*backends, *MODELS, "--tokens", "2048", "8192", "--skews", "random", "--backends", "triton", *torch_s),
                (*backends, *MODELS, "--skews", "heavy", "--backends", "triton", *torch_s),
                (*backends, *OTHER_MODELS, "--skews", "random", "--backends", "triton", *torch_s),
                # offsets beyond 2^31: a peer that fails there takes the process with it
                (*backends, "--shapes", "sonic_30b_n256", "--skews", "random", "--backends", "triton"),
            ),
            limit_s=175,
            results=(f"backends_{machine}.csv",),
        ),
        Part(
            name="step",
            commands=(step, (*step, "--micro-batches", "8", "--profiled", "0", "--rounds", "4", "--warmup", "1")),
            limit_s=110,
            results=(f"step_gpu_{machine}.csv", f"step_parts_{machine}.csv"),
        ),
        Part(
            name="sanitizer",
            commands=((*sanitizer, "memcheck", *smallest), (*sanitizer, "racecheck", *smallest)),
            limit_s=70,
            needs=("compute-sanitizer",),
            unsupported="Device not supported",
        ),
    )


def missing(part: Part) -> str:
    """Return the first thing that a part needs and that is not there, or nothing."""
    for need in part.needs:
        if shutil.which(need) is None and not (ROOT / need).exists():
            return need
    return ""


def run_part(part: Part, state: Path, *, seconds_left: float) -> Outcome:
    """Run a part unless it is done, and mark it when it is."""
    done, log = state / f"{part.name}.done", state / f"{part.name}.log"
    if done.exists():
        return Outcome(name=part.name, state="before", note=f"{done} says so")
    need = missing(part)
    if need:
        return Outcome(name=part.name, state="skipped", note=f"{need} is missing")
    if seconds_left < LEAST_S:
        return Outcome(name=part.name, state="left", note="no time left in the budget; call again")
    limit_s = min(part.limit_s, seconds_left)
    state.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        code = run_commands(part.commands, file, limit_s=limit_s)
    seconds = round(time.perf_counter() - started, 1)
    text = log.read_text(encoding="utf-8", errors="replace")
    if part.unsupported and code != 0 and part.unsupported in text:
        return Outcome(name=part.name, state="skipped", seconds=seconds, note=part.unsupported)
    if code != 0:
        note = f"killed after {limit_s:.0f} s" if code is None else f"rc {code}"
        return Outcome(
            name=part.name, state="failed", seconds=seconds, note=note, tail=tuple(text.splitlines()[-TAIL:])
        )
    mark = {"seconds": seconds, "results": part.results, "commands": part.commands}
    done.write_text(json.dumps(mark) + "\n", encoding="utf-8")
    return Outcome(name=part.name, state="done", seconds=seconds, note=", ".join(part.results))


def run_commands(commands: tuple[tuple[str, ...], ...], log, *, limit_s: float) -> int | None:
    """Return the exit code of the first command that fails, 0 if none does, None if time ran out."""
    end = time.perf_counter() + limit_s
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    for command in commands:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        # a session of its own, so that its workers are killed with it
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout=max(0.0, end - time.perf_counter()))
        except subprocess.TimeoutExpired:
            code = None
        except BaseException:
            _kill(process)
            raise
        if code is None:
            _kill(process)
        if code != 0:
            return code
    return 0


def _kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def shared(wanted: tuple[Part, ...], state: Path, *, budget_s: float) -> tuple[Part, ...]:
    """Return the parts with limits that share the budget among those still to run, as their own limits stand."""
    pending = [part for part in wanted if not (state / f"{part.name}.done").exists() and not missing(part)]
    scale = budget_s / sum(part.limit_s for part in pending) if pending else 1.0
    return tuple(dataclasses.replace(part, limit_s=scale * part.limit_s) for part in wanted)


def run_all(wanted: tuple[Part, ...], state: Path, *, budget_s: float) -> int:
    """Run parts in order, print a line for each, and return the exit code."""
    started = time.perf_counter()
    outcomes = []
    for part in shared(wanted, state, budget_s=budget_s):
        outcome = run_part(part, state, seconds_left=budget_s - (time.perf_counter() - started))
        outcomes.append(outcome)
        print(f"{outcome.name:<10} {outcome.state:<8} {outcome.seconds:6.1f} s  {outcome.note}", flush=True)
        for line in outcome.tail:
            print(f"           | {line}", flush=True)
    states = {outcome.state for outcome in outcomes}
    print(f"{time.perf_counter() - started:.0f} s in all; logs in {state}")
    return 1 if "failed" in states else 2 if "left" in states else 0


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code of what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [part.name for part in parts("x")]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--machine", default="h200", help="name of the kind of machine, in the names of results")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for all parts together")
    parser.add_argument("--state", type=Path, default=ROOT / "runs/gpu", help="folder of marks and logs")
    parser.add_argument("--list", action="store_true", help="print the parts and their commands; start nothing")
    options = parser.parse_args(arguments)
    wanted = tuple(part for part in parts(options.machine) if part.name in options.parts)
    if options.list:
        for part in wanted:
            print(f"{part.name}, at most {part.limit_s:.0f} s", *(" ".join(c) for c in part.commands), sep="\n    ")
        return 0
    return run_all(wanted, options.state / current_commit(), budget_s=options.budget)


if __name__ == "__main__":
    sys.exit(main())
