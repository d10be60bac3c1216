"""Time every kernel of an expert layer alone on the GPU at hand, beside its roof and beside torch's grouped_mm.

    python benchmarks/bench_kernels.py                                     # prints a table
    python benchmarks/bench_kernels.py --layers olmoe_1b_7b --machine h200  # adds rows to results/kernels_h200.csv
    ncu --clock-control none --section SpeedOfLight --section MemoryWorkloadAnalysis \
        python benchmarks/bench_kernels.py --once --layers qwen3_30b_a3b    # what bounds each kernel

The roof of a kernel is the larger of its FLOPs over the speed of a dense product and its bytes over that of a copy,
both measured in the same run on random data. grouped_mm gets its rows gathered beforehand and does no activation: it
shows what the product alone costs in a kernel that is not ours. bfloat16, random routing, SwiGLU.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import tyro
from layers import LAYERS, Layer, Work, kernel_work
from result_rows import append_rows, provenance
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from moe_kernels import combine, experts, tiles
from moe_kernels.experts_down_bwd import down_bwd
from moe_kernels.experts_up import up
from moe_kernels.grouped_gemm import grouped_matmul, grouped_matmul_bwd_weight
from moe_kernels.spec import PLAIN
from moe_kernels.tiles import Tile

RESULTS = Path(__file__).parent / "results"
DENSE = 8192  # rows and columns of the dense product that sets the roof
Product = Callable[[Tile], list[Tensor]]
# the matrix kernels of layers.kernel_work -> their name in tiles.json
TILE_OF = {
    "up": "up",
    "down": "matmul",
    "down_bwd": "down_bwd",
    "dW2": "weight_bwd",
    "dX": "matmul",
    "dW1": "weight_bwd",
}
COPIED = 2**32  # bytes of the copy that sets the roof


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of results: one kernel of one layer. Empty: does not apply."""

    date: str
    commit: str
    device: str
    driver: str
    torch: str
    triton: str
    layer: str
    T: int
    D: int
    F: int
    E: int
    K: int
    tiles: str
    kernel: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    tflops: float | None
    tb_per_s: float | None
    dense_tflops: float
    copy_tb_per_s: float
    bound: str
    percent_of_roof: float | None
    grouped_mm_ms: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Time the kernels of expert layers."""

    layers: tuple[str, ...] = ("qwen3_30b_a3b", "olmoe_1b_7b")
    """Names in layers.LAYERS."""
    tokens: int | None = None
    """Number of tokens in the place of each layer's own."""
    entry: str | None = None
    """Name of an entry of tiles.json; the one that serves the layer if not given."""
    machine: str = ""
    """Name of the kind of machine: rows are added to results/kernels_<machine>.csv. Empty: only print."""
    once: bool = False
    """Run every kernel once and time nothing: for profilers."""


@dataclasses.dataclass(frozen=True)
class Tensors:
    """What the kernels of one layer are called on."""

    layer: Layer
    entry: str
    routed: experts.Routed
    token_N: Tensor
    expert_N: Tensor
    x_TD: Tensor
    dy_TD: Tensor
    weight_N: Tensor
    gate_up_E2FD: Tensor
    down_EDF: Tensor
    h_NH: Tensor
    a_NF: Tensor
    y_ND: Tensor
    dh_NH: Tensor
    partial_NP: Tensor


def draw_tensors(layer: Layer, entry: str | None) -> Tensors:
    """Return random tokens, weights and routing in bfloat16, and what the kernels make of them."""
    draw = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=draw, device="cuda", dtype=torch.bfloat16).mul_(scale)

    T, D, F, E, K = layer
    fan_out = min(K, E)
    x_TD, dy_TD = normal(T, D), normal(T, D)
    gate_up, down = normal(E, 2 * F, D, scale=D**-0.5), normal(E, D, F, scale=F**-0.5)
    expert_N = torch.rand(T, E, generator=draw, device="cuda").topk(fan_out, dim=1).indices.flatten()
    token_N = torch.arange(T, device="cuda").repeat_interleave(fan_out)
    weight_N = torch.rand(token_N.numel(), generator=draw, device="cuda")
    sizes = {"num_tokens": T, "num_experts": E, "fan_out": fan_out}
    routed = experts.route_rows(token_N, expert_N, **sizes, itemsize=2, tiles=entry)
    plan, tile = routed.schedule, tiles.table()[routed.tiles].tiles
    w1, w2 = experts.first_weights(gate_up, PLAIN), experts.second_weights(down, PLAIN)
    h_NH, a_NF = up(x_TD, w1, plan, tile["up"], spec=PLAIN, bias_EH=None, keep_hidden=True)
    y_ND = grouped_matmul(a_NF, w2, plan, tile["matmul"])
    dh_NH, _, partial = down_bwd(
        dy_TD, w2.transposed(), h_NH, weight_N, plan, tile["down_bwd"], spec=PLAIN, bias_ED=None
    )
    return Tensors(
        layer, routed.tiles, routed, token_N, expert_N, x_TD, dy_TD, weight_N, gate_up, down, h_NH, a_NF, y_ND, dh_NH,
        partial,
    )  # fmt: skip


