"""The Triton kernels on a CPU: nested runs of pytest in which Triton interprets kernels and compiles nothing.

Triton takes one or the other when a kernel is imported, and this process compiles ahead of time. So the tests in
interpreted/ run in a process of their own, and beside it those that hold every backend to its promises.
"""

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

ROOT = Path(__file__).resolve().parents[2]
TESTS = "tests/moe_kernels"
TIMEOUT_S = 1800  # both take about a minute and a half on two quiet cores, and ten times that on a busy machine
# what every backend promises, but for what takes minutes: large shapes, float64 (the interpreted tests have both) and
# many runs of one case; for every form of the experts beside the reference, which test_equal_reference.py has; and for
# what needs a GPU or bfloat16, in which the interpreter computes wrongly
SLICE = (
    "triton and not cuda and not bfloat16 and not long_segments and not odd_widths and not more_experts "
    "and not repeated_runs and not (test_output_and_every and (dtype0 or test_specs))"
)
BACKENDS = (f"{TESTS}/backends/test_backends.py", f"{TESTS}/backends/test_specs.py")
REFERENCE = "test_equal_reference"


@dataclass(frozen=True, slots=True)
class Run:
    """Arguments of a nested pytest, and how many tests must pass in it: one that collects nothing must not."""

    arguments: tuple[str, ...]
    min_passed: int


RUNS = {
    "kernels": Run((f"{TESTS}/interpreted", f"--ignore={TESTS}/interpreted/{REFERENCE}.py"), 200),
    # with one file of the others, so that both runs take about as long
    "promises": Run((f"{TESTS}/interpreted/{REFERENCE}.py", *BACKENDS, "-k", f"{REFERENCE} or {SLICE}"), 125),
}


def start(run: Run, log: Path) -> subprocess.Popen[bytes]:
    """Start the nested run; what it prints goes to `log`."""
    # without the conftest of the whole suite, which imports what takes seconds
    options = ("-n0", "-p", "no:cacheprovider", f"--confcutdir={TESTS}", "--durations=5")
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", *options, *run.arguments],
            cwd=ROOT,
            env={**environment, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[int | None, str]]]:
    """Run all of RUNS at once and give exit code and output of each; None for one that took too long."""
    folder = tmp_path_factory.mktemp("interpreter")
    logs = {name: folder / f"{name}.log" for name in RUNS}
    processes: dict[str, subprocess.Popen[bytes]] = {}
    deadline = time.monotonic() + TIMEOUT_S
    try:
        for name, run in RUNS.items():
            processes[name] = start(run, logs[name])
        codes: dict[str, int | None] = {}
        for name, process in processes.items():
            try:
                codes[name] = process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                codes[name] = None
        yield {name: (codes[name], logs[name].read_text(errors="replace")) for name in RUNS}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


@pytest.mark.parametrize("name", RUNS)
def test_interpreted_kernels_pass(name: str, finished: dict[str, tuple[int | None, str]]) -> None:
    code, output = finished[name]
    assert code is not None, f"killed after {TIMEOUT_S} s\n{output}"
    assert code == 0, f"exit code {code}\n{output}"
    summary = output.strip().splitlines()[-1]
    passed = re.search(r"(\d+) passed", summary)
    assert passed is not None and int(passed[1]) >= RUNS[name].min_passed, output
    assert "skipped" not in summary and "xfailed" not in summary, output
