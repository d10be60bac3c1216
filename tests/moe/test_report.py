"""Report: what is printed for known figures, line by line, and what is left out where there is nothing to say."""

import io
import math
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from torch import Tensor

from moe.inspect import pictures
from moe.report import ReportInput, next_commands, print_report
from moe.train.evaluate import DomainEvaluation

# two domains, two layers, four experts; 100 rows per domain and layer
CODE_LE = torch.tensor([[25, 25, 25, 25], [60, 20, 10, 10]])
PROSE_LE = torch.tensor([[25, 25, 25, 25], [20, 20, 30, 30]])


def evaluation(loss: float, counts_LE: Tensor | None, **changes: Any) -> DomainEvaluation:
    fields = {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / 2, "num_tokens": 1234, **changes}
    return DomainEvaluation(tokens_per_expert_LE=counts_LE, **fields)


def make_rows() -> list[dict[str, Any]]:
    """A run that was killed after step 20 and resumed from there."""
    return [
        {"step": 0, "tokens": 0, "eval/code/loss": 7.5, "eval/prose/loss": 7.25},
        {"step": 10, "tokens": 5120, "perf/tokens_per_s": 900.0},
        {"step": 20, "tokens": 10240, "perf/tokens_per_s": 1100.0},
        {"step": 20, "tokens": 10240, "eval/code/loss": 3.0, "eval/prose/loss": 4.0},
        {"step": 20, "resume": True, "dropped_rows": 1},
        {"step": 30, "tokens": 15360, "perf/tokens_per_s": 1204.0},
        {"step": 40, "tokens": 20480, "perf/tokens_per_s": 1300.0},
    ]


def make_report(run_dir: Path, **changes: Any) -> ReportInput:
    fields: dict[str, Any] = {
        "run_dir": run_dir,
        "script": "recipes/quickstart.py",
        "rows": make_rows(),
        "unigram": {"code": 5.5, "prose": 1.5},
        "evaluations": {"code": evaluation(2.0, CODE_LE), "prose": evaluation(3.0, PROSE_LE, bits_per_byte=None)},
        "sample_prompt": "The ",
        "sample_text": "end of\n    the line",
        "moe_layers": (1, 3),
    }
    return ReportInput(**{**fields, **changes})


