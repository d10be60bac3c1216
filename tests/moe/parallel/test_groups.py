"""Groups lie as DeepSpeed lays them out, and a layout the ranks cannot take is refused."""

import pytest
import torch
import torch.distributed as dist

from moe.parallel.agree import all_gather, on_first_rank
from moe.parallel.groups import ParallelConfig, ParallelGroups


def members(ep_size: int):
    groups = ParallelGroups.create(ep_size=ep_size, device=torch.device("cpu"))
    lists = [dist.get_process_group_ranks(group) for group in (groups.expert_group, groups.expert_data_group)]
    return groups.rank, groups.ep_rank, groups.edp_rank, *lists


def test_expert_groups_are_consecutive_and_expert_data_groups_strided(pool):
    assert pool.run(members, 2, world_size=4) == [
        (0, 0, 0, [0, 1], [0, 2]),
        (1, 1, 0, [0, 1], [1, 3]),
        (2, 0, 1, [2, 3], [0, 2]),
        (3, 1, 1, [2, 3], [1, 3]),
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ep_size": 3}, r"ep_size = 3 does not divide the 4 ranks of this run; use one of \[1, 2, 4\]"),
        ({"ep_size": 0}, "ep_size = 0"),
        ({"dtype": "bf16", "zero_stage": 0}, "use parallel.zero_stage = 1 or 2 with bf16"),
        ({"timeout_s": 0}, "timeout_s"),
    ],
)
def test_impossible_layouts_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**fields).validate(world_size=4)


def test_one_rank_takes_the_lowest_stage_that_keeps_its_masters():
    for dtype, stages in (("fp32", (0, 0, 0)), ("bf16", (1, 1))):
        wanted = [ParallelConfig(zero_stage=stage, dtype=dtype) for stage in range(3 - len(stages), 3)]
        assert tuple(parallel.stage_on(1) for parallel in wanted) == stages
        assert [parallel.stage_on(2) for parallel in wanted] == [parallel.zero_stage for parallel in wanted]


def agree(fails: bool):
    groups = ParallelGroups.create(ep_size=1, device=torch.device("cpu"))

    def work():
        if fails:
            raise ValueError("the disk is full")
        return groups.rank + 10

    try:
        result = on_first_rank(groups, work)
    except ValueError as error:
        result = str(error)
    return result, all_gather(groups, groups.rank)


def test_ranks_agree_on_results_and_on_errors(pool):
    assert pool.run(agree, False, world_size=2) == [(10, [0, 1])] * 2
    assert pool.run(agree, True, world_size=2) == [("the disk is full", [0, 1])] * 2
