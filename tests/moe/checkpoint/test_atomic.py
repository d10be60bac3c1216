"""JSON files are replaced whole or not at all."""

import errno
import json
import os

import pytest

from moe.checkpoint import write_json_atomic


def test_the_value_comes_back_and_no_other_file_is_left(tmp_path):
    path = tmp_path / "recipe.json"
    for value in ({"a": [1, 2.5, None, True, "\u00fc"]}, [], "text", 5):
        write_json_atomic(path, value)
        assert json.loads(path.read_bytes()) == value
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [{"a": (1,)}, {1: 2}, float("nan"), {"a": object()}])
def test_a_value_that_would_come_back_as_another_is_refused(value, tmp_path):
    path = tmp_path / "recipe.json"
    write_json_atomic(path, "old")
    with pytest.raises((ValueError, TypeError)):
        write_json_atomic(path, value)
    assert json.loads(path.read_bytes()) == "old"


@pytest.mark.parametrize("fault", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file_and_nothing_else(fault, tmp_path, monkeypatch):
    path = tmp_path / "recipe.json"
    write_json_atomic(path, "old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, fault, fail)
        with pytest.raises(OSError, match="No space left"):
            write_json_atomic(path, "new")
    assert json.loads(path.read_bytes()) == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_crash_at_any_line_leaves_the_old_value_or_the_new_one(tmp_path, crash_everywhere):
    path = tmp_path / "recipe.json"

    def prepare():
        write_json_atomic(path, "old" * 99)

    found = set()
    for _ in crash_everywhere(tmp_path, prepare=prepare, work=lambda: write_json_atomic(path, "new" * 99)):
        found.add(json.loads(path.read_bytes())[:3])
    assert found == {"old", "new"}
