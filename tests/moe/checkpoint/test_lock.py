"""Two runs on one folder: the second is refused, and the dead do not hold locks."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from moe.checkpoint import RunLock, RunLockedError

# A stand-in for another run: takes the same kernel lock and signs the same file, without loading the package.
OTHER_RUN = """
import fcntl, json, os, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.truncate(0)
file.write(json.dumps({"pid": os.getpid(), "host": "elsewhere", "started": "2026-01-02T03:04:05+00:00"}))
file.flush()
print("locked", flush=True)
time.sleep(60)
"""


def test_the_second_of_two_runs_is_refused_and_told_who_is_first(tmp_path):
    with RunLock.acquire(tmp_path):
        for _ in range(2):
            with pytest.raises(RunLockedError) as caught:
                RunLock.acquire(tmp_path)
            for word in (str(tmp_path), f"process {os.getpid()}", socket.gethostname(), "--name"):
                assert word in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_a_released_lock_can_be_taken_again(tmp_path):
    first = RunLock.acquire(tmp_path)
    first.release()
    with RunLock.acquire(tmp_path) as second:
        assert second.replaced is None
        first.release()  # once more: must not release the second one
        with pytest.raises(RunLockedError):
            RunLock.acquire(tmp_path)


def test_a_lock_is_freed_when_the_run_raises(tmp_path):
    with pytest.raises(RuntimeError), RunLock.acquire(tmp_path):
        raise RuntimeError
    RunLock.acquire(tmp_path).release()


def test_two_folders_are_two_locks(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with RunLock.acquire(tmp_path / "a"), RunLock.acquire(tmp_path / "b"):
        pass


def test_the_lock_of_a_living_process_holds_and_that_of_a_killed_one_is_taken_over(tmp_path):
    command = [sys.executable, "-c", OTHER_RUN, str(tmp_path / "run.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RunLockedError, match=f"process {other.pid} on elsewhere, started 2026-01-02T03:04"):
            RunLock.acquire(tmp_path)
        other.send_signal(signal.SIGKILL)
    with RunLock.acquire(tmp_path) as lock:
        assert lock.replaced is not None
        assert lock.replaced.pid == other.pid


def test_a_half_written_lock_file_of_a_dead_run_does_not_matter(tmp_path):
    for content in (b"", b'{"pid": 1', b"\xff\x00" * 500, b"[]", b'{"pid": null, "host": 1, "started": 2}'):
        (tmp_path / "run.lock").write_bytes(content)
        with RunLock.acquire(tmp_path) as lock:
            assert lock.replaced is None
            with pytest.raises(RunLockedError, match=f"process {os.getpid()}"):
                RunLock.acquire(tmp_path)


def test_a_child_that_inherited_the_lock_does_not_keep_a_released_one(tmp_path):
    lock = RunLock.acquire(tmp_path)
    with subprocess.Popen(["sleep", "60"], pass_fds=[lock._descriptor]) as child:
        lock.release()
        RunLock.acquire(tmp_path).release()
        child.kill()


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        RunLock.acquire(tmp_path / "nothing")