def products_of(data: Tensors) -> dict[str, Product]:
    """Return one call per matrix kernel, as the layer makes it; given a tile, it returns what the kernel makes."""
    plan = data.routed.schedule
    w1, w2 = experts.first_weights(data.gate_up_E2FD, PLAIN), experts.second_weights(data.down_EDF, PLAIN)
    dw1 = experts.first_weights(torch.empty_like(data.gate_up_E2FD), PLAIN)
    dw2 = experts.second_weights(torch.empty_like(data.down_EDF), PLAIN)

    def bwd_down(tile: Tile) -> list[Tensor]:
        tensors = (data.dy_TD, w2.transposed(), data.h_NH, data.weight_N)
        return list(down_bwd(*tensors, plan, tile, spec=PLAIN, bias_ED=None)[:2])  # parts differ from tile to tile

    def first_gradient(tile: Tile) -> list[Tensor]:
        grouped_matmul_bwd_weight(data.dh_NH, data.x_TD, dw1, plan, tile, gather_q=True)
        return [dw1.tensor]

    def second_gradient(tile: Tile) -> list[Tensor]:
        grouped_matmul_bwd_weight(data.dy_TD, data.a_NF, dw2, plan, tile, gather_p=True)
        return [dw2.tensor]

    return {
        "up": lambda tile: list(up(data.x_TD, w1, plan, tile, spec=PLAIN, bias_EH=None, keep_hidden=True)),
        "down": lambda tile: [grouped_matmul(data.a_NF, w2, plan, tile)],
        "down_bwd": bwd_down,
        "dW2": second_gradient,
        "dX": lambda tile: [grouped_matmul(data.dh_NH, w1.transposed(), plan, tile)],
        "dW1": first_gradient,
    }


def calls_of(data: Tensors) -> dict[str, Callable[[], object]]:
    """Return one call per kernel, in the order of a layer; `schedule` and `dweight` beside those of kernel_work."""
    T, _, _, E, K = data.layer
    plan, rows, tile = data.routed.schedule, data.routed.rows, tiles.table()[data.entry].tiles
    sizes = {"num_tokens": T, "num_experts": E, "fan_out": min(K, E)}
    route = (data.token_N, data.expert_N)
    calls = {name: functools.partial(call, tile[TILE_OF[name]]) for name, call in products_of(data).items()}
    return {
        "schedule": lambda: experts.route_rows(*route, **sizes, itemsize=2, tiles=data.entry),
        "up": calls["up"],
        "down": calls["down"],
        "combine": lambda: combine.combine(data.y_ND, plan.position_N, rows, num_tokens=T, weight_N=data.weight_N),
        "down_bwd": calls["down_bwd"],
        "dweight": lambda: combine.weight_gradient(data.partial_NP, plan.position_N, dtype=torch.float32),
        "dW2": calls["dW2"],
        "dX": calls["dX"],
        "reduce": lambda: combine.combine(data.y_ND, plan.position_N, rows, num_tokens=T),
        "dW1": calls["dW1"],
    }


def others_of(data: Tensors) -> dict[str, Callable[[], object]]:
    """Return torch's grouped_mm on the products of the same names, its rows gathered beforehand."""
    offs_E, token_N = data.routed.schedule.offset_E1[1:], data.routed.schedule.token_N.long()
    x_ND, dy_ND = data.x_TD[token_N], data.dy_TD[token_N]
    gate_up, down = data.gate_up_E2FD, data.down_EDF
    return {
        "up": lambda: functional.grouped_mm(x_ND, gate_up.mT, offs=offs_E),
        "down": lambda: functional.grouped_mm(data.a_NF, down.mT, offs=offs_E),
        "down_bwd": lambda: functional.grouped_mm(dy_ND, down, offs=offs_E),
        "dW2": lambda: functional.grouped_mm(dy_ND.mT, data.a_NF, offs=offs_E),
        "dX": lambda: functional.grouped_mm(data.dh_NH, gate_up, offs=offs_E),
        "dW1": lambda: functional.grouped_mm(data.dh_NH.mT, x_ND, offs=offs_E),
    }


def layer_of(name: str, options: Options) -> Layer:
    """Return the layer of that name, with as many tokens as asked for."""
    return LAYERS[name]._replace(T=options.tokens or LAYERS[name].T)


