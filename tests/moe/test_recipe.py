"""Recipes: JSON and command line there and back; wrong values refused with the remedy before anything starts."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from moe.checkpoint import list_checkpoints
from moe.recipe import main, read_recipe
from moe.routers.capacity import CapacityConfig
from moe.routers.sinkhorn import SinkhornConfig
from moe.routers.topk import TopKConfig
from moe.routers.zero_experts import ZeroExpertsConfig
from moe.run import RecipeError
from runs import curve, rows_of, small_recipe, train

ROOT = Path(__file__).resolve().parents[2]


def test_json_round_trip_keeps_every_field(tmp_path):
    recipe = small_recipe(
        tmp_path,
        model={"router": TopKConfig(norm_topk_prob=True, use_selection_bias=True), "mlp_only_layers": (1,)},
        data={"weights": {"cpp": 2.0}},
    )
    recipe = replace(recipe, model=replace(recipe.model, intermediate_size=64))
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe.to_json()))
    assert read_recipe(file) == recipe


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.update(modle={}), "modle"),
        (lambda r: r["model"].update(num_expert=3), "model.num_expert"),
        (lambda r: r["model"].update(num_experts="many"), "model.num_experts.*'many'"),
        (lambda r: r["model"]["router"].update(kind="best"), "router kind 'best' is unknown; known are"),
        (lambda r: r["balance"].update(scope="world"), "balance.scope"),
        (lambda r: r.pop("batch"), "batch"),
    ],
)
def test_wrong_json_is_refused_by_field(tmp_path, edit, message):
    values = small_recipe(tmp_path).to_json()
    edit(values)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(values))
    with pytest.raises(RecipeError, match=message):
        read_recipe(file)


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text):
    file = tmp_path / "recipe.json"
    file.write_text(text)
    with pytest.raises(RecipeError, match="recipe.json"):
        read_recipe(file)
    with pytest.raises(RecipeError, match="no recipe at"):
        read_recipe(tmp_path / "missing.json")


WRONG = {
    "more experts per token than experts": ({"model": {"num_experts_per_tok": 9}}, 1, "num_experts_per_tok = 9.*8"),
    "expert parallel size and ranks": ({"parallel": {"ep_size": 3}}, 4, r"ep_size = 3 .* 4 ranks .*\[1, 2, 4\]"),
    "expert parallel size and experts": (
        {"parallel": {"ep_size": 2}, "model": {"num_experts": 5}},
        2,
        r"ep_size = 2 does not divide the 5 experts .* use one of \[1, 5\]",
    ),
    "a batch that does not divide": (
        {"batch": {"global_sequences": 10, "micro_sequences": 4}},
        2,
        "global_sequences = 10 .* nearest that fit: 8 or 16",
    ),
    "a batch smaller than one round": (
        {"batch": {"global_sequences": 2, "micro_sequences": 4}},
        2,
        "nearest that fit: 8$",
    ),
    "sequences longer than the model": ({"batch": {"sequence_length": 512}}, 1, "max_position_embeddings = 256"),
    "missing data": ({"data": {"sources": {"mine": "no/such/folder"}}}, 1, "mine.*no/such/folder"),
    "vocabulary": ({"model": {"vocab_size": 400}}, 1, "512 tokens but model.vocab_size = 400; .* at least 512"),
    "unknown backend": ({}, 1, "backend.*'fastest'.*naive"),
    "a name that is a path": ({}, 1, "name = '../x'"),
    "a name that is the parent": ({}, 1, r"name = '\.\.'"),
    "a name too long": ({}, 1, "up to 100 letters"),
    "a seed too large": ({}, 1, "seed = 9+ must lie in 0"),
    "a learning rate that is no number": ({"optimizer": {"learning_rate": float("nan")}}, 1, "learning_rate = nan"),
    "an infinite clipping norm": ({"optimizer": {"max_grad_norm": float("inf")}}, 1, "max_grad_norm = inf"),
    "no steps": ({"trainer": {"steps": 0}}, 1, "trainer.steps = 0"),
    "warm-up beyond the end": ({"schedule": {"warmup_steps": 100}}, 1, "warmup_steps = 100 must lie in 0..*6"),
    "negative learning rate": ({"optimizer": {"learning_rate": -1.0}}, 1, "learning_rate = -1.0"),
    "bf16 without masters": ({"parallel": {"dtype": "bf16", "zero_stage": 0}}, 1, "zero_stage = 1 or 2"),
    "negative balance": ({"balance": {"coefficient": -0.1}}, 1, "balance.coefficient = -0.1"),
    "normalised top-1": ({"model": {"num_experts_per_tok": 1}}, 1, "no gradient"),
    "balance of a router that balances itself": (
        {"model": {"router": SinkhornConfig(allow_noncausal=True)}},
        1,
        "balance.coefficient = .* 'sinkhorn' makes loads even",
    ),
    "capacity of zero-computation experts": (
        {"model": {"router": ZeroExpertsConfig(), "capacity": CapacityConfig(factor=1.0)}},
        1,
        "does not go with router kind 'zero_experts'",
    ),
    "a router that sees the future": ({"model": {"router": SinkhornConfig()}}, 1, "is not causal"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_refused_with_the_limit_and_the_remedy(tmp_path, case):
    changes, world_size, message = WRONG[case]
    recipe = small_recipe(tmp_path, **changes)
    if case == "unknown backend":
        recipe = replace(recipe, backend="fastest")
    names = {"a name that is a path": "../x", "a name that is the parent": "..", "a name too long": "n" * 300}
    recipe = replace(recipe, name=names.get(case, recipe.name))
    if case == "a seed too large":
        recipe = replace(recipe, seed=10**20 - 1)
    with pytest.raises(RecipeError, match=message):
        recipe.validate(world_size=world_size)
    assert not (tmp_path / "runs").exists()


def test_a_right_recipe_passes_and_touches_nothing(tmp_path):
    small_recipe(tmp_path).validate(world_size=2)
    assert list(tmp_path.iterdir()) == []


def run_script(*args: str, **env: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, *args],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )


def test_the_script_refuses_before_deepspeed_is_imported(tmp_path):
    code = (
        "import sys, runpy; sys.argv = ['recipes/debug.py', '--parallel.ep-size', '3']\n"
        "try: runpy.run_path('recipes/debug.py', run_name='__main__')\n"
        "finally: print('deepspeed' in sys.modules, 'transformers' in sys.modules, 'wandb' in sys.modules)"
    )
    started = time.monotonic()
    result = run_script("-c", code)
    assert result.returncode == 2
    assert "error: parallel.ep_size = 3 does not divide the 1 ranks of this run; use one of [1]" in result.stderr
    assert result.stdout.strip() == "False False False"
    assert time.monotonic() - started < 60


def test_help_lists_typed_overrides():
    result = run_script("recipes/debug.py", "--help", COLUMNS="200")
    assert result.returncode == 0
    for flag in ("--parallel.ep-size", "--batch.micro-sequences", "--model.router.norm-topk-prob", "--resume"):
        assert flag in result.stdout


def test_unknown_flags_suggest_the_right_one(capsys):
    with pytest.raises(SystemExit) as stop:
        main(small_recipe(Path("unused")), args=["--parallel.epsize", "2"])
    assert stop.value.code != 0
    assert "--parallel.ep-size" in capsys.readouterr().err


def test_dry_run_prints_the_plan_and_starts_nothing(tmp_path, capsys):
    main(small_recipe(tmp_path), args=["--dry-run", "--world-size", "4", "--parallel.ep-size", "2"])
    text = capsys.readouterr().out
    assert "4, expert parallel 2, ZeRO 1" in text
    assert "3,072 in 6 steps" in text
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_a_run_needs_resume_and_the_same_recipe(pool, run_root):
    recipe = small_recipe(run_root, trainer={"save_every": 3})
    pool.run(train, recipe, world_size=1)
    rows = rows_of(recipe)

    # finished: says so and does nothing, with and without resume
    pool.run(train, recipe, world_size=1)
    pool.run(train, recipe, True, world_size=1)
    assert rows_of(recipe) == rows

    list_checkpoints(recipe.folder.checkpoints_dir)[-1].rename(run_root / "last")
    with pytest.raises(AssertionError, match="add --resume to continue it, choose another --name"):
        pool.run(train, recipe, world_size=1)
    other = replace(recipe, seed=5)
    with pytest.raises(AssertionError, match=r"another recipe: seed = 5 \(the run has 0\)"):
        pool.run(train, other, True, world_size=1)
    other = replace(recipe, model=replace(recipe.model, num_experts_per_tok=3))
    with pytest.raises(AssertionError, match="model.num_experts_per_tok = 3"):
        pool.run(train, other, True, world_size=2)
    assert rows_of(recipe) == rows

    pool.run(train, recipe, True, world_size=1)
    assert [row["step"] for row in curve(recipe)] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_checkpoint_is_refused_by_name_and_the_newest_good_one_is_used(pool, run_root):
    recipe = small_recipe(run_root, trainer={"save_every": 2})
    pool.run(train, recipe, world_size=1)
    expected = curve(recipe)
    for checkpoint in list_checkpoints(recipe.folder.checkpoints_dir)[-2:]:
        file = next(checkpoint.glob("*.safetensors"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content))
    pool.run(train, recipe, True, world_size=1)
    assert curve(recipe) == expected
    assert [row["step"] for row in rows_of(recipe) if row.get("resume")] == [2]


def test_a_second_process_on_a_running_folder_is_refused(pool, run_root):
    recipe = small_recipe(run_root)
    with recipe.folder.lock(), pytest.raises(AssertionError, match=rf"RecipeError.*{os.getpid()}"):
        pool.run(train, recipe, world_size=2)
    assert not recipe.folder.recipe_file.exists()


def damage(checkpoints: list[Path]) -> None:
    for checkpoint in checkpoints:
        file = next(checkpoint.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1])


def test_a_run_whose_checkpoints_are_all_damaged_keeps_its_rows(pool, run_root):
    recipe = small_recipe(run_root, steps=3)
    pool.run(train, recipe, world_size=1)
    rows = rows_of(recipe)
    damage(list_checkpoints(recipe.folder.checkpoints_dir))
    with pytest.raises(AssertionError, match="none of its 1 checkpoints is good, the newest is step_00000003"):
        pool.run(train, recipe, True, world_size=1)
    assert rows_of(recipe) == rows


def test_a_start_that_failed_on_its_data_does_not_block_the_next(pool, run_root):
    text = run_root / "text.jsonl"
    text.write_text("\n".join(json.dumps({"body": f"line {n} of the text " * 40}) for n in range(200)))
    wrong = small_recipe(run_root, steps=2, data={"sources": {"mine": str(text)}})
    with pytest.raises(AssertionError, match="RecipeError.*text"):
        pool.run(train, wrong, world_size=2)
    right = replace(wrong, data=replace(wrong.data, text_field="body"))
    pool.run(train, right, world_size=2)
    assert [row["step"] for row in curve(right)] == [1, 2]


def test_a_domain_shorter_than_a_sequence_is_refused_before_the_run_folder_is_made(pool, run_root):
    recipe = small_recipe(run_root, batch={"sequence_length": 100_000}, model={"max_position_embeddings": 100_000})
    with pytest.raises(AssertionError, match="RecipeError.*fewer than the 100001 of one sequence"):
        pool.run(train, recipe, world_size=1)
    assert not recipe.folder.path.exists()


def test_a_tokenizer_larger_than_the_model_is_refused_before_any_text_is_read(tmp_path, prepared_data):
    tokenizer = next(prepared_data.glob("prepared-*/tokenizer"))
    recipe = small_recipe(tmp_path, data={"tokenizer": str(tokenizer)}, model={"vocab_size": 300})
    with pytest.raises(RecipeError, match=r"the tokenizer has 5\d\d tokens but model.vocab_size = 300"):
        recipe.validate(world_size=1)


def test_ranks_of_a_dry_run_must_make_sense(tmp_path, capsys):
    for args in (["--dry-run", "--world-size", "-1"], ["--world-size", "4"]):
        with pytest.raises(SystemExit) as stop:
            main(small_recipe(tmp_path), args=args)
        assert stop.value.code == 2
        assert "--world-size" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path, prepared_data, capsys):
    file = tmp_path / "file"
    file.write_text("")
    recipe = small_recipe(tmp_path, data={"cache_dir": str(prepared_data)})
    with pytest.raises(SystemExit) as stop:
        main(replace(recipe, runs_dir=str(file)), args=[])
    assert stop.value.code == 2
    assert "cannot be written" in capsys.readouterr().err


def test_other_data_under_resume_is_refused_before_anything_is_written(pool, run_root):
    text = run_root / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"line {n} of the text " * 40}) for n in range(200)))
    recipe = small_recipe(run_root, steps=3, data={"sources": {"mine": str(text)}}, trainer={"save_every": 2})
    pool.run(train, recipe, world_size=1)
    list_checkpoints(recipe.folder.checkpoints_dir)[-1].rename(run_root / "last")
    kept = recipe.folder.metrics_file.read_bytes()
    text.write_text("\n".join(json.dumps({"text": f"another text, line {n} " * 40}) for n in range(200)))
    with pytest.raises(AssertionError, match="was trained on other data"):
        pool.run(train, recipe, True, world_size=1)
    assert recipe.folder.metrics_file.read_bytes() == kept
