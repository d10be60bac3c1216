"""kill -9 at random moments of real saves, in real processes: what was saved is there, and nothing else."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe.checkpoint import list_checkpoints, newest_checkpoint, remove_leftovers

# Loads the package once, then for each line on stdin forks a child that resumes, saves without end, and tells
# each step that it has saved.
SERVER = """
import os, sys
from pathlib import Path
import torch
from moe.checkpoint import Shard, newest_checkpoint, prune, save_checkpoint

def train(folder):
    newest = newest_checkpoint(folder, report=lambda _: None)
    step = int(newest.name[5:]) if newest else 0
    os.write(1, b"started\\n")
    while True:
        step += 1
        shards = [
            Shard(name="model/a", tensor=torch.full((3, 2), float(step)), logical_shape=(3, 2)),
            Shard(name="count", tensor=torch.tensor(step), logical_shape=()),
        ]
        path = save_checkpoint(folder, step=step, shards=shards, state={"step": step, "cursor": [step, "x"]})
        os.write(1, b"saved %d\\n" % step)
        prune(folder, 2, known_good=path)

torch.set_num_threads(1)
for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        train(Path(sys.argv[1]))
    os.write(1, b"child %d\\n" % child)
    os.waitpid(child, 0)
    os.write(1, b"dead\\n")
"""
KILLS = 12


@pytest.fixture
def server(tmp_path):
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", SERVER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=20) == 0


def test_no_kill_loses_a_checkpoint_that_was_saved(tmp_path, server, assert_holds_step):
    rng = random.Random()
    last_saved = 0

    def hear() -> list[str]:
        nonlocal last_saved
        words = server.stdout.readline().split()
        if words[0] == "saved":
            last_saved = int(words[1])
        return words

    for kill in range(KILLS):
        # by turns: a moment after the start, and a moment after one more save, however slow the machine is
        target = last_saved + kill % 2
        server.stdin.write("go\n")
        heard: dict[str, list[str]] = {}
        while not {"child", "started"} <= heard.keys() or last_saved < target:
            words = hear()
            heard[words[0]] = words[1:]
        time.sleep(rng.uniform(0, 0.06))
        os.kill(int(heard["child"][0]), signal.SIGKILL)
        while hear() != ["dead"]:
            pass
        newest = newest_checkpoint(tmp_path, report=pytest.fail)
        if last_saved:
            assert newest is not None
            assert int(newest.name[5:]) in (last_saved, last_saved + 1)
        for path in list_checkpoints(tmp_path):
            assert_holds_step(path, int(path.name[5:]))
        # the last save can be complete without having been told
        last_saved = int(newest.name[5:]) if newest else 0
        if rng.random() < 0.5:
            remove_leftovers(tmp_path)
    assert last_saved >= KILLS // 2
