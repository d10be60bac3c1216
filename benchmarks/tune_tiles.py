"""Search the tiles of one layer on the GPU at hand and write the best into kernels/moe_kernels/tiles.json.

    python benchmarks/tune_tiles.py --layer qwen3_30b_a3b              prints what it finds
    python benchmarks/tune_tiles.py --layer qwen3_30b_a3b --write      and rewrites the entry that serves this layer

Each kernel is tuned alone, the others keep their tiles. A candidate that does not compile or spills is skipped by
name; one that gives another answer than the safe tiles is an error. It has not been run on a GPU yet.
"""

import dataclasses
import datetime
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import triton
import tyro
from layers import LAYERS, Layer, kernel_work
from rich.console import Console

from moe_kernels import experts, tiles
from moe_kernels.experts_down_bwd import down_bwd
from moe_kernels.experts_up import up
from moe_kernels.grouped_gemm import grouped_matmul, grouped_matmul_bwd_weight
from moe_kernels.spec import PLAIN
from moe_kernels.testing import rms_ratio
from moe_kernels.tiles import TABLE, Tile

Call = Callable[[Tile], torch.Tensor]
# which kernel of layers.kernel_work stands for an entry's kernel
WORK = {"up": "up", "matmul": "dX", "down_bwd": "down_bwd", "weight_bwd": "dW1"}


def candidates(kernel: str, block_m: int, use_tma: bool) -> Iterator[Tile]:
    """Yield the tiles worth a try: warps follow the size of the accumulator, deep pipelines where memory allows."""
    heights = (64, 128) if kernel == "weight_bwd" else (block_m,)
    for height, width, depth, stages in itertools.product(heights, (64, 128, 256), (32, 64, 128), (2, 3, 4, 5)):
        warps = 8 if height * width > 128 * 64 else 4
        pieces = (1,) if kernel == "weight_bwd" else (2, 4, 8) if kernel == "down_bwd" else (1, 2, 4)
        flattens = (False,) if kernel == "weight_bwd" else (False, True)
        for flatten, sub_tiles, per_sm in itertools.product(flattens, pieces, (1, 2, 3)):
            yield Tile(
                block_m=height,
                block_n=width,
                block_k=depth,
                num_warps=warps,
                num_stages=stages,
                use_tma=use_tma and kernel != "weight_bwd",
                flatten=flatten,
                sub_tiles=sub_tiles,
                per_sm=per_sm,
            )


def calls_of(layer: Layer, entry: str) -> dict[str, Call]:
    """Return one call per kernel of the layer in bfloat16 on random data, as the layer makes it."""
    draw = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, device="cuda", dtype=torch.bfloat16).mul_(scale)

    T, D, F, E, K = layer
    x_TD, dy_TD = normal(T, D), normal(T, D)
    w1 = experts.first_weights(normal(E, 2 * F, D, scale=D**-0.5), PLAIN)
    w2 = experts.second_weights(normal(E, D, F, scale=F**-0.5), PLAIN)
    expert_N = torch.rand(T, E, generator=draw, device="cuda").topk(min(K, E), dim=1).indices.flatten()
    token_N = torch.arange(T, device="cuda").repeat_interleave(min(K, E))
    weight_N = torch.rand(token_N.numel(), generator=draw, device="cuda")
    sizes = {"num_tokens": T, "num_experts": E, "fan_out": min(K, E)}
    plan = experts.route_rows(token_N, expert_N, **sizes, itemsize=2, tiles=entry).schedule
    tile = tiles.table()[entry].tiles
    h_NH, _ = up(x_TD, w1, plan, tile["up"], spec=PLAIN, bias_EH=None, keep_hidden=True)
    dh_NH, _, _ = down_bwd(dy_TD, w2.transposed(), h_NH, weight_N, plan, tile["down_bwd"], spec=PLAIN, bias_ED=None)
    gradient = experts.first_weights(torch.empty_like(w1.tensor), PLAIN)

    def weight_bwd(tile: Tile) -> torch.Tensor:
        grouped_matmul_bwd_weight(dh_NH, x_TD, gradient, plan, tile, gather_q=True)
        return gradient.tensor

    return {
        "up": lambda tile: up(x_TD, w1, plan, tile, spec=PLAIN, bias_EH=None, keep_hidden=True)[1],
        "matmul": lambda tile: grouped_matmul(dh_NH, w1.transposed(), plan, tile),
        "down_bwd": lambda tile: down_bwd(dy_TD, w2.transposed(), h_NH, weight_N, plan, tile, spec=PLAIN, bias_ED=None)[
            0
        ],
        "weight_bwd": weight_bwd,
    }


