"""What import, upcycling and export cost: GB/s, and memory beside that of the libraries.

    python benchmarks/bench_convert.py                            # a dense model of 1 GB, experts of 2.9 GB made of it
    python benchmarks/bench_convert.py --machine cpu_2core_epyc   # and adds rows to results/convert_cpu_2core_epyc.csv
    python benchmarks/bench_convert.py --layers 24 --folder DIR   # four times as large, in DIR

A dense model of random bfloat16 weights is written tensor by tensor and taken through every conversion, each in a fresh
process. Answers are checked first: what was exported and comes in again has the same sha256 in every file, and
experts are the slices of the dense feed-forward that they should be, to the bit.

Memory is sampled from /proc every few milliseconds and counted from where the process stood with all libraries
imported. Anonymous memory is what the conversion holds. The total also counts pages of the files that it reads, which
are mapped: the kernel keeps them as long as nobody needs the room. The bound: anonymous memory under twice the largest
tensor of either side plus 200 MB. GB/s are bytes written over time, sha256 and fsync included, on one thread.
"""

import datetime
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import tyro
from result_rows import append_rows, current_commit
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moe.checkpoint import CheckpointReader
from moe.checkpoint.manifest import STATE, read_manifest
from moe.checkpoint.model_folder import open_model_folder, write_model
from moe.checkpoint.stream import Entry
from moe.config import ModelConfig
from moe.convert.hf import export_hf, import_hf, open_source
from moe.model import Model
from moe.parallel.groups import ParallelGroups
from moe.upcycle import UpcycleConfig
from moe.upcycle.run import plan, upcycle

RESULTS = Path(__file__).parent / "results"
MB = 1e6
SLACK_MB = 200.0
COPY = UpcycleConfig(method="copy", num_experts=4, top_k=2)
FINE_GRAINED = UpcycleConfig(method="fine_grained", num_experts=8, top_k=4, granularity=2)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One conversion: the median of the rounds in time, the largest of them in memory."""

    date: str
    commit: str
    torch: str
    conversion: str
    read_gb: float
    written_gb: float
    seconds: float
    cpu_seconds: float
    written_gb_per_s: float  # of the clock, disk and neighbours included
    written_gb_per_cpu_s: float
    largest_tensor_mb: float
    libraries_mb: float  # resident before the conversion
    anonymous_mb: float  # peak above that
    total_mb: float  # peak above that, mapped pages of files included
    bound_mb: float  # of anonymous_mb


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one run of a conversion took."""

    seconds: float
    cpu_seconds: float
    libraries_mb: float
    anonymous_mb: float
    total_mb: float


def make_dense(folder: Path, *, layers: int, width: int) -> None:
    """Write a model folder of random weights, one tensor in memory at a time."""
    config = ModelConfig(
        vocab_size=32768,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        qk_norm="head",
        intermediate_size=4 * width,
        num_experts=0,
        num_experts_per_tok=0,
        moe_intermediate_size=0,
    )
    with torch.device("meta"):
        model = Model(config, groups=ParallelGroups.single())
    entries = [
        Entry(name=f"model/{name}", dtype=torch.bfloat16, shape=tuple(parameter.shape))
        for name, parameter in model.named_parameters()
    ]

    def tensors() -> Iterator[Tensor]:
        draw = torch.Generator().manual_seed(0)
        for entry in entries:
            yield torch.randn(entry.shape, generator=draw).mul_(0.02).to(entry.dtype)

    write_model(folder, config, entries, tensors(), origin="random")


def convert_in(source: Path, out: Path) -> None:
    """Import."""
    import_hf(source, out)


def convert_out(source: Path, out: Path) -> None:
    """Export. Hashes of the source are not checked, as that reads it once more."""
    config, reader = open_model_folder(source, check_hashes=False)
    export_hf(config, reader, out, tokenizer_dir=source / "tokenizer")


def copy(source: Path, out: Path) -> None:
    """Upcycle by copies."""
    upcycle(plan(source, COPY), out)


def fine_grained(source: Path, out: Path) -> None:
    """Upcycle by slices."""
    upcycle(plan(source, FINE_GRAINED), out)


def memory(pid: int | str) -> tuple[float, float]:
    """Return anonymous and all resident memory of a process, in MB."""
    lines = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    kilobytes = {line[0]: int(line[1]) for line in lines if line[0].startswith(("Rss", "VmRSS"))}
    return kilobytes["RssAnon:"] * 1024 / MB, kilobytes["VmRSS:"] * 1024 / MB


def work(convert: Callable[[Path, Path], None], source: Path, out: Path, connection: Connection) -> None:
    """Convert when told to, in a process of its own, and send back seconds: of the clock, of the cores."""
    torch.set_num_threads(1)
    connection.send("ready")
    connection.recv()
    wall, core = time.perf_counter(), time.process_time()
    convert(source, out)
    connection.send((time.perf_counter() - wall, time.process_time() - core))
    connection.recv()


