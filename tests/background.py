"""Commands that keep a core busy for minutes: started when the tests are collected, at the lowest priority.

Most tests of the suite wait for one another's processes and leave a core idle; there these go on until their own tests
ask for the result. conftest.py starts what the collected modules list in BACKGROUND, and ends what is left over.
"""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Background:
    """One command, run in the root of the repository.

    Args:
        environment: in place of that of this process.
    """

    def __init__(self, command: Sequence[str], *, environment: dict[str, str]) -> None:
        self._command, self._environment = list(command), environment
        self._process: subprocess.Popen[bytes] | None = None
        self._log = ""

    def start(self) -> None:
        """Start it, unless that has happened."""
        if self._process is not None:
            return
        handle, self._log = tempfile.mkstemp(suffix=".log")
        nice = [path, "-n", "19"] if (path := shutil.which("nice")) else []
        with os.fdopen(handle, "wb") as output:
            self._process = subprocess.Popen(
                [*nice, *self._command],
                cwd=ROOT,
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,  # no session of its own: Linux shares the processor among sessions, nice or not
            )

    def result(self, *, timeout_s: float) -> tuple[int | None, str]:
        """Return exit code and output, after waiting so long at most; None for a code that did not come."""
        self.start()
        assert self._process is not None
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = None
            self.end()
        return code, Path(self._log).read_text(errors="replace")

    def end(self) -> None:
        """Kill what is still running, its own processes included."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def clean(self) -> None:
        """End it and remove its output."""
        self.end()
        if self._log:
            Path(self._log).unlink(missing_ok=True)