def tune(call: Call, kernel: str, start: Tile, console: Console, quick: bool) -> tuple[Tile, float]:
    """Return the fastest tile and its milliseconds; the tile of the table is the one to beat."""
    expected = call(start).clone()
    best, best_ms = start, triton.testing.do_bench(lambda: call(start))
    console.print(f"{kernel}: {best_ms:.3f} ms with {start}")
    tried = [tile for tile in candidates(kernel, start.block_m, start.use_tma) if tile != start]
    for tile in tried[:: 8 if quick else 1]:
        try:
            answer = call(tile)
        except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError) as error:
            console.print(f"  skipped {tile}: {type(error).__name__}")
            continue
        # rows that are not in use are rubbish, and every row is in use here
        assert rms_ratio(answer, expected) < 5e-3, f"{tile} gives another answer"
        milliseconds = triton.testing.do_bench(lambda tile=tile: call(tile))
        if milliseconds < 0.99 * best_ms:
            best, best_ms = tile, milliseconds
            console.print(f"  {best_ms:.3f} ms with {tile}")
    return best, best_ms


def write(entry: str, found: dict[str, Tile], seen: str) -> None:
    """Put the tiles and what was seen into the entry of tiles.json."""
    table = json.loads(TABLE.read_text())
    (row,) = [row for row in table if row["name"] == entry]
    plain = Tile(block_m=0, block_n=0, block_k=0, num_warps=0, num_stages=0)
    for kernel, tile in found.items():
        fields = dataclasses.asdict(tile)
        optional = dataclasses.asdict(plain)
        required = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
        row["tiles"][kernel] = {k: v for k, v in fields.items() if k in required or v != optional[k]}
    row["seen"] = seen
    TABLE.write_text(tiles.dump(table))


def main(
    layer: Literal["olmoe_1b_7b", "qwen3_30b_a3b", "qwen3_next_80b", "gpt_oss_20b", "mixtral_8x7b"],
    tokens: int | None = None,
    kernels: tuple[Literal["up", "matmul", "down_bwd", "weight_bwd"], ...] = tiles.KERNELS,
    quick: bool = False,
    write_table: bool = False,
) -> None:
    """Tune the tiles of a layer.

    Args:
        layer: widths, experts and fan-out, by the model they belong to.
        tokens: how many; the layer's own number if not given.
        kernels: which to tune.
        quick: try every eighth candidate.
        write_table: write the best into tiles.json.
    """
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a CUDA GPU; benchmarks/inspect_kernels.py compiles without one")
    console = Console()
    shape = LAYERS[layer]._replace(T=tokens or LAYERS[layer].T)
    device = torch.device("cuda", torch.cuda.current_device())
    arch = experts.launch.arch_of(device)
    entry = tiles.choose(arch=arch, itemsize=2, num_rows=shape.T * shape.K, num_experts=shape.E)
    console.print(f"{layer}, {shape}: entry {entry} on {torch.cuda.get_device_name(device)}")
    calls = calls_of(shape, entry)
    found, notes = {}, []
    for kernel in kernels:
        found[kernel], milliseconds = tune(calls[kernel], kernel, tiles.table()[entry].tiles[kernel], console, quick)
        tflops = kernel_work(shape)[WORK[kernel]].flops / milliseconds / 1e9
        notes.append(f"{kernel} {milliseconds:.3f} ms {tflops:.0f} TFLOP/s")
        console.print(f"{kernel}: best {found[kernel]}, {notes[-1]}")
    if write_table:
        where = f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}, {datetime.date.today()}, {layer}"
        write(entry, found, f"{where}: {', '.join(notes)}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
