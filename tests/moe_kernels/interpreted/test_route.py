"""Routing metadata against a stable sort: equal to the integer, whatever the counts; and the order of tiles."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernel_runs import guarded_memory
from moe_kernels import launch, route
from moe_kernels.combine import rows_of_tokens
from moe_kernels.grouping import group_rows
from moe_kernels.parts import tile_place
from moe_kernels.route import CHUNK, Schedule, schedule_rows
from moe_kernels.testing import ROUTINGS, make_rows


def check(token_N: Tensor, expert_N: Tensor, E: int, *, block_m: int = 16) -> Schedule:
    """Return the schedule of these rows, all of it compared with grouping.group_rows."""
    with guarded_memory():
        schedule = schedule_rows(token_N.contiguous(), expert_N.contiguous(), E, block_m=block_m)
    is_used_N = (expert_N >= 0) & (expert_N < E)
    grouping = group_rows(torch.where(is_used_N, expert_N, E).long(), E)
    R = int(is_used_N.sum())
    offsets = grouping.offsets_E1.tolist()
    assert {tensor.dtype for tensor in schedule.tensors()} == {torch.int32}
    assert schedule.offset_E1.tolist() == offsets
    assert offsets[E] == R and offsets == sorted(offsets)
    assert schedule.row_N[:R].tolist() == grouping.order_N[:R].tolist()
    assert schedule.token_N[:R].tolist() == token_N[grouping.order_N[:R]].tolist()
    assert schedule.position_N.tolist() == torch.where(is_used_N, grouping.inverse_N, -1).tolist()

    tiles = [(e, start) for e in range(E) for start in range(offsets[e], offsets[e + 1], block_m)]
    num_tiles = int(schedule.num_tiles_1)
    assert num_tiles == len(tiles) <= route.max_tiles(expert_N.numel(), E, block_m) == schedule.tile_start_M.numel()
    pairs = zip(schedule.tile_expert_M[:num_tiles].tolist(), schedule.tile_start_M[:num_tiles].tolist(), strict=True)
    assert list(pairs) == tiles
    covered = [row for e, start in tiles for row in range(start, min(start + block_m, offsets[e + 1]))]
    assert covered == list(range(R))
    return schedule


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("T", "E", "K"), [(0, 3, 2), (1, 3, 2), (65, 7, 3)])
def test_schedule_equals_a_stable_sort_for_every_routing(routing: str, T: int, E: int, K: int) -> None:
    check(*make_rows(routing, T=T, E=E, K=K, generator=torch.Generator().manual_seed(1)), E)


@pytest.mark.parametrize(
    ("N", "E"),
    [(CHUNK - 1, 3), (CHUNK, 1), (CHUNK + 1, 300), (2 * CHUNK, 2), (2 * CHUNK + 1, 5), (3 * CHUNK + 7, 63)],
)
def test_schedule_equals_a_stable_sort_across_chunks(N: int, E: int) -> None:
    generator = torch.Generator().manual_seed(N)
    token_N = torch.randint(0, 1000, (N,), generator=generator)
    check(token_N, torch.randint(0, E + 1, (N,), generator=generator), E)


@pytest.mark.parametrize("counts", [(0, 5, 7), (5, 0, 7), (5, 7, 0), (15, 16, 17), (32, 1, 31), (0, 0, 0)])
def test_tiles_end_with_their_expert(counts: tuple[int, ...]) -> None:
    expert_N = torch.arange(3).repeat_interleave(torch.tensor(counts))
    expert_N = expert_N[torch.randperm(expert_N.numel(), generator=torch.Generator().manual_seed(2))]
    check(torch.arange(expert_N.numel()), expert_N, 3)


def test_an_expert_may_have_more_tiles_than_are_written_at_once() -> None:
    # 128 at once; rows of one tile each
    check(torch.arange(300), (torch.arange(300) < 290).long(), 2, block_m=1)


def test_ids_may_be_int32_and_lie_on_either_side_of_the_experts() -> None:
    expert_N = torch.tensor([-7, 2, 0, 3, -1, 2**31 - 1, 1, 2, -(2**31)], dtype=torch.int32)
    check(torch.arange(9, dtype=torch.int32), expert_N, 3)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 9).flatmap(lambda E: st.tuples(st.lists(st.integers(-1, E), max_size=140), st.just(E))))
def test_schedule_equals_a_stable_sort_for_any_ids(case: tuple[list[int], int]) -> None:
    experts, E = case
    check(torch.arange(len(experts)) // 2, torch.tensor(experts, dtype=torch.int64), E)


def test_counts_are_summed_over_more_chunks_than_are_read_at_once() -> None:
    count_EC = torch.randint(0, 9, (3, 11), dtype=torch.int32)
    base_EC, total_E = torch.empty_like(count_EC), torch.empty(3, dtype=torch.int32)
    route.scan_kernel[(3,)](count_EC, base_EC, total_E, 11, BLOCK=4)
    assert torch.equal(base_EC.long(), count_EC.cumsum(1) - count_EC)
    assert torch.equal(total_E.long(), count_EC.sum(1))


def test_rows_of_a_token_stand_in_the_order_they_came() -> None:
    token_N = torch.tensor([2, 0, 2, 4, 0, 2, 1])
    expert_N = torch.tensor([0, 1, 3, 0, 1, 2, -1])  # of three experts, so rows 2 and 6 are unused
    rows = rows_of_tokens(token_N, expert_N, num_tokens=5, num_experts=3, fan_out=None)
    assert rows.first_T1 is not None and rows.row_N is not None
    assert rows.first_T1.tolist() == [0, 2, 2, 4, 4, 5]
    assert rows.row_N[:5].tolist() == [1, 4, 0, 5, 3]


@triton.jit
def tile_place_kernel(row_ptr, column_ptr, num_row_tiles, num_column_tiles):
    """Write the place of this program's tile."""
    tile = tl.program_id(0)
    row, column = tile_place(tile, num_row_tiles, num_column_tiles)
    tl.store(row_ptr + tile, row)
    tl.store(column_ptr + tile, column)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 19])
@pytest.mark.parametrize("columns", [1, 3])
def test_every_tile_has_one_place_and_eight_rows_share_the_columns(rows: int, columns: int) -> None:
    row_M, column_M = torch.full((2, rows * columns), -1, dtype=torch.int32)
    tile_place_kernel[(rows * columns,)](row_M, column_M, rows, columns)
    places = list(zip(row_M.tolist(), column_M.tolist(), strict=True))
    assert sorted(places) == [(row, column) for row in range(rows) for column in range(columns)]
    assert [row // 8 for row, _ in places] == sorted(row // 8 for row, _ in places)
    assert places[: min(rows, 8)] == [(row, 0) for row in range(min(rows, 8))]


def test_programs_are_few_where_there_are_many_tiles() -> None:
    device = torch.device("cpu")
    programs = launch.INTERPRETED_PROGRAMS
    assert [launch.num_programs(device, tiles, 1) for tiles in (1, 2 * programs - 1, 2 * programs, 100)] == [
        1,
        2 * programs - 1,
        programs,
        programs,
    ]
