"""The Triton kernels on a CPU: nested runs of pytest in which Triton interprets kernels and compiles nothing.

Triton takes one or the other when a kernel is imported, and this process compiles ahead of time. So the tests in
interpreted/ run in a process of their own, and beside it those that hold every backend to its promises. Both begin when
the tests are collected.
"""

import importlib.util
import os
import re
import sys
from dataclasses import dataclass

import pytest

from background import Background

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

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


def background(run: Run) -> Background:
    """Return the nested run as a command."""
    # without the conftest of the whole suite, which imports what takes seconds
    options = ("-p", "no:cacheprovider", f"--confcutdir={TESTS}", "--durations=5")
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    return Background(
        [sys.executable, "-m", "pytest", "-q", *options, *run.arguments],
        environment={**environment, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )


STARTED = {name: background(run) for name, run in RUNS.items()}
BACKGROUND = list(STARTED.values()) if importlib.util.find_spec("triton") else []


@pytest.mark.parametrize("name", RUNS)
def test_interpreted_kernels_pass(name: str) -> None:
    code, output = STARTED[name].result(timeout_s=TIMEOUT_S)
    assert code is not None, f"killed after {TIMEOUT_S} s\n{output}"
    assert code == 0, f"exit code {code}\n{output}"
    summary = output.strip().splitlines()[-1]
    passed = re.search(r"(\d+) passed", summary)
    assert passed is not None and int(passed[1]) >= RUNS[name].min_passed, output
    assert "skipped" not in summary and "xfailed" not in summary, output
