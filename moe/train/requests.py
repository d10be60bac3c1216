"""Requests: what people and schedulers ask of a running run, answered between two steps on all ranks at once.

SIGTERM, SIGINT (Ctrl-C)                save, then stop with exit code 143 or 130; a second SIGINT stops at once
SIGUSR1, or a file named `save` in the run folder     save and go on
"""

import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from moe.parallel.groups import ParallelGroups


class StopRequestedError(Exception):
    """The run was asked to stop and has saved; `exit_code` is 128 + the number of the signal."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"stopped by {signal.Signals(exit_code - 128).name}")
        self.exit_code = exit_code


class TooManySkippedStepsError(RuntimeError):
    """The run goes nowhere: step after step without a finite loss and gradient."""

    exit_code = 21


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to do before the next step, the same on every rank."""

    save: bool
    stop_signal: int  # 0: go on


class Requests:
    """Listens for signals while it is entered, and for the file `save` in `run_dir`."""

    def __init__(self, *, run_dir: Path, groups: ParallelGroups) -> None:
        self._file = run_dir / "save"
        self._groups = groups
        self._num_saves_asked = 0  # counted, not flagged: a signal may come while poll reads
        self._num_saves_answered = 0
        self._stop_signal = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Requests":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._num_saves_asked += 1
        elif number == signal.SIGINT and self._stop_signal:
            raise KeyboardInterrupt
        else:
            self._stop_signal = number

    def poll(self) -> Request:
        """Return what any rank was asked since the last call. Collective."""
        if self._groups.rank == 0 and self._file.is_file():
            self._file.unlink(missing_ok=True)
            self._num_saves_asked += 1
        num_asked = self._num_saves_asked
        asked = torch.tensor([num_asked > self._num_saves_answered, self._stop_signal], device=self._groups.device)
        self._num_saves_answered = num_asked
        if self._groups.data_group is not None:
            dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._groups.data_group)
        save, stop_signal = asked.tolist()
        return Request(save=bool(save), stop_signal=stop_signal)
