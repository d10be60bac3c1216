"""The study of routers on a GPU: its loop is AdamW on float32 masters, its contenders are alike, its curves survive."""

import dataclasses
import importlib
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe.counts import count_parameters
from moe.data.store import open_prepared

PAPERS = Path(__file__).parents[2] / "benchmarks/papers"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(PAPERS)
    return importlib.import_module("routers_on_gpu")


def options(study, root: Path, **values):
    given = {"tiny": True, "steps": 4, "log_every": 1, "eval_every": 2, "eval_sequences": 2} | values
    return study.Options(data=str(root / "data"), out=str(root / "out"), **given)


def test_contenders_have_as_many_active_parameters(study) -> None:
    counts = {name: count_parameters(contender.model) for name, contender in study.CONTENDERS.items()}
    assert all(count.active >= 100e6 for count in counts.values())
    for field in ("total", "active"):
        values = [getattr(count, field) for count in counts.values()]
        assert max(values) / min(values) < 1.005, field


def test_masters_step_as_adamw_on_the_sum_of_micro_batches(study) -> None:
    loop = importlib.import_module("gpu_loop")
    torch.manual_seed(0)
    ours, plain = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    plain.load_state_dict(ours.state_dict())
    settings = study.OptimizerConfig(weight_decay=0.1, max_grad_norm=0.5)
    masters = loop.Masters(ours, settings)
    groups = [{"params": [plain.weight], "weight_decay": 0.1}, {"params": [plain.bias], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps)
    for rate in (1e-2, 3e-3, 1e-3):
        x_BD = torch.randn(8, 5)
        for half in x_BD.chunk(2):
            ours(half).square().sum().backward()
            masters.add_gradients()
        norm = masters.step(learning_rate=rate)
        plain(x_BD).square().sum().backward()
        assert norm.item() == pytest.approx(torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5).item(), rel=1e-5)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        adamw.zero_grad()
    torch.testing.assert_close(ours.weight, plain.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.bias, plain.bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["top-k", "dynamic_confidence", "chain_of_experts", "cross_layer", "zero_experts"])
def test_every_contender_trains_in_bfloat16_as_in_float32(study, name: str, run_root: Path) -> None:
    loop = importlib.import_module("gpu_loop")
    data = open_prepared(loop.only_folder(run_root / "data"), weights={})
    setup = study.setup_of(name, options(study, run_root, steps=2))
    curves = {}
    for dtype in (torch.float32, torch.bfloat16):
        points = []
        loop.Loop(setup, data, device=torch.device("cpu"), dtype=dtype).run(points.append)
        curves[dtype] = points
    for exact, rounded in zip(*curves.values(), strict=True):
        assert rounded.tokens == exact.tokens == exact.step * 128
        assert (exact.held_out is not None) == (exact.step in (0, 2))
        if exact.step:
            assert rounded.loss == pytest.approx(exact.loss, rel=5e-3)
    last = curves[torch.float32][-1]
    # after two steps a controller still swings
    assert last.experts_per_token == pytest.approx(8, abs=1.5)
    assert last.held_out is not None
    assert sum(last.held_out.values()) < sum(curves[torch.float32][0].held_out.values())


def test_curves_are_compared_at_the_last_step_that_all_evaluated(study, run_root: Path) -> None:
    names = ("top-k", "zero_experts")
    study.train("top-k", options(study, run_root))
    assert study.train_all(options(study, run_root, contenders=("zero_experts",))) == 0
    reader = importlib.import_module("study").read
    points = [point for name in names for point in reader(run_root / f"out/{name}.csv", study.Point)]
    assert [point.step for point in points] == [0, 1, 2, 3, 4] * 2
    assert math.isnan(points[1].held_out) and points[2].held_out > 0
    # the second was killed after step 3
    cut = [point for point in points if point.contender == "top-k" or point.step < 4]
    assert study.table_of(cut).title == "step 2"
    importlib.import_module("gpu_pictures").draw(run_root / "picture.svg", cut)
    assert (run_root / "picture.svg").stat().st_size > 10_000
    with pytest.raises(ValueError, match="holds a run already"):
        study.train("top-k", options(study, run_root))


def test_a_run_out_of_time_ends_with_an_evaluation(study, run_root: Path) -> None:
    study.train("top-k", options(study, run_root, minutes=0.0, log_every=100, eval_every=100))
    points = importlib.import_module("study").read(run_root / "out/top-k.csv", study.Point)
    assert [point.step for point in points] == [0, 1]
    assert points[-1].held_out > 0


def test_training_imports_neither_deepspeed_nor_pyarrow_nor_matplotlib() -> None:
    unwanted = {"deepspeed", "pyarrow", "matplotlib", "transformers"}
    code = f"import sys, routers_on_gpu; assert not {unwanted} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], cwd=PAPERS, check=True, capture_output=True)


def test_a_folder_without_text_says_what_to_do(study, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--prepare"):
        study.train("top-k", dataclasses.replace(options(study, tmp_path), data=str(tmp_path)))
