"""Seed the Triton kernels with defects, one at a time, and see that the interpreted tests catch each.

    python benchmarks/mutate_kernels.py
    python benchmarks/mutate_kernels.py --only silu weight

Every defect is a change of text in a temporary copy of kernels/ and tests/; the checkout is never touched. A defect
that survives, or whose old text is no longer found once, makes the exit code 1: then a test is missing, or the table
is out of date. Runs on a CPU, some seconds per defect. What only a GPU shows (races, spilled registers, TF32) is not
here, nor what changes no number: an address that is clamped or masked where nothing of it is kept.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "kernels/moe_kernels"
TESTS = "tests/moe_kernels/interpreted"
TIMEOUT_S = 1200
PASSED, FAILED = 0, 1  # pytest's exit codes; a defect may also kill the process with a signal, a negative one

UP, DOWN_BWD, GEMM = "experts_up.py", "experts_down_bwd.py", "grouped_gemm.py"
COMBINE, EXPERTS, PARTS, PLACES = "combine.py", "experts.py", "parts.py", "route.py"
STEPS = "    steps = tl.cdiv(stop - start, BLOCK_K)"


@dataclass(frozen=True, slots=True)
class Mutant:
    """One defect: `old` becomes `new` in a file of the kernels; `tests` and `select` name what should catch it."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    select: str