def time_ms(call: Callable[[], object]) -> tuple[float, float, float]:
    """Return p20, p50 and p80 of the milliseconds of a call, the L2 cache flushed between calls."""
    return tuple(triton.testing.do_bench(call, warmup=25, rep=150, quantiles=[0.2, 0.5, 0.8]))


def measure_roof() -> tuple[float, float]:
    """Return TFLOP/s of a dense bfloat16 product and TB/s of a copy, bytes read and written, on random data."""
    a, b = (torch.randn(DENSE, DENSE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    dense = 2 * DENSE**3 / time_ms(lambda: a @ b)[1] / 1e9
    source = torch.randint(0, 255, (COPIED,), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = 2 * COPIED / time_ms(lambda: target.copy_(source))[1] / 1e9
    return dense, copy


def bench(name: str, options: Options, roof: tuple[float, float]) -> list[Row]:
    """Return one row per kernel of the layer."""
    layer = layer_of(name, options)
    data = draw_tensors(layer, options.entry)
    work, others, rows, place = kernel_work(layer), others_of(data), [], provenance(data.x_TD.device)
    dense, copy = roof
    for kernel, call in calls_of(data).items():
        p20_ms, p50_ms, p80_ms = time_ms(call)
        known = work.get(kernel, Work(0.0, 0.0))
        compute_ms, memory_ms = known.flops / dense / 1e9, known.bytes / copy / 1e9
        is_known = kernel in work
        row = Row(
            **place,
            layer=name,
            **layer._asdict(),
            tiles=data.entry,
            kernel=kernel,
            p20_ms=round(p20_ms, 4),
            p50_ms=round(p50_ms, 4),
            p80_ms=round(p80_ms, 4),
            tflops=round(known.flops / p50_ms / 1e9, 1) if is_known else None,
            tb_per_s=round(known.bytes / p50_ms / 1e9, 2) if is_known else None,
            dense_tflops=round(dense, 1),
            copy_tb_per_s=round(copy, 2),
            bound="" if not is_known else "compute" if compute_ms > memory_ms else "memory",
            percent_of_roof=round(100 * max(compute_ms, memory_ms) / p50_ms, 1) if is_known else None,
            grouped_mm_ms=round(time_ms(others[kernel])[1], 4) if kernel in others else None,
        )
        rows.append(row)
    return rows


def print_kernels(rows: list[Row], console: Console) -> None:
    """Print the rows of one layer as a table."""
    headings = ("kernel", "ms", "TFLOP/s", "TB/s", "bound", "% of roof", "grouped_mm ms")
    table = Table(*headings, box=None, pad_edge=False)
    for row in rows:
        values = (row.tflops, row.tb_per_s, row.bound, row.percent_of_roof, row.grouped_mm_ms)
        table.add_row(row.kernel, f"{row.p50_ms:.3f}", *("" if value is None else str(value) for value in values))
    console.print(f"\n{rows[0].layer}: T {rows[0].T}, tiles {rows[0].tiles}, on {rows[0].device}")
    console.print(table)
    for mode, kernels in (
        ("forward", ("up", "down", "combine")),
        ("backward", ("down_bwd", "dweight", "dW2", "dX", "reduce", "dW1")),
    ):
        ms = sum(row.p50_ms for row in rows if row.kernel in kernels)
        flops = sum(row.tflops * row.p50_ms for row in rows if row.kernel in kernels and row.tflops)
        console.print(f"{mode}: {ms:.3f} ms, {flops / ms:.0f} TFLOP/s, were its kernels all there is")


def main(options: Options) -> None:
    """Time, print, and add to the results if a machine is named."""
    if not torch.cuda.is_available():
        raise SystemExit("kernels are timed on a CUDA GPU; benchmarks/inspect_kernels.py compiles without one")
    unknown = sorted(set(options.layers) - set(LAYERS))
    if unknown:
        raise ValueError(f"no layer is called {', '.join(unknown)}; known are {', '.join(LAYERS)}")
    if options.once:
        for name in options.layers:
            for call in calls_of(draw_tensors(layer_of(name, options), options.entry)).values():
                call()
        torch.cuda.synchronize()
        return
    console = Console(width=120)
    roof = measure_roof()
    console.print(f"roof: {roof[0]:.0f} TFLOP/s dense, {roof[1]:.2f} TB/s copied")
    for name in options.layers:
        rows = bench(name, options, roof)
        print_kernels(rows, console)
        if options.machine:
            append_rows(RESULTS / f"kernels_{options.machine}.csv", rows)


if __name__ == "__main__":
    main(tyro.cli(Options))
