"""Doctor: findings from known facts, and the whole table on this machine and on one with things missing."""

import ast
import io
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from rich.console import Console

from moe import doctor
from moe.doctor import Package, check_package, diagnose, run_doctor
from moe_kernels.backends import BACKENDS

ROOT = Path(__file__).resolve().parents[2]


def by_part(findings: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {finding.part: finding for finding in findings}


@pytest.mark.parametrize(
    ("is_needed", "version", "state"),
    [
        (True, None, "problem"),
        (False, None, "note"),
        (True, "0.18.1", "note"),
        (True, "0.19.8", "ok"),
        (True, "0.19.9rc1", "ok"),
        (True, "0.20", "note"),
    ],
)
def test_package_is_judged_by_presence_and_limits(is_needed: bool, version: str | None, state: str) -> None:
    package = Package(name="deepspeed", use="the training engine", is_needed=is_needed)
    finding = check_package(package, Requirement("deepspeed>=0.19.8,<0.20"), version)
    assert finding.state == state
    assert finding.remedy == ("" if state == "ok" else 'pip install "deepspeed<0.20,>=0.19.8"')


def test_package_without_limits_passes_in_any_version() -> None:
    assert check_package(Package(name="numpy", use="tokens"), None, "1.0").state == "ok"


def test_limits_are_those_of_this_platform_and_keep_the_optional_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = [
        "torch<2.14,>=2.10",
        'triton<3.8; sys_platform == "no such system"',
        'datasets>=3; extra == "datasets"',
        'pytest>=8; extra == "dev"',
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    limits = doctor.version_limits()
    assert sorted(limits) == ["datasets", "torch"]
    assert str(limits["torch"].specifier) == "<2.14,>=2.10"


def test_packages_that_moe_imports_at_the_top_of_a_file_are_the_needed_ones() -> None:
    imported = set()
    for path in (ROOT / "moe").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    assert {p.name for p in doctor.PACKAGES if p.is_needed} == imported & {p.name for p in doctor.PACKAGES}


def test_every_backend_is_tried_on_this_machine() -> None:
    findings = by_part(diagnose())
    assert {f"backend {name}" for name in BACKENDS} <= set(findings)
    assert findings["auto on cpu"].state == "ok"
    assert "agrees with naive" in findings["backend segments"].found


def test_backend_that_answers_wrongly_or_breaks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        def refusal(self, **_: object) -> None:
            return None

        def __call__(self, *case: torch.Tensor, fan_out: int) -> torch.Tensor:
            return BACKENDS["naive"](*case, fan_out=fan_out) * 1.1

    class Broken(Wrong):
        def __call__(self, *case: torch.Tensor, fan_out: int) -> torch.Tensor:
            raise OSError("no compiler")

    monkeypatch.setattr(doctor, "BACKENDS", {"naive": BACKENDS["naive"], "segments": Wrong(), "broken": Broken()})
    findings = by_part(list(doctor._backends()))
    assert findings["backend naive"].state == "ok"
    assert findings["backend segments"].state == "problem"  # it is what auto picks
    assert "cpu float32: differs from naive by 1.0e-01" in findings["backend segments"].found
    assert findings["backend broken"].state == "note"
    assert "cpu float32: OSError: no compiler" in findings["backend broken"].found


@pytest.mark.parametrize(("free_gib", "state"), [(0.5, "problem"), (1.5, "note"), (30.0, "ok")])
def test_little_room_is_told(free_gib: float, state: str) -> None:
    assert doctor._amount("disk", free_gib, "free").state == state


def test_exit_code_and_last_line_follow_the_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(absent: set[str]) -> tuple[int, str]:
        with monkeypatch.context() as patch:
            patch.setattr(doctor, "installed", lambda name: None if name in absent else "1.0")
            patch.setattr(doctor, "version_limits", dict)
            console = Console(width=120, file=io.StringIO(), record=True)
            return run_doctor(console), console.export_text()

    code, text = shown(set())
    assert (code, "The quickstart can run here" in text) == (0, True)
    code, text = shown({"wandb", "triton", "datasets", "megablocks"})
    assert (code, 'pip install "wandb"' in text) == (0, True)
    code, text = shown({"deepspeed", "tokenizers"})
    assert (code, "cannot run here yet: deepspeed, tokenizers" in text) == (1, True)


def test_brackets_of_an_install_line_survive_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_limits", dict)
    console = Console(width=200, file=io.StringIO(), record=True)
    run_doctor(console)
    assert 'pip install -e ".[dev]"' in console.export_text()


def test_doctor_runs_where_optional_packages_cannot_be_imported() -> None:
    code = (
        "import sys\n"
        "heavy = ('deepspeed', 'transformers', 'wandb', 'datasets', 'triton', 'megablocks', 'tokenizers')\n"
        "sys.modules.update(dict.fromkeys(heavy))\n"  # None there makes every import of them fail
        "from moe.doctor import run_doctor\n"
        "run_doctor()\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "auto on cpu" in result.stdout
