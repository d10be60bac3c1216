"""One pool of spawned processes for all distributed tests: gloo over a file, torn down and set up again per layout.

Importing torch and DeepSpeed takes seconds, setting up a layout a fraction of one. So the processes start once, and
each test sends them a function. Functions and arguments must be picklable: module-level functions of a test file
qualify.
"""

import multiprocessing as mp
import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_START_TIMEOUT_S = 300.0


class Pool:
    """Runs a function on `world_size` ranks, each in a process of its own, and returns what they returned."""

    def __init__(self, *, max_ranks: int) -> None:
        context = mp.get_context("spawn")
        self._inboxes = [context.Queue() for _ in range(max_ranks)]
        self._outbox = context.Queue()
        self._processes = [
            context.Process(target=_serve, args=(rank, inbox, self._outbox), daemon=True)
            for rank, inbox in enumerate(self._inboxes)
        ]
        for process in self._processes:
            process.start()

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        world_size: int,
        timeout_s: float = _START_TIMEOUT_S,
        **kwargs: Any,
    ) -> list[Any]:
        """Return `function(*args, **kwargs)` of each rank, in order. Raises AssertionError with the tracebacks."""
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            for rank in range(world_size):
                self._inboxes[rank].put((function, args, kwargs, world_size, store))
            results: dict[int, Any] = {}
            failures: dict[int, str] = {}
            while len(results) + len(failures) < world_size:
                try:
                    rank, result, failure = self._outbox.get(timeout=timeout_s)
                except queue.Empty:
                    missing = sorted(set(range(world_size)) - set(results) - set(failures))
                    self.close()
                    raise AssertionError(f"ranks {missing} gave no answer in {timeout_s} s; {failures}") from None
                if failure is None:
                    results[rank] = result
                else:
                    failures[rank] = failure
        if failures:
            raise AssertionError("\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(failures.items())))
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        """End the processes."""
        for inbox in self._inboxes:
            inbox.put(None)
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()


def _serve(rank: int, inbox: Any, outbox: Any) -> None:
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    import torch
    import torch.distributed as dist

    from moe.train import prepare_environment

    prepare_environment("cpu")
    torch.set_num_threads(1)
    while (job := inbox.get()) is not None:
        function, args, kwargs, world_size, store = job
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
        )
        failure, result = None, None
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
            result = function(*args, **kwargs)
        except BaseException:  # noqa: BLE001 - every failure goes to the test that asked
            failure = traceback.format_exc()
        finally:
            if dist.is_initialized():
                from moe.train.engine import end_process_group

                end_process_group()
        outbox.put((rank, result, failure))