# what should catch them (a file of tests, the words that pick some of it): the defects (name, file, old text, new text)
TABLE: dict[tuple[str, str], list[tuple[str, str, str, str]]] = {
    ("test_equal_reference.py", "float16_differs"): [
        ("gate and up swapped", UP, "        return halve(acc)", "        return halve(acc)[::-1]"),
        ("silu' with a wrong sign", PARTS, "(chance + silu * (1.0", "(chance - silu * (1.0"),
        ("gelu' with a wrong sign", PARTS, "(below + gate * density)", "(below - gate * density)"),
        ("held gate passes a gradient", PARTS, "tl.where(gate <= LIMIT, dgate, 0.0)", "dgate"),
        ("up bias read from the gate", UP, "bias_row_ptr + bias_stride_half,", "bias_row_ptr,"),
        ("no row weight in A'", DOWN_BWD, "(a * row_weight).to(", "a.to("),
        ("row weight twice in dH", DOWN_BWD, "(pieces[i] * row_weight,", "(pieces[i] * row_weight * row_weight,"),
        ("row weight in its own gradient", DOWN_BWD, "pieces[i] * a, 0.0)", "pieces[i] * row_weight * a, 0.0)"),
        (
            "weight of another row",
            DOWN_BWD,
            "row = tl.load(row_ptr + position, mask=is_row, other=0)",
            "row = position",
        ),
        ("part of dweight for the wrong tile", DOWN_BWD, "* num_parts + tile_n, part", "* num_parts, part"),
        ("last part of dweight not summed", COMBINE, "for part in range(PARTS):", "for part in range(PARTS - 1):"),
        ("bias missing in dweight", DOWN_BWD, "total += tl.sum(dy * bias[None, :], axis=1)", "total += 0.0"),
        ("dweight with the first expert's bias", DOWN_BWD, "bias_ptr + expert.to(tl.int64) * D", "bias_ptr"),
        ("last K block skipped, up", UP, "for k in range(0, D, BLOCK_K)", "for k in range(0, D - BLOCK_K, BLOCK_K)"),
        ("first half's weights twice", GEMM, "[expert, half, k, tile_n * BLOCK_N]", "[expert, 0, k, tile_n * BLOCK_N]"),
        ("turns of the bias gradient kept", EXPERTS, ".unflatten(1, (2, -1)).mT", ".unflatten(1, (2, -1))"),
    ],
    ("test_equal_reference.py", "test_output and True"): [
        (
            "H computed again without bias",
            EXPERTS,
            "bias_EH=gate_up_bias_E2F, keep_hidden=True, keep",
            "bias_EH=None, keep_hidden=True, keep",
        ),
    ],
    ("test_equal_reference.py", "test_output and ragged"): [
        (
            "last row of a ragged token dropped",
            COMBINE,
            "tl.load(first_ptr + token + 1))",
            "tl.load(first_ptr + token + 1) - 1)",
        ),
    ],
    ("test_numerics.py", "very_same"): [
        ("A made of H before rounding", UP, "            gate = gate.to(activated_ptr.dtype.element_ty)\n", ""),
    ],
    ("test_numerics.py", "grouped_matmul"): [
        ("last K block skipped", GEMM, "range(0, num_steps)", "range(0, num_steps - 1)"),
        ("tail of K one too long", GEMM, "is_k = lane_k < K - k", "is_k = lane_k <= K - k"),
        ("sums in float16", "launch.py", "torch.float64 else tl.float32", "torch.float64 else tl.float16"),
        ("first half's rows twice", GEMM, "a_desc.load([start, half * K + k])", "a_desc.load([start, k])"),
        ("rows not held in the segment", GEMM, "row = tl.minimum(start + lane_m, stop - 1)", "row = start + lane_m"),
    ],
    ("test_numerics.py", "weight_gradients"): [
        ("only q masked in the tail", GEMM, "mask=is_k & (first_m", "mask=(first_m"),
        ("only p masked in the tail", GEMM, "mask=is_k & (first_n", "mask=(first_n"),
        ("last row of a segment dropped", GEMM, "is_k = (r + lane_k < stop)", "is_k = (r + lane_k < stop - 1)"),
        ("segment ends a row early", PARTS, "RAGGED - num_rows + row,", "RAGGED - num_rows + row + 1,"),
        (
            "no zeros for an empty expert",
            GEMM,
            "(n < N)[None, :]\n            if",
            "(n < N)[None, :] & (start < stop)\n            if",
        ),
        (
            "steps of empty experts not counted",
            GEMM,
            "    steps = tl.maximum(tl.cdiv(stop - start, BLOCK_K), 1)",
            STEPS,
        ),
        (
            "tokens of this step for those of the next",
            GEMM,
            "following = r + BLOCK_K + lane_k",
            "following = r + lane_k",
        ),
        (
            "sum carried into the next tile",
            GEMM,
            "mask=mask)\n            acc = tl.zeros",
            "mask=mask)\n            none = tl.zeros",
        ),
        ("adds to memory nobody wrote", GEMM, "    if ACCUMULATE:", "    if True:"),
    ],
    ("test_numerics.py", "segment_sums or combine"): [
        ("only the last rows of a segment summed", GEMM, "        acc += a\n", "        acc = a\n"),
        ("last slot dropped where K is odd", COMBINE, "static_range(FAN_OUT)", "static_range(FAN_OUT // 2 * 2)"),
        ("last slot of a long list dropped", COMBINE, "for k in range(FAN_OUT):", "for k in range(FAN_OUT - 1):"),
        ("unused row read, times zero", COMBINE, "mask=is_column & is_used", "mask=is_column"),
    ],
    ("test_promises.py", "number_of_programs or nothing_outside"): [
        (
            "paired gate and up taken as halves",
            UP,
            "acc.reshape(acc.shape[0], acc.shape[1] // 2, 2).split()",
            "halve(acc)",
        ),
        ("tokens not held in the segment, up", UP, "tl.minimum(start + lane_m, stop - 1)", "start + lane_m"),
        ("tokens not held, backward", DOWN_BWD, "tl.minimum(start + lane_m, stop - 1)", "start + lane_m"),
        ("weights of the first expert for all", UP, "expert.to(tl.int64) * stride_expert", "0 * stride_expert"),
    ],
    ("test_promises.py", "any_number_of_pieces"): [
        ("pieces of columns out of order", PARTS, "pieces = (a, b, c, d)", "pieces = (a, c, b, d)"),
        ("every piece stored at the first one's place", UP, " + i * (WIDTH // SUB_TILES)", ""),
    ],
    ("test_ops.py", "buffers_given"): [
        ("does not add to the buffer given", GEMM, "    if ACCUMULATE:", "    if False:"),
        ("adds to the buffer and returns it too", EXPERTS, "    if down_sum_EDF is not None:\n", "    if False:\n"),
    ],
    ("test_route.py", "one_place"): [
        ("last group of tiles taken as full", PARTS, "tl.minimum(num_row_tiles - first, GROUP)", "GROUP"),
        ("number of the group for its first tile", PARTS, "tile // per_group * GROUP", "tile // per_group"),
    ],
    ("test_route.py", "tiles_end or more_tiles or at_once or across or every_routing"): [
        (
            "wrong expert for later tiles",
            PLACES,
            "+ program, mask=is_tile",
            "+ program - (tile > 0).to(tl.int32), mask=is_tile",
        ),
        (
            "tiles one expert too late",
            PLACES,
            "tl.where(bins < program, tiles, 0)",
            "tl.where(bins <= program, tiles, 0)",
        ),
        ("unused row counted for the first expert", PLACES, "BINS, mask=is_used)", "BINS)"),
        ("lanes past the end counted", PLACES, "mask=row < num_rows, other=E)", "mask=row < num_rows, other=0)"),
        (
            "stale offset: the first chunk's",
            PLACES,
            "* num_chunks + program, mask=is_used",
            "* num_chunks, mask=is_used",
        ),
        ("chunks before forgotten", PLACES, "        before += tl.sum(count)", "        before = tl.sum(count)"),
        ("ranks from the back, not stable", PLACES, "lane[None, :] < lane[:, None]", "lane[None, :] > lane[:, None]"),
        ("unused row has a position", PLACES, "tl.where(is_used, position, -1)", "position"),
    ],
    ("test_overflow.py", "strides_of_inputs"): [
        ("int32 token * stride, x", UP, "token.to(tl.int64)[:, None] * stride_x", "token[:, None] * stride_x"),
        ("int32 expert * stride, up", UP, "expert.to(tl.int64) * stride_expert", "expert * stride_expert"),
        ("int32 column * stride, up", UP, "n.to(tl.int64) * stride_n", "n * stride_n"),
        ("int32 column * stride", GEMM, "column.to(tl.int64)[None, :] * stride_n", "column[None, :] * stride_n"),
        ("int32 expert * stride, backward", DOWN_BWD, "expert.to(tl.int64) * stride_expert", "expert * stride_expert"),
    ],
    ("test_overflow.py", "sorted_positions"): [
        ("int32 position in H", UP, "row = (start + lane_m).to(tl.int64)", "row = start + lane_m"),
        (
            "int32 position in Y",
            GEMM,
            "y_ptr + (start + lane_m).to(tl.int64)[:, None]",
            "y_ptr + (start + lane_m)[:, None]",
        ),
        (
            "int32 position in A",
            GEMM,
            "a_ptr + row.to(tl.int64)[:, None] * stride_a\n        weight",
            "a_ptr + row[:, None] * stride_a\n        weight",
        ),
        ("int32 position in dH", DOWN_BWD, "position = (start + lane_m).to(tl.int64)", "position = start + lane_m"),
        (
            "int32 token * stride, dy",
            DOWN_BWD,
            "token.to(tl.int64)[:, None] * stride_dy\n        c",
            "token[:, None] * stride_dy\n        c",
        ),
        ("int32 position in combine", COMBINE, "position.to(tl.int64) * D + column", "position * D + column"),
    ],
    ("test_overflow.py", "parts_of or written_past"): [
        ("int32 place of a part", COMBINE, "position.to(tl.int64) * PARTS", "position * PARTS"),
        ("int32 place of the bias's part", DOWN_BWD, "position.to(tl.int64) * num_parts", "position * num_parts"),
        ("int32 row * stride of a gradient", GEMM, "m.to(tl.int64)[:, None] * stride_m", "m[:, None] * stride_m"),
    ],
}
MUTANTS = [Mutant(*defect, tests, select) for (tests, select), defects in TABLE.items() for defect in defects]


