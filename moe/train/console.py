"""Console: one live line on a terminal, plain lines elsewhere: step, loss, tokens/s, load, time left."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class RunConsole:
    """Prints a run on rank 0; silent elsewhere.

    On a terminal one line is redrawn in place; without one, a plain line is printed for each logged step.
    """

    def __init__(self, *, total_steps: int, first_step: int, is_silent: bool) -> None:
        self._console = Console(quiet=is_silent, highlight=False, soft_wrap=True)
        self._total = total_steps
        self._progress: Progress | None = None
        if self._console.is_terminal and not is_silent:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[figures]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(compact=True),
                console=self._console,
            )
            self._task = self._progress.add_task("", total=total_steps, completed=first_step, figures="")
            self._progress.start()

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self._console.print(text)

    def step(self, done: int) -> None:
        """Move the live line to `done` finished steps."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done)

    def row(self, row: Mapping[str, Any], *, seconds_left: float) -> None:
        """Show the figures of a logged step."""
        figures = (
            f"loss {row['train/loss']:.4f}  lm {row['train/lm_loss']:.4f}  {row['perf/tokens_per_s']:,.0f} tokens/s  "
            f"max/mean load {row['moe/load_max_over_mean']:.2f}  grad {row['train/grad_norm']:.2f}"
        )
        if self._progress is not None:
            self._progress.update(self._task, figures=figures)
        else:
            self._console.print(f"step {row['step']}/{self._total}  {figures}  ETA {_clock(seconds_left)}")

    def close(self) -> None:
        """End the live line."""
        if self._progress is not None:
            self._progress.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
