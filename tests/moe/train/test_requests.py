"""Stopping and saving when asked to: at the next step boundary, on all ranks, whichever rank was asked."""

import os
import signal
import time
from signal import SIGINT, SIGTERM, SIGUSR1
from unittest.mock import patch

import pytest
import torch.distributed as dist

from faults import around_steps, assert_equal_tensors, run_main, start_run, train_with_signals
from moe.checkpoint import RunLock, list_checkpoints
from moe.parallel.groups import ParallelGroups
from moe.train.requests import Requests
from runs import curve, rows_of, small_recipe, train

_WHOLE: dict[int, object] = {}


def saved(recipe) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(recipe.folder.checkpoints_dir)]


def whole_run(pool, prepared_data, world: int):
    """The run that nobody disturbs, once per number of ranks."""
    if world not in _WHOLE:
        recipe = small_recipe(prepared_data.parent / f"undisturbed-{world}", data={"cache_dir": str(prepared_data)})
        pool.run(train, recipe, world_size=world)
        _WHOLE[world] = recipe
    return _WHOLE[world]


@pytest.mark.parametrize(
    ("world", "rank", "number", "code"),
    [(1, 0, SIGTERM, 143), (1, 0, SIGINT, 130), (2, 1, SIGTERM, 143), (2, 0, SIGINT, 130)],
)
def test_a_stop_signal_to_one_rank_saves_and_stops_all_and_the_run_goes_on_exactly(
    pool, prepared_data, run_root, world, rank, number, code
):
    recipe = small_recipe(run_root)
    codes = pool.run(train_with_signals, recipe, {3: [(rank, number)]}, world_size=world)
    assert codes == [code] * world
    assert saved(recipe) == [3]
    assert [row["step"] for row in curve(recipe)] == [1, 2, 3]
    RunLock.acquire(recipe.folder.path).release()

    assert pool.run(train_with_signals, recipe, {}, True, world_size=world) == [0] * world
    whole = whole_run(pool, prepared_data, world)
    assert curve(recipe) == curve(whole)
    assert_equal_tensors(recipe, whole)


@pytest.mark.parametrize("world", [1, 2])
def test_sigusr1_and_the_file_save_save_and_go_on(pool, prepared_data, run_root, world):
    recipe = small_recipe(run_root)
    codes = pool.run(train_and_touch, recipe, 4, {2: [(world - 1, SIGUSR1)]}, world_size=world)
    assert codes == [0] * world
    assert saved(recipe) == [2, 4, 6]
    assert not (recipe.folder.path / "save").exists()
    assert curve(recipe) == curve(whole_run(pool, prepared_data, world))


def train_and_touch(recipe, at: int, signals) -> int:
    """Make the file `save` during step `at`."""

    def around(_, step, run):
        if step == at and dist.get_rank() == 0:
            (recipe.folder.path / "save").touch()
        return run()

    with around_steps(around):
        return train_with_signals(recipe, signals)


def test_a_second_sigint_stops_at_once_and_leaves_the_folder_to_the_next(pool, prepared_data, run_root):
    recipe = small_recipe(run_root, trainer={"save_every": 2})
    assert pool.run(train_with_signals, recipe, {3: [(0, SIGINT), (0, SIGINT)]}, world_size=1) == [130]
    assert saved(recipe) == [2]
    RunLock.acquire(recipe.folder.path).release()
    assert pool.run(run_main, recipe, True, world_size=1) == [0]
    assert curve(recipe) == curve(whole_run(pool, prepared_data, 1))


def train_and_signal_inside(recipe, place: str, call: int) -> int:
    """Get SIGTERM in the `call`-th evaluation or save."""
    from moe.train import trainer

    plain, calls = getattr(trainer, place), []

    def signalled(*args, **kwargs):
        calls.append(0)
        if len(calls) == call:
            signal.raise_signal(SIGTERM)
        return plain(*args, **kwargs)

    with patch.object(trainer, place, signalled):
        return run_main(recipe)


@pytest.mark.parametrize(
    ("place", "call", "last"),
    [
        ("evaluate", 1, 1),  # before the first step: answered after it
        ("evaluate", 2, 2),
        ("save_checkpoint", 1, 3),  # during the save of step 2: nothing is lost, one more step is done
    ],
)
def test_a_signal_during_an_evaluation_or_a_save_is_answered_after_it(pool, run_root, place, call, last):
    recipe = small_recipe(run_root, trainer={"save_every": 2, "eval_every": 2})
    assert pool.run(train_and_signal_inside, recipe, place, call, world_size=1) == [143]
    assert saved(recipe)[-1] == last


def test_a_signal_while_requests_are_polled_is_answered_by_the_next_poll(tmp_path):
    requests = Requests(run_dir=tmp_path, groups=ParallelGroups.single())
    import torch

    plain = torch.tensor

    def interrupted(*args, **kwargs):
        made = plain(*args, **kwargs)
        signal.raise_signal(SIGUSR1)
        return made

    with requests:
        with patch.object(torch, "tensor", interrupted):
            first = requests.poll()
        second, third = requests.poll(), requests.poll()
    assert [request.save for request in (first, second, third)] == [False, True, False]


def test_a_folder_named_save_is_no_request(tmp_path):
    (tmp_path / "save").mkdir()
    assert not Requests(run_dir=tmp_path, groups=ParallelGroups.single()).poll().save


def test_a_save_file_on_a_finished_run_starts_nothing(pool, prepared_data):
    recipe = whole_run(pool, prepared_data, 1)
    rows = rows_of(recipe)
    (recipe.folder.path / "save").touch()
    assert pool.run(run_main, recipe, True, world_size=1) == [0]
    (recipe.folder.path / "save").unlink()
    assert rows_of(recipe) == rows


def test_sigterm_to_torchrun_saves_on_all_ranks(prepared_data, pool, run_root):
    """What a scheduler does: only torchrun gets the signal, and passes it on."""
    recipe = small_recipe(run_root, steps=6)
    # slow enough to be met in the middle
    process = start_run(
        recipe,
        ranks=2,
        code="import time\nfrom faults import plant\n"
        "plant(lambda _, step, run: (time.sleep(0.5 if step > 1 else 0), run())[1])\n",
    )
    deadline = time.monotonic() + 120
    while not (recipe.folder.metrics_file.exists() and curve(recipe)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, SIGTERM)
    started = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - started < 30
    assert process.returncode != 0
    assert "stopped by SIGTERM" in output
    step = saved(recipe)[-1]
    assert step == curve(recipe)[-1]["step"]
    assert 0 < step < 6, "met too late to tell"
    pool.run(train, recipe, True, world_size=2)
    whole = whole_run(pool, prepared_data, 2)
    assert curve(recipe) == curve(whole)
    assert_equal_tensors(recipe, whole)
