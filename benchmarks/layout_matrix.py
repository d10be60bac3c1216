"""The layout matrix in full: every layout against a plain torch loop of one process, in the three parts of the proof.

    python benchmarks/layout_matrix.py                    # all parts; 15 to 30 minutes on two cores
    python benchmarks/layout_matrix.py --parts fp64       # one part

tests/layouts.py lists the layouts, tests/layout_runs.py says what each part runs and how far it may deviate. The test
suite runs a set of layouts in which every two settings meet. Ends with the worst deviation of each part, writes
results/layout_matrix.csv, and exits with 1 if any layout is beyond its limits. CPU and gloo, four processes at most.
"""

import csv
import dataclasses
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

# as for pytest; the root too, or the folder tests/moe could pass for the package of that name
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from layout_runs import LIMITS, Deviation, run_fp64, run_launched, run_replayed
from layouts import Layout, all_layouts
from moe.data.prepare import prepare
from pool import Pool
from runs import small_recipe

RESULTS = Path(__file__).parent / "results" / "layout_matrix.csv"
FIGURES = [field.name for field in dataclasses.fields(Deviation)]
Part = Literal["fp64", "fp32", "replayed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    parts: tuple[Part, ...] = ("fp64", "fp32", "replayed")
    out: Path = RESULTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One layout in one part."""

    part: str  # a name of LIMITS
    layout: Layout
    deviation: Deviation
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether no figure is beyond its limit."""
        return not self.deviation.over(LIMITS[self.part])


def run(pool: Pool, part: Part, layout: Layout, root: Path) -> Result:
    """Return how far `layout` is from the plain loop in one part."""
    started = time.perf_counter()
    if part == "fp64":
        name, deviation = run_fp64(pool, layout)
    elif part == "replayed":
        name, deviation = run_replayed(pool, layout)
    else:
        name, deviation = run_launched(pool, layout, root=root, data_dir=root / "data")
    return Result(part=name, layout=layout, deviation=deviation, seconds=time.perf_counter() - started)


def line_of(result: Result) -> str:
    """One line of the table that grows as the matrix runs."""
    figures = "  ".join(f"{getattr(result.deviation, name):8.1e}" for name in FIGURES[:-1])
    verdict = "ok" if result.holds else "; ".join(result.deviation.over(LIMITS[result.part]))
    return (
        f"{result.part:18}  {result.layout!s:44}  {figures}  {result.deviation.counts:6}  "
        f"{result.seconds:5.1f} s  {verdict}"
    )


def summary(results: list[Result]) -> Table:
    """Return a table of the worst deviation of each part beside its limit."""
    table = Table(title="worst deviation from the plain loop (limit)")
    for column in ("part", "layouts", "beyond limits", *FIGURES):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in dict.fromkeys(result.part for result in results):
        of_part = [result for result in results if result.part == part]
        cells = []
        for name in FIGURES:
            worst = max(getattr(result.deviation, name) for result in of_part)
            limit = getattr(LIMITS[part], name)
            is_compared = name != "parameters" or part != "fp32"
            cells.append(f"{worst:.1e} ({limit:.0e})" if name != "counts" else str(worst))
            if not is_compared:
                cells[-1] = "-"
        table.add_row(part, str(len(of_part)), str(sum(not result.holds for result in of_part)), *cells)
    return table


def write(results: list[Result], path: Path) -> None:
    """Write one row for each layout and part; the file holds one run of the matrix."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    about = {"commit": commit.stdout.strip(), "torch": torch.__version__, "processor": platform.machine()}
    rows = [
        {
            **about,
            "part": result.part,
            "ranks": result.layout.world[0],
            "ep_size": result.layout.world[1],
            "zero_stage": result.layout.stage,
            "micro_sequences": result.layout.micro,
            "activation_checkpointing": result.layout.is_checkpointed,
            "padding": result.layout.is_padded,
            **{name: f"{value:.2g}" for name, value in dataclasses.asdict(result.deviation).items()},
            "holds": result.holds,
        }
        for result in results
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(options: Options) -> int:
    torch.set_num_threads(1)
    console = Console(highlight=False, soft_wrap=True)
    started = time.perf_counter()
    results: list[Result] = []
    pool = Pool(max_ranks=4)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if "fp32" in options.parts:
            prepare(small_recipe(root).data, report=lambda _: None)
        console.print(f"{'part':18}  {'layout':44}  {'  '.join(f'{name:>8.8}' for name in FIGURES[:-1])}  counts")
        for part in options.parts:
            for layout in all_layouts():
                results.append(run(pool, part, layout, root))
                console.print(line_of(results[-1]))
    pool.close()
    console.print(summary(results))
    write(results, options.out)
    console.print(f"{len(results)} runs in {time.perf_counter() - started:.0f} s; rows in {options.out}")
    return 0 if all(result.holds for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
