"""The set-up that `make train` and `make test` share, with an interpreter that only notes what it is asked to do."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("python3", "python3.13", "python3.12", "python3.11")
INTERPRETER = """#!/bin/sh
case "$*" in
  *version_info*) [ "${0##*/}" = "$SUITABLE" ] ;;
  "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && echo "venv by ${0##*/}" >> asked ;;
  *" show "*) [ -e torch_is_there ] ;;
  *" install "*)
    all="$*"
    echo "pip ${all#*install }" >> asked
    case "$*" in *+cpu*) echo "$CPU_BUILD"; [ -z "$CPU_BUILD" ] ;; esac ;;
  *pytest*|*quickstart*) echo "$*" >> asked ;;
esac
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


class Machine:
    """A folder with our Makefile, and a PATH with interpreters of which one is suitable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tools = folder / "tools"
        self.tools.mkdir()
        shutil.copy(ROOT / "Makefile", folder)
        shutil.copy(ROOT / "pyproject.toml", folder)
        for name in NAMES:
            self.add_tool(name, INTERPRETER)
        self.add_tool("nvidia-smi", "#!/bin/sh\nexit 9\n")

    def add_tool(self, name: str, script: str) -> None:
        (self.tools / name).write_text(script)
        (self.tools / name).chmod(0o755)

    def make(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run make there. Settings: SUITABLE, a name of an interpreter; CPU_BUILD, the error of its install."""
        environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
        environment |= {"SUITABLE": "python3", "CPU_BUILD": "", "PATH": f"{self.tools}:{os.environ['PATH']}"}
        environment |= settings
        return subprocess.run(
            ["make", *arguments], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=60
        )

    def asked(self) -> list[str]:
        """Return what the interpreters were asked for since the last call."""
        notes = self.folder / "asked"
        lines = notes.read_text().splitlines() if notes.exists() else []
        notes.unlink(missing_ok=True)
        return lines


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


EVERYTHING = "pip -qq --editable .[dev]"


def test_fresh_machine_is_set_up_once(machine: Machine) -> None:
    assert machine.make("test").returncode == 0
    assert machine.asked() == ["venv by python3", "pip -qq torch==2.13.0+cpu", EVERYTHING, "-m pytest"]
    assert machine.make("train", "ARGS=--trainer.steps 3").returncode == 0
    assert machine.asked() == ["recipes/quickstart.py --trainer.steps 3"]


def test_changed_requirements_are_installed_and_torch_is_kept(machine: Machine) -> None:
    machine.make("setup")
    machine.asked()
    (machine.folder / "torch_is_there").touch()
    installed = (machine.folder / ".venv/.installed").stat().st_mtime
    os.utime(machine.folder / "pyproject.toml", (installed + 10, installed + 10))
    assert machine.make("setup").returncode == 0
    assert machine.asked() == [EVERYTHING]


def test_newer_interpreter_is_found_behind_an_old_python3(machine: Machine) -> None:
    machine.make("setup", SUITABLE="python3.12")
    assert machine.asked()[0] == "venv by python3.12"


def test_machine_without_a_suitable_python_is_told_what_to_do(machine: Machine) -> None:
    result = machine.make("test", SUITABLE="none")
    assert result.returncode != 0
    assert "need >= 3.11" in result.stderr
    assert machine.asked() == []


def test_named_interpreter_is_taken_or_refused_but_never_replaced(machine: Machine) -> None:
    result = machine.make("setup", "PYTHON=python3.11", SUITABLE="python3")
    assert result.returncode != 0
    assert "tried python3.11." in result.stderr


def test_missing_cpu_build_is_said_before_torch_is_taken_as_offered(machine: Machine) -> None:
    result = machine.make("setup", CPU_BUILD="ERROR: No matching distribution found for torch==2.13.0+cpu")
    assert result.returncode == 0
    assert "have no CPU build" in result.stdout
    assert machine.asked()[1:] == ["pip -qq torch==2.13.0+cpu", "pip -qq torch==2.13.0", EVERYTHING]


def test_any_other_failure_of_pip_is_shown_and_ends_the_set_up(machine: Machine) -> None:
    result = machine.make("test", CPU_BUILD="ERROR: No space left on device")
    assert result.returncode != 0
    assert "No space left on device" in result.stderr
    assert machine.asked()[1:] == ["pip -qq torch==2.13.0+cpu"]


def test_machine_with_a_gpu_takes_torch_as_offered(machine: Machine) -> None:
    machine.add_tool("nvidia-smi", "#!/bin/sh\nexit 0\n")
    machine.make("setup")
    assert machine.asked()[1:] == [EVERYTHING]


def test_torch_can_be_named(machine: Machine) -> None:
    machine.make("setup", "TORCH=torch==2.12.0")
    assert machine.asked()[1:] == ["pip -qq torch==2.12.0", EVERYTHING]


def test_gpu_runs_with_the_python_at_hand_and_keeps_its_packages(machine: Machine) -> None:
    machine.add_tool("python3", '#!/bin/sh\necho "$PYTHONPATH $*" >> asked\n')
    assert machine.make("gpu", "ARGS=--parts tests", PYTHONPATH="/brought").returncode == 0
    assert machine.asked() == [".:kernels:recipes:/brought benchmarks/run_on_gpu.py --parts tests"]
    assert "make gpu" in machine.make("help").stdout
