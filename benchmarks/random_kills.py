"""Kill a run at random moments, resume it each time, and compare it with a run that nobody killed, to the bit.

    python benchmarks/random_kills.py --kills 10
    python benchmarks/random_kills.py --kills 10 --ranks 2 --dtype bf16 --scope lagged

A run of 20 steps with selection bias, jitter noise and accumulation, saved every second step. Each kill is SIGKILL to
all processes at once, at a random time after the first new row. Printed: what was lost at each, and whether rows and
tensors of the run that came through are those of the undisturbed one.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
_PATHS = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "recipes")]
sys.path[:0] = _PATHS

from debug import debug  # noqa: E402
from moe.balance.load import BalanceConfig, Scope  # noqa: E402
from moe.checkpoint import CheckpointReader, list_checkpoints, write_json_atomic  # noqa: E402
from moe.recipe import Recipe  # noqa: E402
from moe.routers.topk import TopKConfig  # noqa: E402
from moe.run import read_rows  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to kill, and how often."""

    kills: int = 10
    ranks: int = 1
    dtype: Literal["fp32", "bf16"] = "fp32"
    scope: Scope = "exact"
    accumulation: int = 3
    steps: int = 20
    save_every: int = 2
    seed: int = 0  # of the moments
    cache_dir: Path | None = None  # of the data, where some is prepared


def kill_and_compare(task: Task, root: Path) -> dict[str, Any]:
    """Return the figures of `task`, run in the folder `root`: kills, lost steps, differences."""
    whole, broken = (_recipe(task, root, name, task.cache_dir or root / "data") for name in ("whole", "broken"))
    output, _ = _start(whole, task).communicate()
    _expect_end(whole, task, output)
    moments = random.Random(task.seed)
    lost = []
    # of all steps together: kills are spread over the run
    seconds = sum(whole.batch.tokens / row["perf/tokens_per_s"] for row in _rows(whole))
    while len(lost) < task.kills and _newest_step(broken) < task.steps:
        delay = moments.uniform(0, seconds / max(1, task.kills))
        trained, saved = _start_and_kill(broken, task, delay)
        if not lost and saved == task.steps:
            print(f"{delay:.2f} s was too late, the run had come to its end: from the start, and sooner", flush=True)
            shutil.rmtree(broken.folder.path)
            seconds /= 2
            continue
        lost.append(trained - saved)
        print(f"kill {len(lost)}: {delay:.2f} s after a save, at step {trained}, newest save {saved}", flush=True)
    output, _ = _start(broken, task, "--resume").communicate()
    _expect_end(broken, task, output)
    old, new = _tensors(whole), _tensors(broken)
    return {
        "kills": len(lost),
        "lost_steps": sum(lost),
        "most_lost_steps": max(lost, default=0),
        "resumes": sum(bool(row.get("resume")) for row in read_rows(broken.folder.metrics_file)),
        "rows": len(_curve(broken)),
        "different_rows": sum(a != b for a, b in zip(_curve(whole), _curve(broken), strict=True)),
        "tensors": len(new),
        "different_tensors": sum(not torch.equal(new[name], old[name]) for name in old.keys() | new.keys()),
    }


def _recipe(task: Task, root: Path, name: str, cache_dir: Path) -> Recipe:
    recipe = debug()
    sequences = 2 * task.ranks * task.accumulation
    return replace(
        recipe,
        name=name,
        runs_dir=str(root / "runs"),
        data=replace(recipe.data, cache_dir=str(cache_dir), builtin_bytes=60_000, vocab_size=512),
        model=replace(
            recipe.model,
            vocab_size=512,
            router=TopKConfig(norm_topk_prob=True, use_selection_bias=True, router_jitter_noise=0.05),
        ),
        batch=replace(recipe.batch, global_sequences=sequences, micro_sequences=2),
        balance=BalanceConfig(scope=task.scope, smoothing=0.5 if task.scope == "lagged" else 0.0),
        parallel=replace(recipe.parallel, dtype=task.dtype),
        schedule=replace(recipe.schedule, warmup_steps=2),
        trainer=replace(recipe.trainer, steps=task.steps, log_every=1, save_every=task.save_every, eval_sequences=3),
    )


def _start(recipe: Recipe, task: Task, *flags: str) -> subprocess.Popen:
    folder = Path(recipe.runs_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{recipe.name}.json"
    write_json_atomic(file, recipe.to_json())
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(task.ranks)]
    return subprocess.Popen(
        [sys.executable, *(torchrun if task.ranks > 1 else []), "-m", "moe", "train", str(file), *flags],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(_PATHS), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


def _start_and_kill(recipe: Recipe, task: Task, delay: float) -> tuple[int, int]:
    """Kill all processes `delay` seconds after a new row, once something is saved; return the steps trained and saved.

    Before the first save there is nothing to resume from, so a kill there shows nothing.
    """
    process = _start(recipe, task, "--resume")
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if re.match(r"step \d+/\d+  loss", line):
            break
    else:
        raise RuntimeError("".join(said))
    while process.poll() is None and not list_checkpoints(recipe.folder.checkpoints_dir):
        time.sleep(0.01)
    time.sleep(delay)
    # the workers of torchrun live in sessions of their own
    for pid in [process.pid, *_children(process.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            print(f"process {pid} had come to its end")
    process.communicate()
    return max(row["step"] for row in _curve(recipe)), _newest_step(recipe)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _expect_end(recipe: Recipe, task: Task, output: str) -> None:
    if _newest_step(recipe) != task.steps:
        raise RuntimeError(f"{recipe.name} did not come to its end:\n{output}")


def _newest_step(recipe: Recipe) -> int:
    found = list_checkpoints(recipe.folder.checkpoints_dir)
    return CheckpointReader.open(found[-1]).step if found else 0


def _rows(recipe: Recipe) -> list[dict[str, Any]]:
    return [row for row in read_rows(recipe.folder.metrics_file) if "train/loss" in row]


def _curve(recipe: Recipe) -> list[dict[str, Any]]:
    """The training rows without speeds, which no two runs share."""
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in _rows(recipe)]


def _tensors(recipe: Recipe) -> dict[str, torch.Tensor]:
    reader = CheckpointReader.open(list_checkpoints(recipe.folder.checkpoints_dir)[-1])
    return {name: reader.read(name) for name in reader.names}


def main() -> None:
    task = tyro.cli(Task, description=__doc__)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures = kill_and_compare(task, Path(folder))
    print(json.dumps({**figures, "seconds": round(time.monotonic() - started, 1)}, indent=1))
    sys.exit(bool(figures["different_rows"] or figures["different_tensors"]))


if __name__ == "__main__":
    main()
