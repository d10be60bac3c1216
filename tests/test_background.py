"""Commands beside the tests: their result, what does not come in time, and that nothing is left running."""

import os
import sys
import time
from pathlib import Path

from background import Background


def command(code: str) -> Background:
    return Background([sys.executable, "-c", code], environment=dict(os.environ))


def test_code_and_output_come_however_late_they_are_asked_for() -> None:
    background = command("import os, sys; print(os.nice(0)); print('said', file=sys.stderr); sys.exit(3)")
    background.start()
    code, output = background.result(timeout_s=60)
    assert code == 3
    assert output.splitlines() == ["19", "said"]
    assert background.result(timeout_s=60) == (code, output)
    background.clean()


def test_what_takes_too_long_is_killed_with_all_its_processes() -> None:
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    background = command(child)
    background.start()
    time.sleep(1)
    code, output = background.result(timeout_s=1)
    assert code is None
    deadline = time.monotonic() + 10
    while _is_alive(int(output)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _is_alive(int(output))
    background.clean()


def _is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
