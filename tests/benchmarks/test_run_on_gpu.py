"""The runner of GPU parts: what is done stays done, limits hold, failures are shown, and nothing is left running."""

import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("run_on_gpu")


def part_of(runner, name: str, *command: str, **options):
    return runner.Part(name=name, commands=(command,), **({"limit_s": 20.0} | options))


def test_a_second_call_does_what_failed_and_nothing_that_is_done(runner, tmp_path: Path, capsys) -> None:
    count = tmp_path / "count"
    good = part_of(runner, "good", "sh", "-c", f"echo once >> {count}")
    bad = part_of(runner, "bad", "sh", "-c", "echo the reason; exit 3")
    assert runner.run_all((good, bad), tmp_path / "state", budget_s=60) == 1
    shown = capsys.readouterr().out
    assert "rc 3" in shown and "| the reason" in shown
    assert (tmp_path / "state/good.done").exists() and not (tmp_path / "state/bad.done").exists()

    mended = part_of(runner, "bad", "true")
    assert runner.run_all((good, mended), tmp_path / "state", budget_s=60) == 0
    assert count.read_text() == "once\n"


def test_a_part_over_its_limit_is_killed_with_what_it_started(runner, tmp_path: Path) -> None:
    late = tmp_path / "late"
    slow = part_of(runner, "slow", "sh", "-c", f"(sleep 2; touch {late}) & sleep 30", limit_s=0.5)
    started = time.perf_counter()
    outcome = runner.run_part(slow, tmp_path / "state", seconds_left=60)
    assert outcome.state == "failed" and "killed" in outcome.note
    assert time.perf_counter() - started < 10
    time.sleep(2.2)
    assert not late.exists()


def test_what_the_budget_has_no_time_for_is_left_to_the_next_call(runner, tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert runner.run_all((part_of(runner, "good", "true"),), state, budget_s=1) == 2
    assert runner.run_all((part_of(runner, "good", "true"),), state, budget_s=60) == 0


def test_parts_still_to_run_share_the_budget(runner, tmp_path: Path) -> None:
    three = tuple(part_of(runner, name, "true", limit_s=limit) for name, limit in (("a", 10), ("b", 20), ("c", 30)))
    (tmp_path / "c.done").touch()
    a, b, _ = runner.shared(three, tmp_path, budget_s=90)
    assert (a.limit_s, b.limit_s) == (30, 60)


def test_the_second_command_of_a_part_waits_for_the_first(runner, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    both = runner.Part(name="both", commands=(("false",), ("touch", str(touched))), limit_s=20.0)
    assert runner.run_part(both, tmp_path / "state", seconds_left=60).state == "failed"
    assert not touched.exists()


def test_what_is_missing_or_refused_by_the_machine_is_skipped_by_name(runner, tmp_path: Path) -> None:
    lacking = part_of(runner, "lacking", "true", needs=("no-such-program",))
    refused = part_of(runner, "refused", "sh", "-c", "echo Device not supported; exit 1", unsupported="not supported")
    outcomes = [runner.run_part(part, tmp_path / "state", seconds_left=60) for part in (lacking, refused)]
    assert [outcome.state for outcome in outcomes] == ["skipped", "skipped"]
    assert "no-such-program" in outcomes[0].note
    assert runner.run_all((lacking, refused), tmp_path / "state", budget_s=60) == 0
    assert not list((tmp_path / "state").glob("*.done"))


def test_the_parts_name_files_that_exist_and_fit_the_budget(runner) -> None:
    parts = runner.parts("x")
    assert sum(part.limit_s for part in parts) <= runner.BUDGET_S
    for part in parts:
        for command in part.commands:
            files = [word for word in command if word.endswith(".py")]
            assert all((runner.ROOT / file).exists() or file in part.needs for file in files), part.name
    assert any(file.endswith("test_gpu.py") for file in parts[0].commands[0])


def test_it_starts_without_torch() -> None:
    code = "import sys, run_on_gpu; run_on_gpu.main(['--list']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, check=True, capture_output=True)


def test_a_copy_of_the_files_is_told_its_commit(runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_COMMIT", "abc1234")
    assert runner.current_commit() == "abc1234"
