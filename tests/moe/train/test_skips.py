"""Steps that must not count: whatever is not finite, on whichever rank, moves nothing anywhere and is named."""

import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from faults import around_steps, assert_equal_tensors, full_state, run_main
from moe.checkpoint import CheckpointReader, list_checkpoints
from moe.routers.topk import TopKConfig
from runs import curve, rows_of, small_recipe, train

NAN, INF = float("nan"), float("inf")
SECOND = 1  # the micro-batch that is poisoned, of two on each rank


@dataclass(frozen=True)
class Poison:
    """What one rank meets in its second micro-batch of a step."""

    place: str  # loss, logits, one row of logits, or (part of) a parameter's name whose gradient it is
    value: float


KINDS = [
    Poison("loss", NAN),
    Poison("loss", INF),
    Poison("logits", NAN),
    Poison("logits", INF),
    Poison("row", -INF),
    Poison("logits", 1e38),
    Poison("layers.1.moe.experts.down_proj", NAN),
    Poison("layers.1.moe.experts.gate_up_proj", INF),
    Poison("norm.weight", NAN),
    Poison("router.weight", -INF),
    Poison("embed_tokens.weight", 1e25),  # finite, but its square is not: no norm to clip by
]


def poisoned(model, poison: Poison) -> ExitStack:
    """Plant `poison` until the stack closes, in the second micro-batch from now."""
    from moe.train import step as step_module

    stack = ExitStack()
    seen = Counter()  # forwards by whether they train: scope exact counts in a pass of its own

    def is_second() -> bool:
        return seen[torch.is_grad_enabled()] == SECOND + 1

    stack.callback(model.register_forward_pre_hook(lambda *_: seen.update([torch.is_grad_enabled()])).remove)
    if poison.place == "loss":
        plain_loss = step_module.language_model_loss
        bad = lambda *a: plain_loss(*a) * (poison.value if is_second() else 1.0)  # noqa: E731
        stack.enter_context(patch.object(step_module, "language_model_loss", bad))
    elif poison.place in ("logits", "row"):

        def linear(x_TD, weight):
            logits_TE = F.linear(x_TD, weight)
            if is_second():
                logits_TE = logits_TE.clone()
                logits_TE[3, slice(None) if poison.place == "row" else 5] = poison.value
            return logits_TE

        stack.enter_context(patch("moe.routers.linear.F", SimpleNamespace(linear=linear)))
    else:
        parameter = next(p for name, p in model.named_parameters() if name.endswith(poison.place))

        def spoil(gradient):
            # backward runs without gradients of its own, so grad mode does not tell the pass here
            if seen[True] == SECOND + 1:
                gradient = gradient.clone()
                gradient.view(-1)[7] = poison.value
            return gradient

        stack.callback(parameter.register_hook(spoil).remove)
    return stack


def train_poisoned(recipe, poison_of_step: dict[int, Poison], rank: int, resume: bool = False):
    """Return the exit code and, by poisoned step, the names of the tensors that it changed here."""
    changed: dict[int, list[str]] = {}

    def around(train_step, step, run):
        if step not in poison_of_step:
            return run()
        before = full_state(train_step) if step > 1 else {}
        with poisoned(train_step._engine.module, poison_of_step[step]) if dist.get_rank() == rank else ExitStack():
            record = run()
        after = full_state(train_step) if step > 1 else {}
        changed[step] = [name for name in before if not torch.equal(before[name], after[name])]
        if before.keys() != after.keys():
            changed[step].append("the names themselves")
        if not record.is_skipped:
            changed[step].append("the step counted")
        return record

    with around_steps(around):
        code = run_main(recipe, resume)
    return code, changed


def recipe_of(root, name="run", *, ep=1, stage=1, dtype="fp32", scope="lagged", **changes):
    recipe = small_recipe(
        root,
        name,
        batch={"micro_sequences": 2},
        parallel={"ep_size": ep, "zero_stage": stage, "dtype": dtype},
        balance={"scope": scope, "smoothing": 0.5 if scope == "lagged" else 0.0},
        **changes,
    )
    router = TopKConfig(norm_topk_prob=True, use_selection_bias=True)
    return replace(recipe, model=replace(recipe.model, router=router))


