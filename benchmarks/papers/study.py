"""What runs a study of toy.py: every variant on every text with every seed, its CSV files and its table.

Rows go to benchmarks/results/NAME.csv, training curves to NAME_curves.csv beside it.
"""

import csv
import dataclasses
import math
import statistics
import sys
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table
from toy import Point, Row, Variant, train

sys.path.append(str(Path(__file__).parents[1]))  # a script finds its own folder, not the one above
from result_rows import append_rows, current_commit

ROOT = Path(__file__).parents[2]
RESULTS, IMAGES = ROOT / "benchmarks/results", ROOT / "docs/images"
Record = TypeVar("Record")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to run. A study is what the defaults say."""

    texts: tuple[Literal["chains", "corpus"], ...] = ("chains", "corpus")
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 500
    record: bool = True
    """Append rows to benchmarks/results and draw the picture in docs/images."""
    resume: bool = False
    """Take runs with these settings from the CSV files where they have them, and train only the rest."""


def run_study(
    name: str, variants: dict[str, Variant], options: Options, *, baseline: str = "top-2"
) -> tuple[list[Row], list[Point]]:
    """Return the rows and the curves of all runs, and print a table for each text."""
    torch.set_num_threads(1)  # the clock sees one thread
    console = Console(width=160)
    path, curves = RESULTS / f"{name}.csv", RESULTS / f"{name}_curves.csv"
    known_rows, known_points = (read(path, Row), read(curves, Point)) if options.resume else ([], [])
    rows, points = [], []
    commit = current_commit()
    for text in options.texts:
        for seed in options.seeds:
            for key, variant in variants.items():
                row, curve = _recorded(known_rows, known_points, (text, options.steps, key, seed))
                if row is None:
                    row, curve = train(text, key, variant, seed, options.steps, commit=commit, report=console.log)
                    if options.record:
                        append_rows(path, [row])
                        append_rows(curves, curve)
                rows.append(row)
                points += curve
        show(console, text, [row for row in rows if row.text == text], baseline)
    return rows, points


def _recorded(
    rows: list[Row], points: list[Point], run: tuple[str, int, str, int]
) -> tuple[Row, list[Point]] | tuple[None, list[Point]]:
    """Return the newest recorded run of these settings with its curve, if there is one."""
    same = [row for row in rows if (row.text, row.steps, row.variant, row.seed) == run]
    curve = {p.step: p for p in points if (p.text, p.steps, p.variant, p.seed) == run}
    return (same[-1], list(curve.values())) if same else (None, [])


def read(path: Path, kind: type[Record]) -> list[Record]:
    """Return the rows of a CSV file, none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return TypeAdapter(list[kind]).validate_python(list(csv.DictReader(file)))


def show(console: Console, title: str, rows: list[Any], baseline: str) -> None:
    """Print mean and spread over seeds, a line per figure, a column per variant; and the loss minus the baseline's."""
    names = list(dict.fromkeys(row.variant for row in rows))
    table = Table(title, *names, box=None, pad_edge=False)
    for figure in (field.name for field in dataclasses.fields(rows[0]) if field.type is float):
        table.add_row(figure.replace("_", " "), *(spread(rows, name, figure) for name in names))
    if baseline in names:
        losses = {(row.variant, row.seed): row.loss for row in rows}
        differences = (
            " ".join(f"{row.loss - losses[baseline, row.seed]:+.3f}" for row in rows if row.variant == name)
            for name in names
        )
        table.add_row(f"loss to {baseline}", *differences)
    console.print(table)


def spread(rows: list[Any], variant: str, figure: str) -> str:
    """Return mean and standard deviation over seeds; a dash where there is nothing to measure."""
    values = [getattr(row, figure) for row in rows if row.variant == variant]
    if any(math.isnan(value) for value in values):
        return "-"
    return f"{statistics.mean(values):.3f} +-{statistics.stdev(values) if len(values) > 1 else 0.0:.3f}"
