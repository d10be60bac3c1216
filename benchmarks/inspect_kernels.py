"""Compile every kernel for GPUs that are not here and read from the binaries what the compiler made of it.

    python benchmarks/inspect_kernels.py                    all of sm_80, sm_90, sm_100 and gfx942
    python benchmarks/inspect_kernels.py --archs sm_90      one of them
    python benchmarks/inspect_kernels.py --json-path FILE   and write the rows down
    python benchmarks/inspect_kernels.py --roofline         the time each kernel needs at least, by shape, on an H200

Nothing is timed and no GPU is needed. The launchers of moe_kernels run as they are, on empty tensors, with a driver
that only names the target: what is compiled is what a launch there would compile, every entry of tiles.json included.
Registers, local memory (spills), shared memory and instructions come from the cubin, for AMD from the assembly.
"""

import collections
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from layers import LAYERS, PEAK_TB_PER_S, PEAK_TFLOPS, kernel_work
from rich.console import Console
from rich.table import Table

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
# bytes of shared memory a program may have; "safe" must fit the smallest GPU of its kind (sm_86 and sm_120)
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
SAFE_LIMIT = 64 << 10
REGISTERS = 65536  # 32-bit, of one multiprocessor
# the kernels that multiply matrices -> their name in tiles.json; the instruction each arch has for it
TABLE_NAME = {
    "experts_fwd_up": "up",
    "grouped_matmul_fwd": "matmul",
    "experts_bwd_down": "down_bwd",
    "grouped_matmul_bwd_weight": "weight_bwd",
}
MATRIX_UNIT = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "mfma"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One layer whose kernels are compiled: sizes, number format and form of the experts."""

    D: int
    F: int
    dtype: str = "bf16"
    spec: str = "swiglu/concatenated/out_in/H"
    has_biases: bool = False


QWEN3 = Case(D=2048, F=768)
GPT_OSS = Case(D=2880, F=2880, spec="gpt_oss/interleaved/in_out/H", has_biases=True)
# one arch is enough for the forms that differ in their epilogues alone
OTHERS = {
    "sm_90": (
        dataclasses.replace(QWEN3, spec="geglu/interleaved/out_in/H", dtype="fp16"),
        dataclasses.replace(QWEN3, spec="relu2/concatenated/in_out/X"),
    )
}
SAFE_CASES = (
    QWEN3,
    Case(D=1001, F=601),
    Case(D=1001, F=601, dtype="fp32"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one kernel."""

    arch: str
    entry: str
    kernel: str
    case: Case
    registers: int
    spill_instructions: int  # loads and stores of local memory; for AMD the spilled registers
    stack_bytes: int
    shared_bytes: int
    warps: int
    programs_per_sm: int
    matrix_instructions: dict[str, int]
    global_loads: dict[str, int]  # by width in bits; "tma" counts descriptor loads
    uses_tma_gather: bool


class TargetOnly:
    """A driver that says which GPU to compile for, and nothing else."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        is_amd = arch.startswith("gfx")
        self.target = GPUTarget("hip", arch, 64) if is_amd else GPUTarget("cuda", int(arch[3:]), 32)
        self.device = ARCHS.index(arch)  # Triton keeps what it compiled by device, not by target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def cases_of(arch: str) -> list[tuple[str, Case]]:
    """Return (name of an entry of tiles.json, layer) for everything that is compiled for `arch`."""
    from moe_kernels.tiles import SAFE, table

    wide, narrow = SAFE
    pairs = [(wide if case.dtype == "fp32" else narrow, case) for case in SAFE_CASES]
    entries = [entry for entry in table().values() if entry.arch == arch]
    pairs += [(entry.name, QWEN3) for entry in entries]
    return pairs + [(entries[-1].name, case) for case in (GPT_OSS, *OTHERS.get(arch, ()))]


def compile_case(arch: str, entry: str, case: Case) -> list[Row]:
    """Return a row for every kernel that a forward and a backward pass of this layer would launch on `arch`."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from moe_kernels import experts, launch
    from moe_kernels.spec import ExpertSpec
    from moe_kernels.topk import topk

    driver.set_active(TargetOnly(arch))
    launch._num_multiprocessors = lambda device: 132
    compiled = []
    plain_run = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = plain_run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.__name__.removesuffix("_kernel"), kernel))

    JITFunction.run = run
    try:
        spec, dtype = ExpertSpec.parse(case.spec), DTYPES[case.dtype]
        num_experts, num_tokens, fan_out = 8, 64, 4
        gate_up, down = (spec.halves * case.F, case.D), (case.D, case.F)
        if spec.weights == "in_out":
            gate_up, down = gate_up[::-1], down[::-1]
        x, w1, w2 = (
            torch.empty(shape, dtype=dtype)
            for shape in ((num_tokens, case.D), (num_experts, *gate_up), (num_experts, *down))
        )
        b1 = torch.empty(num_experts, spec.halves * case.F, dtype=dtype) if case.has_biases else None
        b2 = torch.empty(num_experts, case.D, dtype=dtype) if case.has_biases else None
        rows = torch.zeros(num_tokens * fan_out, dtype=torch.int64)
        sizes = {"num_tokens": num_tokens, "num_experts": num_experts, "fan_out": fan_out}
        routed = experts.route_rows(rows, rows, **sizes, itemsize=dtype.itemsize, tiles=entry)
        weight = torch.empty(rows.numel())
        plan = routed.schedule.tensors()
        y, hidden = experts.experts_fwd(
            x, weight, w1, w2, b1, b2, plan, None, None, fan_out, spec.name, entry, spec.saved == "H"
        )
        if case in SAFE_CASES:
            for experts_and_k in ((128, 8), (512, 10)):
                topk(torch.empty(num_tokens, experts_and_k[0]), experts_and_k[1])
        needs = [True] * 4 + [case.has_biases] * 2
        experts.experts_bwd(
            y, x, weight, w1, w2, b1, b2, hidden, plan, None, None, fan_out, spec.name, entry, needs, None, None
        )
    finally:
        JITFunction.run = plain_run
    return [inspect(arch, entry, case, name, kernel) for name, kernel in compiled]


