"""Search the tiles of one layer on the GPU at hand and write the best into kernels/moe_kernels/tiles.json.

    python benchmarks/tune_tiles.py --layer qwen3_30b_a3b                      prints what it finds
    python benchmarks/tune_tiles.py --layer qwen3_30b_a3b --write-table        and rewrites the entry of this layer
    python benchmarks/tune_tiles.py --layer qwen3_30b_a3b --tokens 4096        the entry for few rows per expert

Each kernel is tuned alone, the others keep their tiles; one that serves two products is tuned on both. Candidates are
compiled by many processes first, as a compilation takes longer than a measurement by far. One that does not compile or
spills registers is skipped by name; one that gives another answer than the tile of the table is an error.
"""

import concurrent.futures
import dataclasses
import datetime
import functools
import itertools
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import triton
import tyro
from bench_kernels import TILE_OF, Product, Tensors, draw_tensors, products_of
from layers import LAYERS, Layer, kernel_work
from rich.console import Console

from moe_kernels import launch, tiles
from moe_kernels.experts_down_bwd import experts_bwd_down_kernel
from moe_kernels.experts_up import experts_fwd_up_kernel
from moe_kernels.grouped_gemm import grouped_matmul_bwd_weight_kernel, grouped_matmul_fwd_kernel
from moe_kernels.testing import rms_ratio
from moe_kernels.tiles import TABLE, Tile

# which kernels of layers.kernel_work an entry's kernel does
WORK = {kernel: tuple(name for name in TILE_OF if TILE_OF[name] == kernel) for kernel in tiles.KERNELS}
JITTED = {
    "up": experts_fwd_up_kernel,
    "matmul": grouped_matmul_fwd_kernel,
    "down_bwd": experts_bwd_down_kernel,
    "weight_bwd": grouped_matmul_bwd_weight_kernel,
}
SHARED, REGISTERS = 227 << 10, 65536  # of one multiprocessor of sm_90 and sm_100: bytes, and 32-bit registers
MOST_REGISTERS = 255  # of one thread
FINALISTS, ROUNDS = 4, 5  # that are measured again, and how often
COMPILED_TOKENS = 256  # sizes in rows do not specialise a kernel: few tokens compile the same one


def candidates(kernel: str, block_m: int, use_tma: bool) -> Iterator[Tile]:
    """Yield the tiles worth a try: those that fit, alone on a multiprocessor or in pairs."""
    is_gradient = kernel == "weight_bwd"
    sides = [(block_m, width) for width in (128, 256)]
    if is_gradient:
        sides = [(128, 128), (128, 256), (256, 128)]
    pieces = (1,) if is_gradient else (4, 8) if kernel == "down_bwd" else (1, 2, 4)
    flattens = (False,) if kernel == "down_bwd" else (True, False)
    for (height, width), depth, stages, per_sm in itertools.product(sides, (64, 128), (2, 3, 4, 5), (1, 2, 3)):
        if (depth == 64) == (stages == 2):  # two deep stages or several shallow ones
            continue
        shared = stages * depth * (height + width) * 2
        # a second program is worth its shared memory, a third that would fit is not left out
        if not SHARED // (per_sm + 1) - (8 << 10) < shared <= SHARED // per_sm - (8 << 10):
            continue
        # small tiles alone leave the matrix units waiting at both ends of each
        if per_sm == 1 and height * width <= 128 * 128:
            continue
        for warps in (4, 8):
            if height * width / (32 * warps) > 128 or height * width / (32 * warps) < 32:
                continue
            limit = REGISTERS // (per_sm * 32 * warps) // 8 * 8
            for sub_tiles, flatten in itertools.product(pieces, flattens):
                yield Tile(
                    block_m=height,
                    block_n=width,
                    block_k=depth,
                    num_warps=warps,
                    num_stages=stages,
                    use_tma=use_tma,
                    flatten=flatten,
                    sub_tiles=sub_tiles,
                    per_sm=per_sm,
                    max_registers=limit if limit < MOST_REGISTERS else 0,
                )


def calls_of(data: Tensors) -> dict[str, Product]:
    """Return one call per kernel of the table: all the products that it makes in the layer."""
    products = products_of(data)

    def calls(kernel: str) -> Product:
        return lambda tile: [answer for name in WORK[kernel] for answer in products[name](tile)]

    return {kernel: calls(kernel) for kernel in WORK}


def num_spills(kernel: str) -> int:
    """Return the bytes of registers that what was compiled of a kernel so far keeps in memory."""
    return sum(form.n_spills for cache in JITTED[kernel].device_caches.values() for form in cache[0].values())


def compile_tiles(layer: Layer, entry: str, work: list[tuple[str, Tile]]) -> list[str]:
    """Compile the kernels of these tiles into Triton's cache on disk; return what went wrong with each, or nothing."""
    calls = calls_of(draw_tensors(layer._replace(T=COMPILED_TOKENS), entry))
    answers = []
    for kernel, tile in work:
        before = num_spills(kernel)
        try:
            calls[kernel](tile)
            torch.cuda.synchronize()
            answers.append("it spills registers" if num_spills(kernel) > before else "")
        except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError, RuntimeError) as error:
            answers.append(f"{type(error).__name__}: {error}".splitlines()[0])
    return answers


