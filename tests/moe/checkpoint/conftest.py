"""What the checkpoint tests share: a save on many ranks, as threads, and a crash at every line of code."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import moe.checkpoint
from moe.checkpoint import CheckpointReader, Shard, save_checkpoint

# The files that change something on the disk; a crash elsewhere is like one just before the next change.
CRASHING = tuple(str(Path(moe.checkpoint.__path__[0], name)) for name in ("atomic.py", "folder.py", "save.py"))


class ThreadGather:
    """An all-gather between threads. A rank that dies without calling it breaks the barrier for all."""

    def __init__(self, world_size: int) -> None:
        self.slots: list[Any] = [None] * world_size
        self.barrier = threading.Barrier(world_size, timeout=20)

    def of(self, rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            self.slots[rank] = value
            self.barrier.wait()
            everything = list(self.slots)
            self.barrier.wait()
            return everything

        return gather


@pytest.fixture
def save_on_ranks() -> Callable[..., list[Any]]:
    """Save with one thread per list of shards; return the path or the exception of each rank."""

    def save(folder: Path, shards_of_rank: list[Any], *, step: int = 1, state: Any = None) -> list[Any]:
        world_size = len(shards_of_rank)
        gather = ThreadGather(world_size)
        outcomes: list[Any] = [None] * world_size

        def work(rank: int) -> None:
            try:
                outcomes[rank] = save_checkpoint(
                    folder,
                    step=step,
                    shards=shards_of_rank[rank],
                    state={} if state is None else state,
                    rank=rank,
                    world_size=world_size,
                    gather=gather.of(rank),
                )
            except BaseException as error:  # noqa: BLE001 - handed to the test
                outcomes[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes

    return save


@pytest.fixture
def save_step() -> Callable[..., Path]:
    """Save a small checkpoint in one process whose every number tells its step."""

    def save(folder: Path, step: int) -> Path:
        shards = [
            Shard(name="model/a", tensor=torch.full((3, 2), float(step)), logical_shape=(3, 2)),
            Shard(name="count", tensor=torch.tensor(step), logical_shape=()),
        ]
        return save_checkpoint(folder, step=step, shards=shards, state={"step": step, "cursor": [step, "x"]})

    return save


@pytest.fixture
def assert_holds_step() -> Callable[[Path, int], None]:
    """Assert that the checkpoint at a path is, in every number, the one that `save_step` writes."""

    def check(path: Path, step: int) -> None:
        reader = CheckpointReader.open(path)
        assert reader.step == step
        assert reader.state == {"step": step, "cursor": [step, "x"]}
        assert reader.names == {"model/a", "count"}
        assert torch.equal(reader.read("model/a"), torch.full((3, 2), float(step)))
        assert torch.equal(reader.read("count"), torch.tensor(step))

    return check


class Killed(BaseException):
    """Stands for the end of the process: not an Exception, so that no handler mistakes it for an error."""


@pytest.fixture
def crash_everywhere(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Iterator[int]]:
    """Yield for each line that `work` runs in CRASHING, after it was stopped there and the power was cut.

    Cutting the power: of every file below `folder` that was not flushed to the disk, half is lost.
    """

    def run(folder: Path, *, prepare: Callable[[], object], work: Callable[[], object]) -> Iterator[int]:
        flushed: set[tuple[int, int]] = set()

        def fsync(descriptor: int) -> None:
            # Noted, not done: some hundred real flushes take seconds, and a test cannot cut the power anyway.
            status = os.fstat(descriptor)
            flushed.add((status.st_ino, status.st_size))

        monkeypatch.setattr(os, "fsync", fsync)
        point = 0
        while True:
            prepare()
            safe = {(path.stat().st_ino, path.stat().st_size) for path in folder.rglob("*")}
            flushed.clear()
            if not _stopped_at(point, work):
                assert point > 10, "the tracer saw nothing"
                return
            for path in folder.rglob("*"):
                status = path.stat()
                if path.is_file() and (status.st_ino, status.st_size) not in safe | flushed:
                    os.truncate(path, status.st_size // 2)
            yield point
            point += 1

    return run


def _stopped_at(point: int, work: Callable[[], object]) -> bool:
    """Run `work` up to the line number `point` (in order of execution); return whether it got that far."""
    seen = 0

    def trace_line(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal seen
        if event == "line":
            if seen == point:
                raise Killed
            seen += 1
        return trace_line

    def trace_call(frame: FrameType, event: str, arg: object) -> Any:
        return trace_line if frame.f_code.co_filename in CRASHING else None

    before = sys.gettrace()
    sys.settrace(trace_call)
    try:
        work()
    except Killed:
        return True
    finally:
        sys.settrace(before)
    return False