def measure(convert: Callable[[Path, Path], None], source: Path, out: Path) -> Cost:
    """Run a conversion in a fresh process and sample its memory."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(convert, source, out, there))
    process.start()
    there.close()
    here.recv()
    assert process.pid is not None
    before = memory(process.pid)
    samples = []
    here.send("go")
    while not here.poll(0.003):
        samples.append(memory(process.pid))
    seconds, cpu_seconds = here.recv()
    here.send("done")
    process.join()
    anonymous, total = (max(values) for values in zip(*samples, strict=True))
    return Cost(
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        libraries_mb=before[1],
        anonymous_mb=anonymous - before[0],
        total_mb=total - before[1],
    )


def check_equal(one: Path, other: Path) -> None:
    """Assert that two model folders hold the same bytes, by the sha256 of their files."""
    open_model_folder(other)  # the files are what their manifest says
    manifests = (read_manifest(folder / "checkpoints/step_00000000") for folder in (one, other))
    first, second = (
        {name: file.sha256 for name, file in manifest.files.items() if name != STATE} for manifest in manifests
    )
    assert first and first == second, f"{one} and {other} differ"


def check_experts(dense: CheckpointReader, folder: Path, config: UpcycleConfig) -> None:
    """Assert that the experts of the first layer are slices of its feed-forward, to the bit."""
    G = config.granularity
    gate, up = (dense.read(f"model/layers.0.feed_forward.{name}_proj.weight") for name in ("gate", "up"))
    stack = open_model_folder(folder)[1].read("model/layers.0.moe.experts.gate_up_proj")
    for e, expert in enumerate(stack):
        assert torch.equal(expert, torch.cat((gate.chunk(G)[e % G], up.chunk(G)[e % G])))


def size(folder: Path) -> float:
    """Return the size of the weights in a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def largest(folder: Path) -> float:
    """Return the size of the largest tensor of a model of ours or of transformers, in bytes."""
    if (folder / "config.json").is_file():
        return max(entry.bytes for entry in open_source(folder).entries)
    reader = open_model_folder(folder, check_hashes=False)[1]
    return max(
        Entry(name=name, dtype=reader.dtype(name), shape=reader.shape(name)).bytes for name in sorted(reader.names)
    )


def run(folder: Path, rounds: int) -> list[Row]:
    """Return a row per conversion; `folder` holds the dense model and gets all the others."""
    # name, conversion, source, result, and the folder that the result must equal
    steps = [
        ("export, dense", convert_out, "dense", "dense_hf", ""),
        ("import, dense", convert_in, "dense_hf", "dense_again", "dense"),
        ("upcycle, copy", copy, "dense_hf", "copy", ""),
        ("upcycle, fine-grained", fine_grained, "dense_hf", "fine", ""),
        ("export, MoE", convert_out, "fine", "fine_hf", ""),
        ("import, MoE", convert_in, "fine_hf", "fine_again", "fine"),
    ]
    rows = []
    for name, convert, source, result, same in steps:
        costs = []
        for _ in range(rounds):
            shutil.rmtree(folder / result, ignore_errors=True)
            costs.append(measure(convert, folder / source, folder / result))
        if same:
            check_equal(folder / same, folder / result)
        if convert in (copy, fine_grained):
            dense = open_model_folder(folder / "dense", check_hashes=False)[1]
            check_experts(dense, folder / result, COPY if convert is copy else FINE_GRAINED)
        written, tensor = size(folder / result), max(largest(folder / source), largest(folder / result)) / MB
        seconds = statistics.median(cost.seconds for cost in costs)
        cpu_seconds = statistics.median(cost.cpu_seconds for cost in costs)
        rows.append(
            Row(
                date=datetime.date.today().isoformat(),
                commit=current_commit(),
                torch=torch.__version__,
                conversion=name,
                read_gb=round(size(folder / source) / 1e9, 2),
                written_gb=round(written / 1e9, 2),
                seconds=round(seconds, 2),
                cpu_seconds=round(cpu_seconds, 2),
                written_gb_per_s=round(written / 1e9 / seconds, 3),
                written_gb_per_cpu_s=round(written / 1e9 / cpu_seconds, 3),
                largest_tensor_mb=round(tensor),
                libraries_mb=round(max(cost.libraries_mb for cost in costs)),
                anonymous_mb=round(max(cost.anonymous_mb for cost in costs)),
                total_mb=round(max(cost.total_mb for cost in costs)),
                bound_mb=round(2 * tensor + SLACK_MB),
            )
        )
        if result in ("copy", "dense_again", "fine_again"):
            shutil.rmtree(folder / result)
    return rows


def main(layers: int = 6, width: int = 2048, rounds: int = 3, machine: str = "", folder: Path | None = None) -> None:
    """Convert, check, print, and add rows to results/convert_<machine>.csv if a machine is named."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        make_dense(Path(temporary) / "dense", layers=layers, width=width)
        rows = run(Path(temporary), rounds)
    names = [field.name for field in fields(Row)][3:]
    table = Table(*(name.replace("_", " ") for name in names), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(str(getattr(row, name)) for name in names))
    Console(width=200).print(table)
    over = [row.conversion for row in rows if row.anonymous_mb > row.bound_mb]
    print(f"above the bound: {', '.join(over) or 'none'}")
    if machine:
        append_rows(RESULTS / f"convert_{machine}.csv", rows)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