def compile_all(
    layer: Layer, entry: str, work: list[tuple[str, Tile]], jobs: int
) -> tuple[list[tuple[str, Tile]], dict[str, str]]:
    """Compile everything with `jobs` processes; return what compiled, and why the others did not."""
    shares = [work[i::jobs] for i in range(min(jobs, len(work)))]
    context = multiprocessing.get_context("spawn")
    good, bad = [], {}
    with concurrent.futures.ProcessPoolExecutor(len(shares), mp_context=context) as pool:
        pairs = zip(shares, pool.map(functools.partial(compile_tiles, layer, entry), shares), strict=True)
        for share, answers in pairs:
            for (kernel, tile), answer in zip(share, answers, strict=True):
                if answer:
                    bad[f"{kernel} {tile}"] = answer
                else:
                    good.append((kernel, tile))
    return [pair for pair in work if pair in good], bad


def time_ms(call: Callable[[], object], rep: int = 60) -> float:
    """Return the median of the milliseconds of a call."""
    return triton.testing.do_bench(call, warmup=10, rep=rep, return_mode="median")


def tune(call: Product, kernel: str, start: Tile, tried: list[Tile], console: Console) -> tuple[Tile, float]:
    """Return the fastest tile and its milliseconds; the tile of the table is the one to beat."""
    expected = [answer.clone() for answer in call(start)]
    timed = [(time_ms(lambda: call(start)), start)]
    console.print(f"{kernel}: {timed[0][0]:.3f} ms with {start}")
    for tile in tried:
        # rows that are not in use are rubbish, and every row is in use here
        for answer, wanted in zip(call(tile), expected, strict=True):
            assert rms_ratio(answer, wanted) < 5e-3, f"{tile} gives another answer"
        timed.append((time_ms(lambda tile=tile: call(tile)), tile))
    timed.sort(key=lambda pair: pair[0])
    for milliseconds, tile in timed[:8]:
        console.print(f"  {milliseconds:.3f} ms {json.dumps(compact(tile))}")
    # the first few again and in turns: they lie within each other's noise, and the clock falls as the chip warms up
    again: dict[Tile, list[float]] = {tile: [] for _, tile in timed[:FINALISTS]}
    for _ in range(ROUNDS):
        for tile, values in again.items():
            values.append(time_ms(lambda tile=tile: call(tile)))
    best = min(again, key=lambda tile: statistics.median(again[tile]))
    return best, statistics.median(again[best])


def compact(tile: Tile) -> dict[str, int | bool]:
    """Return the fields of a tile as tiles.json has them: those at their default left out."""
    required = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
    defaults = {field.name: field.default for field in dataclasses.fields(Tile)}
    return {k: v for k, v in dataclasses.asdict(tile).items() if k in required or v != defaults[k]}


def write(entry: str, found: dict[str, Tile], seen: str) -> None:
    """Put the tiles and what was seen into the entry of tiles.json."""
    table = json.loads(TABLE.read_text())
    (row,) = [row for row in table if row["name"] == entry]
    for kernel, tile in found.items():
        row["tiles"][kernel] = compact(tile)
    row["seen"] = seen
    TABLE.write_text(tiles.dump(table))


def main(
    layer: Literal["olmoe_1b_7b", "qwen3_30b_a3b", "qwen3_next_80b", "gpt_oss_20b", "mixtral_8x7b"],
    tokens: int | None = None,
    kernels: tuple[Literal["up", "matmul", "down_bwd", "weight_bwd"], ...] = tiles.KERNELS,
    jobs: int = 0,
    write_table: bool = False,
) -> None:
    """Tune the tiles of a layer.

    Args:
        layer: widths, experts and fan-out, by the model they belong to.
        tokens: how many; the layer's own number if not given.
        kernels: which to tune.
        jobs: processes that compile; 0 takes one per core, 14 at most.
        write_table: write the best into tiles.json.
    """
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a CUDA GPU; benchmarks/inspect_kernels.py compiles without one")
    console = Console(width=200)
    shape = LAYERS[layer]._replace(T=tokens or LAYERS[layer].T)
    device = torch.device("cuda", torch.cuda.current_device())
    arch = launch.arch_of(device)
    entry = tiles.choose(arch=arch, itemsize=2, num_rows=shape.T * shape.K, num_experts=shape.E)
    console.print(f"{layer}, {shape}: entry {entry} on {torch.cuda.get_device_name(device)}")
    starts = tiles.table()[entry].tiles
    use_tma = starts["up"].use_tma
    work = [(k, t) for k in kernels for t in candidates(k, starts["up"].block_m, use_tma) if t != starts[k]]
    jobs = jobs or min(14, os.cpu_count() or 1)
    work, bad = compile_all(shape, entry, [(k, starts[k]) for k in kernels] + work, jobs)
    for name, reason in bad.items():
        console.print(f"skipped {name}: {reason}", markup=False, highlight=False)
    calls = calls_of(draw_tensors(shape, entry))
    found, notes = {}, []
    for kernel in kernels:
        tried = [tile for name, tile in work if name == kernel and tile != starts[kernel]]
        found[kernel], milliseconds = tune(calls[kernel], kernel, starts[kernel], tried, console)
        tflops = sum(kernel_work(shape)[name].flops for name in WORK[kernel]) / milliseconds / 1e9
        notes.append(f"{kernel} {milliseconds:.3f} ms {tflops:.0f} TFLOP/s")
        console.print(f"{kernel}: best {json.dumps(compact(found[kernel]))}, {notes[-1]}")
    if write_table:
        where = f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}, {datetime.date.today()}, {layer}"
        write(entry, found, f"{where}, T {shape.T}: {', '.join(notes)}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