def inspect(arch: str, entry: str, case: Case, name: str, kernel: Any) -> Row:
    """Return what the binary of one compiled kernel says."""
    read = _read_amdgcn if arch.startswith("gfx") else _read_cubin
    return Row(
        arch=arch,
        entry=entry,
        kernel=name,
        case=case,
        shared_bytes=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        **read(arch, kernel),
    )


def _read_cubin(arch: str, kernel: Any) -> dict[str, Any]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    registers, stack = int(found[1]), int(found[2])
    # "/*0a30*/   @!P0 LDG.E.128 R4, ..." -> "LDG.E.128"
    words = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.M)
    matrix, loads = collections.Counter(), collections.Counter()
    for word in words:
        base = word.split(".")[0]
        if base in ("HGMMA", "HMMA", "DMMA") or re.fullmatch(r"UTC\w*MMA", base):
            matrix[base] += 1
        elif base in ("LDG", "LDGSTS"):
            width = re.search(r"\.[US]?(8|16|64|128)(?![\dB])", word)
            loads[width[1] if width else "32"] += 1
        elif base == "UTMALDG":
            loads["tma"] += 1
    shared = kernel.metadata.shared
    threads = 32 * kernel.metadata.num_warps
    by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    by_shared = (SHARED_LIMIT[arch] // (shared + 1024)) if shared else 32
    return {
        "registers": registers,
        "stack_bytes": stack,
        "spill_instructions": sum(word.split(".")[0] in ("STL", "LDL") for word in words),
        "programs_per_sm": min(by_registers, by_shared, 32),
        "matrix_instructions": dict(matrix),
        "global_loads": dict(loads),
        "uses_tma_gather": "gather4" in kernel.asm["ptx"],
    }


def _read_amdgcn(arch: str, kernel: Any) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]

    def number(pattern: str) -> int:
        return int(re.search(pattern, text)[1])  # pyright: ignore[reportOptionalSubscript]

    registers = number(r"\.vgpr_count:\s+(\d+)")
    bits = {"": "32", "x2": "64", "x3": "96", "x4": "128"}
    loads = collections.Counter(
        bits[width or ""] for width in re.findall(r"(?:global|buffer)_load_dword(x[234])?\b", text)
    )
    loads["16"] += len(re.findall(r"(?:global|buffer)_load_[us]short", text))
    shared = kernel.metadata.shared
    return {
        "registers": registers,
        "stack_bytes": number(r"\.private_segment_fixed_size:\s+(\d+)"),
        "spill_instructions": number(r"\.vgpr_spill_count:\s+(\d+)"),
        # 512 registers in each of four vector units, one wave of a program on each in turn
        "programs_per_sm": min(
            4 * (512 // max(registers, 1)) // kernel.metadata.num_warps, SHARED_LIMIT[arch] // max(shared, 1), 32
        ),
        "matrix_instructions": dict(collections.Counter(re.findall(r"v_(mfma)", text))),
        "global_loads": {width: count for width, count in loads.items() if count},
        "uses_tma_gather": False,
    }


def compile_cases(arch: str, entry: str, cases: tuple[Case, ...]) -> list[Row]:
    """Return the rows of several layers, a kernel that two of them share once."""
    rows = {}
    for case in cases:
        for row in compile_case(arch, entry, case):
            rows[row.kernel, row.case, row.registers, row.shared_bytes, str(row.global_loads)] = row
    return list(rows.values())


def inspect_all(archs: tuple[str, ...], workers: int) -> list[Row]:
    """Return the rows of all archs, compiled in processes of their own: this one may have the interpreter on."""
    work: dict[tuple[str, str], list[Case]] = {}
    for arch in archs:
        for entry, case in cases_of(arch):
            work.setdefault((arch, entry), []).append(case)
    jobs = [(arch, entry, tuple(cases)) for (arch, entry), cases in work.items()]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        return [row for rows in pool.map(compile_cases, *zip(*jobs, strict=True)) for row in rows]


def faults(row: Row) -> list[str]:
    """Return what is wrong with a kernel, by the rules of docs/kernels.md; empty if nothing is."""
    from moe_kernels.tiles import SAFE, table

    found = []
    if row.spill_instructions or row.stack_bytes:
        found.append(f"spills: {row.spill_instructions} instructions, {row.stack_bytes} bytes of stack")
    limit = SAFE_LIMIT if row.entry in SAFE else SHARED_LIMIT[row.arch]
    if row.shared_bytes > limit:
        found.append(f"{row.shared_bytes} bytes of shared memory, limit {limit}")
    if row.uses_tma_gather:
        found.append("gathers by TMA, which sm_90 does not have")
    if row.kernel not in TABLE_NAME:
        return found
    if row.case.dtype != "fp32" and MATRIX_UNIT[row.arch] not in row.matrix_instructions:
        found.append(f"no matrix instruction {MATRIX_UNIT[row.arch]}, only {row.matrix_instructions}")
    if row.entry not in SAFE and not {"128", "tma"} & set(row.global_loads):
        found.append(f"no 16-byte loads, only {row.global_loads}")
    if table()[row.entry].tiles[TABLE_NAME[row.kernel]].use_tma and "tma" not in row.global_loads:
        found.append("no TMA load where the table asks for one")
    return found


def show(console: Console, rows: list[Row]) -> None:
    """Print one table per arch."""
    heads = (
        "entry",
        "D x F",
        "experts",
        "kernel",
        "registers",
        "spills",
        "shared KiB",
        "programs/SM",
        "matrix",
        "loads",
    )
    for arch in dict.fromkeys(row.arch for row in rows):
        table = Table(*heads, box=None, pad_edge=False, title=arch, title_justify="left")
        for row in (row for row in rows if row.arch == arch):
            table.add_row(
                row.entry,
                f"{row.case.D} x {row.case.F}",
                f"{row.case.dtype} {row.case.spec.split('/')[0]}",
                row.kernel,
                str(row.registers),
                str(row.spill_instructions),
                f"{row.shared_bytes / 1024:.0f}",
                str(row.programs_per_sm),
                " ".join(f"{count} {unit}" for unit, count in row.matrix_instructions.items()) or "-",
                " ".join(f"{count} x {width}" for width, count in sorted(row.global_loads.items())),
            )
        console.print(table)


def show_roofline(console: Console) -> None:
    """Print, for every kernel and shape of shapes.py, the time its FLOPs and its bytes need on an H200 at least."""
    heads = ("shape", "T", "kernel", "TFLOP", "GB", "FLOP/byte", "compute ms", "memory ms", "bound by")
    table = Table(*heads, box=None, pad_edge=False, title=f"{PEAK_TFLOPS} TFLOP/s, {PEAK_TB_PER_S} TB/s, bf16")
    for name, shape in LAYERS.items():
        for kernel, work in kernel_work(shape).items():
            compute_ms = work.flops / PEAK_TFLOPS / 1e9
            memory_ms = work.bytes / PEAK_TB_PER_S / 1e9
            table.add_row(
                name,
                str(shape.T),
                kernel,
                f"{work.flops / 1e12:.2f}",
                f"{work.bytes / 1e9:.2f}",
                f"{work.flops / work.bytes:.0f}",
                f"{compute_ms:.2f}",
                f"{memory_ms:.2f}",
                "compute" if compute_ms > memory_ms else "memory",
            )
    console.print(table)


def main(
    archs: tuple[Literal["sm_80", "sm_90", "sm_100", "gfx942"], ...] = ARCHS,
    json_path: Path | None = None,
    workers: int = 2,
    roofline: bool = False,
) -> None:
    """Print what the compiler made of the kernels; exit with 1 if a rule is broken.

    Args:
        archs: what to compile for.
        json_path: file to write the rows to.
        workers: processes that compile at the same time.
        roofline: print the least time of every kernel by shape instead.
    """
    console = Console()
    if roofline:
        show_roofline(console)
        return
    rows = inspect_all(archs, workers)
    show(console, rows)
    if json_path is not None:
        found = [dataclasses.asdict(row) | {"faults": faults(row)} for row in rows]
        json_path.write_text(json.dumps(found))
    broken = [(row.arch, row.entry, row.kernel, fault) for row in rows for fault in faults(row)]
    for where in broken:
        console.print("broken:", *where)
    if broken:
        raise SystemExit(1)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    tyro.cli(main, description=__doc__)