@pytest.mark.parametrize(
    ("ep", "stage", "dtype"),
    [(1, 0, "fp32"), (2, 1, "fp32"), (2, 2, "fp32"), (2, 1, "bf16"), (1, 2, "bf16")],
)
def test_a_bad_step_on_one_rank_changes_nothing_and_names_its_sequences(pool, run_root, ep, stage, dtype):
    poison_of_step = {2 + 2 * i: poison for i, poison in enumerate(KINDS)}
    recipe = recipe_of(run_root, ep=ep, stage=stage, dtype=dtype, steps=2 * len(KINDS) + 1)
    results = pool.run(train_poisoned, recipe, poison_of_step, 1, world_size=2)
    for code, changed in results:
        assert code == 0
        assert changed == {step: [] for step in poison_of_step}
    skips = [row for row in rows_of(recipe) if "skipped/sequences" in row]
    assert [row["step"] for row in skips] == list(poison_of_step)
    assert [row["train/skipped_steps"] for row in skips] == list(range(1, len(KINDS) + 1))
    for row in skips:
        # the second micro-batch of rank 1 of 2; gradients are not traced back to sequences
        is_seen = poison_of_step[row["step"]].place in ("loss", "logits", "row")
        assert row["skipped/sequences"] == ([6, 7] if is_seen else []), row
    rows = curve(recipe)
    assert [row["train/skipped_steps"] for row in rows] == [row["step"] // 2 for row in rows]
    for row in rows:
        is_good = row["step"] not in poison_of_step
        assert is_good == (row["train/grad_norm"] is not None), row
        assert not is_good or row["train/loss"] < 7
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    state = CheckpointReader.open(list_checkpoints(recipe.folder.checkpoints_dir)[-1]).state
    assert state["skipped_steps"] == len(KINDS)
    assert state["num_updates"] == len(KINDS) + 1


@pytest.mark.parametrize("scope", ["global", "exact"])
def test_counts_of_a_skipped_step_do_not_leak_into_the_next(pool, run_root, scope):
    """With a rate too small to move anything, a run with a skipped step has the rows of a run without."""
    fields = {"optimizer": {"learning_rate": 1e-30, "weight_decay": 0.0}, "balance": {"scope": scope}}
    clean, broken = (
        small_recipe(run_root, name, steps=5, batch={"micro_sequences": 2}, **fields) for name in ("clean", "broken")
    )
    pool.run(train, clean, world_size=1)
    poison_of_step = {2: Poison("norm.weight", INF), 3: Poison("logits", NAN)}
    (result,) = pool.run(train_poisoned, broken, poison_of_step, 0, world_size=1)
    assert result == (0, {2: [], 3: []})
    for row, expected in zip(curve(broken), curve(clean), strict=True):
        names = ("train/lm_loss", "train/loss", "train/load_balancing_loss", "moe/load_cv", "moe/router_entropy")
        for name in names if row["step"] != 3 else ():
            assert row[name] == expected[name], (name, row["step"])


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (2, "bf16")])
def test_a_skipped_first_step_is_saved_and_resumed_exactly(pool, run_root, stage, dtype):
    fields = {"stage": stage, "dtype": dtype, "trainer": {"save_every": 1, "keep_checkpoints": 9}}
    whole, broken = (recipe_of(run_root, name, **fields) for name in ("whole", "broken"))
    poison_of_step = {1: KINDS[0], 3: KINDS[2]}
    pool.run(train_poisoned, whole, poison_of_step, 0, world_size=1)
    pool.run(train_poisoned, broken, poison_of_step, 0, world_size=1)
    for path in list_checkpoints(broken.folder.checkpoints_dir)[1:]:
        path.rename(run_root / path.name)
    pool.run(train_poisoned, broken, poison_of_step, 0, True, world_size=1)
    assert curve(broken) == curve(whole)
    assert curve(broken)[-1]["train/skipped_steps"] == 2
    assert_equal_tensors(broken, whole)


def test_five_bad_steps_in_a_row_end_the_run_with_21_also_across_a_resume(pool, run_root):
    recipe = recipe_of(run_root, steps=20, trainer={"save_every": 1, "keep_checkpoints": 30})
    poison_of_step = {step: KINDS[0] for step in (2, 3, 4, 5, *range(7, 20))}
    results = pool.run(train_poisoned, recipe, poison_of_step, 1, world_size=2)
    assert [code for code, _ in results] == [21, 21]
    assert [row["step"] for row in curve(recipe)] == list(range(1, 12)), "four, one good step, then five"
    rows = [json.dumps(row) for row in curve(recipe)]

    # from step 9 on, where two of the five had been skipped
    for path in list_checkpoints(recipe.folder.checkpoints_dir)[9:]:
        path.rename(run_root / path.name)
    results = pool.run(train_poisoned, recipe, poison_of_step, 1, True, world_size=2)
    assert [code for code, _ in results] == [21, 21]
    assert [json.dumps(row) for row in curve(recipe)] == rows
