"""Retention: disk is bounded, and the newest good checkpoint is never among what goes."""

import shutil

import pytest

from moe.checkpoint import list_checkpoints, newest_checkpoint, prune, remove_leftovers


def steps(folder):
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(folder)]


def test_the_newest_are_kept_and_the_rest_is_returned(tmp_path, save_step):
    for step in (1, 2, 3, 10):
        save_step(tmp_path, step)
    assert prune(tmp_path, keep=9) == []
    assert prune(tmp_path, keep=4) == []
    assert prune(tmp_path, keep=2) == [tmp_path / "step_00000001", tmp_path / "step_00000002"]
    assert steps(tmp_path) == [3, 10]
    assert prune(tmp_path, keep=1) == [tmp_path / "step_00000003"]
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000010"}
    assert prune(tmp_path / "nothing", keep=1) == []


def test_the_newest_good_one_stays_however_many_damaged_ones_are_newer(tmp_path, save_step):
    for step in range(1, 7):
        path = save_step(tmp_path, step)
        if step >= 4:
            (path / "rank_00000.safetensors").write_bytes(b"")
    prune(tmp_path, keep=2)
    assert steps(tmp_path) == [3, 5, 6]
    prune(tmp_path, keep=1)
    assert steps(tmp_path) == [3, 6]
    assert newest_checkpoint(tmp_path, report=lambda _: None) == tmp_path / "step_00000003"


def test_one_known_to_be_good_is_not_read_again(tmp_path, save_step):
    for step in (1, 2):
        path = save_step(tmp_path, step)
    (path / "state.json").unlink()  # so that reading it would find it damaged
    prune(tmp_path, keep=1, known_good=path)
    assert steps(tmp_path) == [2]


def test_one_known_to_be_good_that_is_not_kept_does_not_count(tmp_path, save_step):
    for step in (1, 2):
        path = save_step(tmp_path, step)
    (path / "state.json").unlink()
    prune(tmp_path, keep=1, known_good=tmp_path / "step_00000001")
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("keep", [0, -1])
def test_keeping_none_is_refused(keep, tmp_path, save_step):
    save_step(tmp_path, 1)
    with pytest.raises(ValueError, match=f"keep is {keep}"):
        prune(tmp_path, keep=keep)
    assert steps(tmp_path) == [1]


def test_a_crash_at_any_line_of_a_removal_leaves_whole_checkpoints_only(
    tmp_path, save_step, assert_holds_step, crash_everywhere
):
    template, folder = tmp_path / "template", tmp_path / "checkpoints"
    for step in (1, 2, 3):
        save_step(template, step)

    def prepare():
        for path in folder.glob("step_*"):
            shutil.rmtree(path)
        shutil.copytree(template, folder, dirs_exist_ok=True)  # over the .trash of the crash before

    for _ in crash_everywhere(folder, prepare=prepare, work=lambda: prune(folder, keep=1)):
        assert steps(folder)[-1] == 3
        for step in steps(folder):
            assert_holds_step(folder / f"step_{step:08d}", step)
    assert steps(folder) == [3]


def test_leftovers_are_removed_and_nothing_else(tmp_path, save_step):
    save_step(tmp_path, 1)
    kept = ["step_00000001", ".corrupt-step_00000002", "notes", ".tmp-something", ".trash-step_5"]
    for name in [*kept, ".tmp-step_00000003", ".trash-step_00000001"]:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "file").write_text("x")
    removed = remove_leftovers(tmp_path)
    assert removed == [tmp_path / ".tmp-step_00000003", tmp_path / ".trash-step_00000001"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    assert remove_leftovers(tmp_path) == remove_leftovers(tmp_path / "nothing") == []
