"""Routing metadata on the device: which row stands where when rows are sorted by expert, and the tiles over them.

Three launches (count, scan, place), deterministic, without atomics and without a word to the host: every shape is
a function of N, E and BLOCK_M. The twin is grouping.group_rows (a stable torch.sort), equal to the integer.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels import launch

CHUNK = 128  # rows a program counts and places, each compared with each; unmeasured


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Rows in expert order and the row tiles over them, as kernels read them: all int32, on the device.

    R = offset_E1[E] rows are in use and stand at sorted positions 0..R-1; positions from R on hold rubbish.
    """

    offset_E1: Tensor  # the rows of expert e stand at positions offset_E1[e] .. offset_E1[e + 1] - 1
    row_N: Tensor  # sorted position -> row
    token_N: Tensor  # sorted position -> token
    position_N: Tensor  # row -> sorted position, -1 for an unused row
    tile_expert_M: Tensor  # the expert of a row tile
    tile_start_M: Tensor  # its first sorted position; it ends with its expert's segment or after block_m rows
    num_tiles_1: Tensor  # how many of the M tiles are in use

    def tensors(self) -> list[Tensor]:
        """Return the tensors in the order of the fields."""
        return [getattr(self, name) for name in FIELDS]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Schedule":
        """Return the Schedule of these tensors, in the order of the fields."""
        return cls(**dict(zip(FIELDS, tensors, strict=True)))


# read once: torch.compile cannot trace dataclasses.fields of a class
FIELDS = tuple(field.name for field in fields(Schedule))


def max_tiles(num_rows: int, num_experts: int, block_m: int) -> int:
    """Return how many row tiles there can be at most: every expert may end in one that is not full."""
    return launch.cdiv(num_rows, block_m) + min(num_experts, num_rows)


# the number of rows never specialises a kernel: every step has another
SIZES = ["num_rows", "num_chunks"]


@triton.jit(do_not_specialize=SIZES)
def count_kernel(expert_ptr, count_ptr, num_rows, num_chunks, E: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr):
    """count[e, chunk] = rows of expert e in the chunk. Lanes past the end and unused rows count nowhere."""
    chunk = tl.program_id(0)
    row = chunk.to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(expert_ptr + row, mask=row < num_rows, other=E).to(tl.int32)
    is_used = (expert >= 0) & (expert < E)
    count = tl.histogram(tl.where(is_used, expert, 0), BINS, mask=is_used)
    bins = tl.arange(0, BINS)
    tl.store(count_ptr + bins.to(tl.int64) * num_chunks + chunk, count, mask=bins < E)


@triton.jit(do_not_specialize=SIZES[1:])
def scan_kernel(count_ptr, base_ptr, total_ptr, num_chunks, BLOCK: tl.constexpr):
    """base[e, chunk] = rows of expert e in the chunks before; total[e] = all of them. One program per expert."""
    expert = tl.program_id(0)
    before = tl.zeros((), tl.int32)
    for start in range(0, num_chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        place = expert.to(tl.int64) * num_chunks + chunk
        count = tl.load(count_ptr + place, mask=chunk < num_chunks, other=0)
        tl.store(base_ptr + place, before + tl.cumsum(count, axis=0) - count, mask=chunk < num_chunks)
        before += tl.sum(count)
    tl.store(total_ptr + expert, before)


@triton.jit(do_not_specialize=SIZES)
def place_kernel(
    expert_ptr,
    token_ptr,
    base_ptr,
    total_ptr,
    offset_ptr,
    row_ptr,
    sorted_token_ptr,
    position_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    num_tiles_ptr,
    num_rows,
    num_chunks,
    E: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
):
    """Write the sorted positions of one chunk of rows and, while there are experts, the tiles of one expert."""
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    total = tl.load(total_ptr + bins, mask=bins < E, other=0)
    offset = tl.cumsum(total, axis=0) - total
    tiles = (total + BLOCK_M - 1) // BLOCK_M
    if program == 0:
        tl.store(offset_ptr + bins, offset, mask=bins < E)
        tl.store(offset_ptr + E, tl.sum(total))
        tl.store(num_tiles_ptr, tl.sum(tiles))
    if program < E:
        is_mine = bins == program
        start = tl.sum(tl.where(is_mine, offset, 0))
        first_tile = tl.sum(tl.where(bins < program, tiles, 0))
        num_tiles = tl.sum(tl.where(is_mine, tiles, 0))
        for begin in range(0, num_tiles, TILES):
            tile = begin + tl.arange(0, TILES)
            is_tile = tile < num_tiles
            tl.store(tile_expert_ptr + first_tile + tile, tl.zeros((TILES,), tl.int32) + program, mask=is_tile)
            tl.store(tile_start_ptr + first_tile + tile, start + tile * BLOCK_M, mask=is_tile)
    if program < num_chunks:
        lane = tl.arange(0, CHUNK)
        row = program.to(tl.int64) * CHUNK + lane
        is_row = row < num_rows
        expert = tl.load(expert_ptr + row, mask=is_row, other=E).to(tl.int32)
        is_used = (expert >= 0) & (expert < E)
        expert = tl.where(is_used, expert, E)
        # how many lanes before this one have its expert: stable by construction
        is_before = (expert[:, None] == expert[None, :]) & (lane[None, :] < lane[:, None])
        rank = tl.sum(is_before.to(tl.int32), axis=1)
        base = tl.load(base_ptr + expert.to(tl.int64) * num_chunks + program, mask=is_used, other=0)
        position = tl.gather(offset, expert, axis=0) + base + rank
        token = tl.load(token_ptr + row, mask=is_used, other=0)
        tl.store(row_ptr + position, row.to(tl.int32), mask=is_used)
        tl.store(sorted_token_ptr + position, token.to(tl.int32), mask=is_used)
        tl.store(position_ptr + row, tl.where(is_used, position, -1), mask=is_row)


def schedule_rows(token_N: Tensor, expert_N: Tensor, num_experts: int, *, block_m: int) -> Schedule:
    """Return the Schedule of rows (token, expert): contiguous, int64 or int32; ids outside 0..E-1 mark unused rows."""
    num_rows, device = expert_N.numel(), expert_N.device

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    tiles = max_tiles(num_rows, num_experts, block_m)
    schedule = Schedule(
        offset_E1=empty(num_experts + 1),
        row_N=empty(num_rows),
        token_N=empty(num_rows),
        position_N=empty(num_rows),
        tile_expert_M=empty(tiles),
        tile_start_M=empty(tiles),
        num_tiles_1=empty(1),
    )
    num_chunks = launch.cdiv(num_rows, CHUNK)
    bins = triton.next_power_of_2(num_experts + 1)  # one more than E: the last one takes the unused rows
    count, base, total = empty(num_experts, num_chunks), empty(num_experts, num_chunks), empty(num_experts)
    sizes = {"E": num_experts, "BINS": bins, "CHUNK": CHUNK}
    if num_rows:
        count_kernel[(num_chunks,)](expert_N, count, num_rows, num_chunks, **sizes)
    scan_kernel[(num_experts,)](count, base, total, num_chunks, BLOCK=256)
    place_kernel[(max(num_chunks, num_experts),)](
        expert_N, token_N, base, total, *schedule.tensors(),
        num_rows, num_chunks, **sizes, BLOCK_M=block_m, TILES=128,
    )  # fmt: skip
    return schedule
