"""metrics.jsonl is the record of truth; the wandb mirror works offline and never stops a run."""

import json
import math
import sys
import types

from moe.train.tracker import Tracker, TrackerConfig


def tracker(folder, **fields) -> Tracker:
    return Tracker(folder, config=TrackerConfig(**fields), name="run", recipe={"seed": 0})


def test_rows_are_on_disk_at_once_and_appended(tmp_path):
    first = tracker(tmp_path)
    first.log({"step": 1, "train/loss": 2.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "train/loss": 2.5}\n'
    first.close()
    second = tracker(tmp_path)
    second.log({"step": 2, "train/loss": math.nan, "train/grad_norm": math.inf, "train/is_skipped": True})
    second.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[1] == {"step": 2, "train/loss": None, "train/grad_norm": None, "train/is_skipped": True}


def test_offline_wandb_mirrors_without_a_network(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    mirrored = tracker(tmp_path, wandb="offline")
    mirrored.log({"step": 1, "train/loss": 2.5})
    mirrored.close()
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "train/loss": 2.5}\n'


def test_online_without_a_key_is_offline_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    mirrored = tracker(tmp_path, wandb="online")
    mirrored.close()
    assert "WANDB_API_KEY is not set" in caplog.text
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_a_wandb_that_breaks_never_stops_a_run(tmp_path, monkeypatch, caplog):
    class Run:
        def define_metric(self, *args, **kwargs):
            pass

        def log(self, row):
            raise RuntimeError("disk full")

        def finish(self):
            raise AssertionError("not reached once the mirror is dropped")

    modes = []

    def init(**kwargs):
        modes.append(kwargs["mode"])
        if kwargs["mode"] == "online":
            raise RuntimeError("no key")
        return Run()

    fake = types.SimpleNamespace(init=init, Settings=lambda **kwargs: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "a key")
    mirrored = tracker(tmp_path, wandb="online")
    mirrored.log({"step": 1})
    mirrored.log({"step": 2})
    mirrored.close()
    assert modes == ["online", "offline"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert "no key" in caplog.text
    assert "disk full" in caplog.text
