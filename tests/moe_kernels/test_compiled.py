"""What the compiler makes of the kernels for GPUs that are not here: no spills, matrix instructions, wide loads, TMA.

Compiling takes minutes; it begins when the tests are collected, in processes of its own, since the interpreter and the
compiler exclude each other within one.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

from background import ROOT, Background
from moe_kernels.tiles import SAFE, table

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
MATRIX_KERNELS = {"experts_fwd_up", "grouped_matmul_fwd", "experts_bwd_down", "grouped_matmul_bwd_weight"}


ROWS = Path(tempfile.gettempdir()) / f"compiled-kernels-{os.getpid()}.json"


def background() -> Background:
    """Return the inspection as a command that writes ROWS."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "benchmarks"))
    command = [sys.executable, str(ROOT / "benchmarks/inspect_kernels.py"), "--json-path", str(ROWS)]
    return Background(command, environment=environment)


INSPECTION = background()
BACKGROUND = [INSPECTION]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    _, output = INSPECTION.result(timeout_s=1800)
    try:
        return json.loads(ROWS.read_text())
    except FileNotFoundError:
        pytest.fail(output)
    finally:
        ROWS.unlink(missing_ok=True)


def test_no_kernel_breaks_a_rule(rows):
    broken = [(row["arch"], row["entry"], row["kernel"], row["faults"]) for row in rows if row["faults"]]
    assert not broken


def test_every_kernel_of_every_entry_was_compiled(rows):
    compiled = {(row["arch"], row["entry"], row["kernel"]) for row in rows}
    for arch in ARCHS:
        entries = [*SAFE, *(entry.name for entry in table().values() if entry.arch == arch)]
        assert len(entries) >= 4
        for entry in entries:
            assert {(arch, entry, kernel) for kernel in MATRIX_KERNELS} <= compiled


def test_both_kinds_of_rows_are_gathered_by_wide_loads_and_weights_come_by_tma(rows):
    tuned = [row for row in rows if row["entry"].startswith(("sm_90", "sm_100"))]
    assert tuned
    for row in tuned:
        gathers = row["kernel"] in ("experts_fwd_up", "experts_bwd_down", "grouped_matmul_bwd_weight")
        assert not gathers or row["global_loads"].get("128"), row
        assert not row["kernel"].endswith(("_up", "matmul_fwd", "bwd_down")) or row["global_loads"].get("tma"), row


def test_small_kernels_of_routing_and_sums_do_not_spill(rows):
    small = [row for row in rows if row["kernel"] not in MATRIX_KERNELS]
    expected = {"topk_fwd", "count", "scan", "place", "combine_fwd", "weight_gradient", "segment_sum", "row_dot"}
    assert expected <= {row["kernel"] for row in small}
    assert not any(row["spill_instructions"] for row in small)