def copy_into(folder: Path) -> None:
    """Copy what the interpreted tests need: kernels/, tests/ and the settings of pytest."""
    for name in ("kernels", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def times_found(mutant: Mutant) -> int:
    """Return how often the old text stands in the file today: once, or the table is out of date."""
    return (ROOT / KERNELS / mutant.file).read_text().count(mutant.old)


def run_tests(folder: Path, tests: str, select: str) -> int:
    """Return the exit code of the interpreted tests chosen. Raises RuntimeError if pytest could not run them."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--confcutdir=tests/moe_kernels"]
    result = subprocess.run(
        [*command, f"{TESTS}/{tests}", "-k", select],
        cwd=folder,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if result.returncode > FAILED:
        raise RuntimeError(f"pytest could not run {tests} -k {select!r}\n{result.stdout}{result.stderr}")
    return result.returncode


def is_caught(mutant: Mutant, folder: Path) -> bool:
    """Return whether the tests named for the mutant fail with it."""
    path = folder / KERNELS / mutant.file
    sound = path.read_text()
    path.write_text(sound.replace(mutant.old, mutant.new))
    try:
        return run_tests(folder, mutant.tests, mutant.select) != PASSED
    finally:
        path.write_text(sound)


def outcome_of(mutant: Mutant, folder: Path) -> str:
    """Return "caught", or what is wrong with the tests or the table."""
    if times_found(mutant) != 1:
        return "OUT OF DATE"
    return "caught" if is_caught(mutant, folder) else "SURVIVED"


def main() -> None:
    """Print what became of every mutant; exit with 1 if one survived or no longer applies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="words: mutants with one of them in their name")
    words = parser.parse_args().only
    chosen = [mutant for mutant in MUTANTS if any(word in mutant.name for word in words)]
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_into(folder)
        for tests, select in dict.fromkeys((mutant.tests, mutant.select) for mutant in chosen):
            if run_tests(folder, tests, select) != PASSED:
                sys.exit(f"{tests} -k {select!r} fails without any defect: mend that first")
        for mutant in chosen:
            begin = time.monotonic()
            outcome = outcome_of(mutant, folder)
            outcomes[outcome] += 1
            print(f"{outcome:11} {mutant.name} ({mutant.file}, {time.monotonic() - begin:.0f} s)", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    sys.exit(set(outcomes) != {"caught"})


if __name__ == "__main__":
    main()
