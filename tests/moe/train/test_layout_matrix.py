"""One run, any layout: against a plain torch loop of one process, on layouts in which every two settings meet.

The parts and their limits are in layout_runs.py, the loop in plain_loop.py; the part that launches the debug recipe is
in test_layouts.py. benchmarks/layout_matrix.py runs all parts on every layout, replayed ones for 20 steps instead of 8.
"""

import math
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from layout_runs import LIMITS, SEQUENCES, batch_of, reference_of, run_fp64, run_replayed
from layouts import MICRO_SEQUENCES, STAGES, WORLDS, all_layouts, covering_set
from moe.balance.statistics import collect
from moe.initial import initialise
from moe.model import Model
from moe.parallel.groups import ParallelGroups
from moe.routing import RouterContext

FREE = covering_set(all_layouts(stages=(0,)))
PRUNED = covering_set(all_layouts())


@pytest.mark.parametrize("layout", FREE, ids=str)
def test_float64_steps_equal_the_plain_loop_to_rounding(pool, layout):
    part, result = run_fp64(pool, layout)
    assert not result.over(LIMITS[part])


@pytest.mark.parametrize("layout", [layout for layout in PRUNED if layout.stage], ids=str)
def test_float64_steps_with_float32_masters_equal_the_plain_loop(pool, layout):
    part, result = run_fp64(pool, layout)
    assert not result.over(LIMITS[part])


@pytest.mark.parametrize("layout", PRUNED, ids=str)
def test_float32_steps_equal_the_plain_loop_whose_choices_they_are_given(pool, layout):
    part, result = run_replayed(pool, layout, steps=8)
    assert not result.over(LIMITS[part])


def test_the_pruned_set_covers_every_pair_of_settings():
    values = {
        "world": WORLDS,
        "stage": STAGES,
        "micro": MICRO_SEQUENCES,
        "is_checkpointed": (False, True),
        "is_padded": (False, True),
    }
    for chosen, stages in ((PRUNED, STAGES), (FREE, (0,))):
        for first, second in combinations(values, 2):
            met = {(getattr(layout, first), getattr(layout, second)) for layout in chosen}
            assert met == set(product(*(stages if name == "stage" else values[name] for name in (first, second))))
        assert len(set(chosen)) == len(chosen)
    # no smaller set exists: world by stage alone is 18 pairs, world by micro-batch 12
    assert (len(PRUNED), len(FREE)) == (18, 12)


def test_the_task_pads_clips_and_leaves_ranks_and_micro_batches_empty():
    """What makes the matrix hard is there: otherwise layouts could agree because nothing differs."""
    tokens = torch.stack([batch_of(step, range(SEQUENCES), is_padded=True).valid_BS.sum(1) for step in range(20)])
    for world, micro in product((1, 2, 4), MICRO_SEQUENCES):
        # [step, micro-batch, rank, sequence]
        by_rank = tokens.view(20, -1, world, micro)
        assert (by_rank.sum(3) == 0).any(), "no empty micro-batch"
        assert len(by_rank.sum((1, 3)).unique(dim=1)[0]) == world, "ranks hold equal numbers of tokens"
        if world > 1 and micro == 2:
            assert (by_rank.sum((1, 3)) == 0).any(), "no rank without a token"
    for is_padded in (False, True):
        task, reference = reference_of(dtype=torch.float64, steps=20, is_padded=is_padded)
        norms = [row.grad_norm for row in reference.rows]
        assert max(norms) > task.optimizer.max_grad_norm, "nothing is clipped"
        assert is_padded or min(norms) < task.optimizer.max_grad_norm, "everything is clipped"
        counts = torch.tensor([row.tokens_per_expert for row in reference.rows])
        assert counts.float().std(-1).min() > 0, "the load is even"


def test_a_float64_model_narrows_nothing():
    """A cast to float32 on the way would hide what the float64 part looks for."""
    task, _ = reference_of(dtype=torch.float64, steps=6, is_padded=True)
    model = Model(task.model, groups=ParallelGroups.single(), activation_checkpointing=True).double()
    initialise(model, seed=0)
    batch = batch_of(0, range(2), is_padded=True)
    narrowed = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            inputs = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            outputs = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
            if any(x.dtype == torch.float64 for x in inputs) and any(x.dtype == torch.float32 for x in outputs):
                narrowed.append(str(function))
            return result

    with Watch():
        context = RouterContext(position_T=batch.position_BS.flatten())
        logits, routings = model(batch.token_BS, valid_BS=batch.valid_BS, context=context)
        statistics = collect(routings, num_sequences=2)
        (logits.sum() + statistics.prob_sum_LE.sum() + statistics.z_sum_L.sum()).backward()
    assert not narrowed
    assert all(p.grad is not None and p.grad.dtype == torch.float64 for p in model.parameters())


def test_a_deviation_beyond_its_limit_or_not_a_number_is_named():
    limit = LIMITS["fp64"]
    assert limit.over(limit) == []
    assert replace(limit, counts=1).over(limit) == ["counts 1.0e+00 > 0.0e+00"]
    assert [text.split()[0] for text in replace(limit, loss=math.nan, balance=1.0).over(limit)] == ["loss", "balance"]
