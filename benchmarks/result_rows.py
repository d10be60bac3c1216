"""Rows of results: where they were measured, how they are printed, and the CSV they are added to."""

import csv
import dataclasses
import datetime
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from checkout import current_commit as current_commit
from rich.console import Console
from rich.table import Table

# heading, field of the row, format
COLUMNS = (
    ("backend", "backend", ""),
    ("mode", "mode", ""),
    ("p20 ms", "p20_ms", ".2f"),
    ("p50 ms", "p50_ms", ".2f"),
    ("p80 ms", "p80_ms", ".2f"),
    ("to naive", "ratio_to_naive", ".2f"),
    ("GFLOP/s", "gflops", ",.0f"),
    ("% of dense", "percent_of_dense", ".0f"),
    ("% of least", "percent_of_least", ".0f"),
    ("saved MiB", "saved_mib", ".1f"),
    ("peak MiB", "peak_mib", ".1f"),
)


def describe_device(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU and how many threads it runs at once."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x{len(names)}" if names else platform.machine()


def driver() -> str:
    """Return the version of the NVIDIA driver, or nothing where nvidia-smi is missing."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 else ""


def triton_version() -> str:
    """Return the version of triton installed, or nothing."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def provenance(device: torch.device) -> dict[str, str]:
    """Return what every row says of when, of what and on what it was measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": current_commit(),
        "device": describe_device(device),
        "driver": driver() if device.type == "cuda" else "",
        "torch": torch.__version__,
        "triton": triton_version(),
    }


def append_rows(path: Path, rows: list[Any]) -> None:
    """Add rows, dataclasses of one kind, to a CSV. Raises ValueError if its columns are not theirs."""
    if not rows:
        return
    columns = [field.name for field in dataclasses.fields(rows[0])]
    is_new = not path.exists()
    if not is_new:
        found = path.read_text().splitlines()[0].split(",")
        if found != columns:
            raise ValueError(f"{path} has the columns {found}, not {columns}; move it away or choose another name")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)


def print_rows(title: str, rows: list[Any], skipped: dict[str, str]) -> None:
    """Print rows as a table without the columns that nobody filled, and below it what was left out and why."""
    filled = [column for column in COLUMNS if any(getattr(row, column[1]) is not None for row in rows)]
    table = Table(*(heading for heading, _, _ in filled), box=None, pad_edge=False)
    for row in rows:
        values = ((getattr(row, field), form) for _, field, form in filled)
        table.add_row(*("" if value is None else format(value, form) for value, form in values))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(f"\n{title}")
    console.print(table)
    for name, reason in skipped.items():
        console.print(f"skipped: {name}: {reason}", markup=False, highlight=False)