def printed(report: ReportInput, *, width: int = 80) -> str:
    console = Console(record=True, width=width, file=io.StringIO(), highlight=False)
    print_report(report, console)
    # cells are padded with spaces, which nobody sees
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder by its relative path; pictures come out empty, since drawing takes most of the time."""
    monkeypatch.setattr(pictures, "load_heat_map", lambda counts_LE, path, *, layers: path.touch())
    monkeypatch.setattr(pictures, "domain_heat_map", lambda counts_DLE, names, path, *, layers: path.touch())
    monkeypatch.chdir(tmp_path)
    path = Path("runs/first")
    path.mkdir(parents=True)
    return path


@pytest.fixture
def programs_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment with the programs, activated."""
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name in ("python", "moe", "torchrun"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_whole_report_of_known_figures(run_dir: Path, programs_on_path: Path) -> None:
    # layer 3: shares .6 .2 .1 .1 and .2 .2 .3 .3, entropies 1.0889 and 1.3662 nats, of the mean 1.3322;
    # (1.3322 - 1.2275) / log 2 = 0.151
    assert (
        printed(make_report(run_dir))
        == f"""
{"What the model learned ":-<80}
40 steps, 20,480 tokens, 1,152 tokens/s (median)
Loss on held-out text, in nats per token:
domain   tokens   before   unigram   after   perplexity   bits/byte
code      1,234    7.500     5.500   2.000         7.39       1.000
prose     1,234    7.250     1.500   3.000        20.09           -
(unigram: the loss of knowing only how often each token occurs)
The loss is lower than before training in 2 of 2 domains.
The loss is below the unigram baseline in 1 of 2 domains.

{"How the experts share the work ":-<80}
expert    0   1   2   3
layer 1 1.0 1.0 1.0 1.0
layer 3 1.6 0.8 0.8 0.8
1.0 = uniform share of the layer's rows; - = no row at all
Healthy: no expert is idle; the busiest takes 1.6x the mean (layer 3 expert 0).
As pictures: runs/first/expert_load.png, runs/first/domain_experts.png

{"Which experts each domain prefers ":-<80}
code   layer 3 expert 0 takes 60% of its rows, 1.5x the mean of all domains
prose  layer 3 expert 2 takes 30% of its rows, 1.5x the mean of all domains
       layer 3 expert 3 takes 30% of its rows, 1.5x the mean of all domains
How far domains differ in their experts (0 = not at all, 1 = none in common):
layer 1: 0.000   layer 3: 0.151

{"A text from the model ":-<80}
+{"-" * 78}+
| The end of{"":67}|
|     the line{"":65}|
+{"-" * 78}+

{"Try next ":-<80}
moe sample runs/first --prompt "def "
moe eval runs/first
torchrun --nproc-per-node 2 recipes/quickstart.py --name first-ep2 --parallel.ep-size 2 --trainer.steps 100"""
    )


def test_pictures_are_written_into_the_run_folder(tmp_path: Path) -> None:
    printed(make_report(tmp_path))
    for name in ("expert_load.png", "domain_experts.png"):
        image = imread(tmp_path / name)
        assert image.shape[0] >= 250
        assert image.shape[1] >= 400
        assert image.std() > 0.05


def test_lines_fit_the_width_but_for_what_is_to_be_copied(run_dir: Path) -> None:
    counts_LE = torch.randint(1, 100, (16, 64))
    names = ["short", "a/very/long/path/to/the/text/of/a/user", "third"]
    report = make_report(
        run_dir,
        evaluations={name: evaluation(2.0, counts_LE.roll(i, 1), num_tokens=10**9) for i, name in enumerate(names)},
        moe_layers=tuple(range(16)),
        sample_text="word " * 80,
    )
    long = [line for line in printed(report).splitlines() if len(line) > 80]
    assert len(long) <= 5
    assert all(line.startswith("As pictures") or "sample" in line or "eval" in line or "torch" in line for line in long)


def test_run_without_experts_says_nothing_about_them(run_dir: Path) -> None:
    text = printed(make_report(run_dir, evaluations={"code": evaluation(2.0, None)}, moe_layers=()))
    assert "code      1,234    7.500     5.500   2.000         7.39       1.000" in text
    assert "lower than before training in 1 of 1 domain." in text
    assert "expert" not in text
    assert "ep-size" not in text
    assert "--name first-2 --trainer.steps 100" in text
    assert not list(run_dir.iterdir())


def test_missing_figures_are_left_out(run_dir: Path) -> None:
    rows = make_rows()[3:]  # no evaluation at step 0: that of step 20 is not "before"
    text = printed(make_report(run_dir, rows=rows, unigram={}))
    assert "domain   tokens   before   after   perplexity   bits/byte" in text
    assert "code      1,234        -   2.000         7.39       1.000" in text
    assert "before training" not in text
    assert "unigram" not in text
    assert "tokens/s" not in printed(make_report(run_dir, rows=[]))


def test_loss_before_that_was_not_finite_is_left_out(run_dir: Path) -> None:
    rows = make_rows()
    rows[0]["eval/code/loss"] = None
    text = printed(make_report(run_dir, rows=rows))
    assert "code      1,234        -     5.500   2.000" in text
    assert "lower than before training in 1 of 1 domain." in text


def test_loss_that_is_not_finite_is_shown_and_counts_as_worse(run_dir: Path) -> None:
    nan = evaluation(float("nan"), CODE_LE)
    text = printed(make_report(run_dir, evaluations={"code": nan, "prose": evaluation(3.0, PROSE_LE)}))
    assert "code      1,234    7.500     5.500     nan          nan         nan" in text
    assert "lower than before training in 1 of 2 domains." in text


def test_domain_without_held_out_text_is_listed_without_figures(run_dir: Path) -> None:
    empty = evaluation(float("nan"), None, num_tokens=0)
    text = printed(make_report(run_dir, evaluations={"code": evaluation(2.0, CODE_LE), "empty": empty}))
    assert "empty         0        -         -       -            -           -" in text
    assert "lower than before training in 1 of 1 domain." in text
    assert "There is text of one domain only: nothing to compare it with." in text
    assert (run_dir / "domain_experts.png").exists()


def test_domain_that_prefers_nothing_says_so(run_dir: Path) -> None:
    evaluations = {"code": evaluation(2.0, CODE_LE), "prose": evaluation(3.0, CODE_LE)}
    text = printed(make_report(run_dir, evaluations=evaluations))
    assert "code   none more than the other domains" in text
    assert "layer 1: 0.000   layer 3: 0.000" in text


@pytest.mark.parametrize(
    ("counts_LE", "verdict"),
    [
        ([[5, 5, 5, 5]], "Healthy: no expert is idle; the busiest takes 1.0x the mean (layer 1 expert 0)."),
        ([[4, 6, 4, 6], [3, 3, 3, 11]], "A little uneven: no expert is idle; the busiest takes 2.2x the mean (layer 3"),
        ([[1, 17, 1, 1]], "A little uneven: no expert is idle; the busiest takes 3.4x the mean (layer 1 expert 1)."),
        ([[1] * 7 + [13]], "Uneven: no expert is idle; the busiest takes 5.2x the mean (layer 1 expert 7). If it"),
        ([[5, 5, 5, 5], [5, 0, 5, 5]], "Uneven: 1 of 8 experts is idle (layer 3 expert 1); the busiest takes 1.3x"),
        (
            [[0, 0, 9, 0], [9, 0, 0, 0]],
            "Uneven: 6 of 8 experts are idle (layer 1 expert 0; layer 1 expert 1; layer 1 expert 3; ...); the busiest",
        ),
    ],
)
def test_verdict_on_the_load(run_dir: Path, counts_LE: list[list[int]], verdict: str) -> None:
    counts = torch.tensor(counts_LE)
    report = make_report(run_dir, evaluations={"code": evaluation(2.0, counts)}, moe_layers=(1, 3)[: len(counts)])
    text = " ".join(printed(report).split())
    assert verdict in text
    assert ("raise --balance.coefficient" in text) == verdict.startswith("Uneven")


def test_text_of_the_model_cannot_style_or_steer_the_terminal(run_dir: Path) -> None:
    text = printed(
        make_report(run_dir, sample_text="[bold]x[/bold] \x1b[31m :smile: \x07\x00 \ud800", unigram={"[b]": 1.0})
    )
    replacement = "\N{REPLACEMENT CHARACTER}"
    assert f"The [bold]x[/bold] {replacement}[31m :smile: {replacement}{replacement} {replacement}" in text


def test_report_goes_into_a_log_of_plain_ascii(run_dir: Path) -> None:
    raw = io.BytesIO()
    log = io.TextIOWrapper(raw, encoding="ascii")
    evaluations = {"t\N{LATIN SMALL LETTER E WITH ACUTE}xt": evaluation(2.0, CODE_LE)}
    report = make_report(run_dir, evaluations=evaluations, sample_text="caf\N{LATIN SMALL LETTER E WITH ACUTE}")
    print_report(report, Console(file=log, width=80, highlight=False))
    log.flush()
    text = raw.getvalue().decode("ascii")
    assert "t?xt      1,234" in text
    assert "| The caf?" in text


def test_odd_number_of_experts_is_not_split_over_two_ranks(run_dir: Path, programs_on_path: Path) -> None:
    report = make_report(run_dir, evaluations={"code": evaluation(2.0, CODE_LE[:, :3])})
    assert printed(report).endswith(
        "torchrun --nproc-per-node 2 recipes/quickstart.py --name first-2 --trainer.steps 100"
    )


def test_commands_carry_the_folder_of_an_environment_that_is_not_activated(
    run_dir: Path, programs_on_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    lines = next_commands(run_dir, script="recipes/quickstart.py").splitlines()
    assert [line.split()[0] for line in lines] == [".venv/bin/moe", ".venv/bin/moe", ".venv/bin/torchrun"]
    other = programs_on_path.parent / "other"
    shutil.copytree(programs_on_path, other)
    monkeypatch.setenv("PATH", str(other))  # programs of the same name, of another environment
    assert next_commands(run_dir).splitlines()[0].startswith(".venv/bin/moe sample")
    (programs_on_path / "moe").unlink()  # not installed, run from the source folder
    (programs_on_path / "torchrun").unlink()
    lines = next_commands(run_dir).splitlines()
    assert lines[1] == ".venv/bin/python -m moe eval runs/first"
    assert lines[2].startswith(".venv/bin/python -m torch.distributed.run --nproc-per-node 2")


@pytest.mark.parametrize(
    ("script", "source"),
    [
        ("recipes/quickstart.py", "recipes/quickstart.py --name first-ep2"),
        ("HERE/recipes/my own.py", "'recipes/my own.py' --name first-ep2"),
        ("-m moe train runs/first/recipe.json", "-m moe train runs/first/recipe.json --name first-ep2"),
        ("HERE/.venv/bin/moe", "-m moe train runs/first/recipe.json --name first-ep2"),
        ("HERE/moe/__main__.py", "-m moe train runs/first/recipe.json --name first-ep2"),
        ("", "-m moe train runs/first/recipe.json --name first-ep2"),
    ],
)
def test_training_starts_from_the_script_or_from_the_recipe_file(
    run_dir: Path, programs_on_path: Path, script: str, source: str
) -> None:
    script = script.replace("HERE", str(Path.cwd()))
    command = next_commands(run_dir, script=script).splitlines()[2]
    assert command == f"torchrun --nproc-per-node 2 {source} --parallel.ep-size 2 --trainer.steps 100"


def test_commands_survive_a_shell(tmp_path: Path, programs_on_path: Path) -> None:
    run_dir = Path("other runs/it's")
    sample, evaluate, train = map(shlex.split, next_commands(run_dir, script="recipes/debug.py").splitlines())
    assert sample == ["moe", "sample", "other runs/it's", "--prompt", "def "]
    assert evaluate == ["moe", "eval", "other runs/it's"]
    assert train[3:8] == ["recipes/debug.py", "--name", "it's-ep2", "--runs-dir", "other runs"]


def test_layers_without_a_name_are_a_mistake(run_dir: Path) -> None:
    with pytest.raises(AssertionError, match="one layer index per routing"):
        print_report(replace(make_report(run_dir), moe_layers=(1,)), Console(file=io.StringIO()))
