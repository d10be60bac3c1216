"""`moe`: every command on a run trained for a few steps, and on what is no run."""

import json
from dataclasses import replace

import pytest

from moe.checkpoint import list_checkpoints
from moe.cli import main
from moe.recipe import Recipe
from moe.routers.topk import TopKConfig
from moe.run import RecipeError
from runs import curve, rows_of, small_recipe, train


@pytest.fixture(scope="module")
def trained(pool, prepared_data, tmp_path_factory) -> Recipe:
    root = tmp_path_factory.mktemp("cli")
    recipe = small_recipe(root, trainer={"save_every": 3}, data={"cache_dir": str(prepared_data)})
    pool.run(train, recipe, world_size=2)
    return recipe


def test_eval_repeats_the_last_evaluation_of_the_run(trained, capsys):
    main(["eval", str(trained.folder.path), "--sequences", "3"])
    text = capsys.readouterr().out
    last = [row for row in rows_of(trained) if "eval/cpp/loss" in row][-1]
    for domain in ("cpp", "maths", "prose", "python"):
        line = next(line for line in text.splitlines() if line.startswith(domain))
        assert f"{last[f'eval/{domain}/loss']:.3f}" in line
        assert f"{last[f'eval/{domain}/bits_per_byte']:.3f}" in line
    assert "expert" in text.lower()


def test_eval_takes_one_checkpoint_of_several(trained, capsys):
    first = list_checkpoints(trained.folder.checkpoints_dir)[0]
    main(["eval", str(first), "--sequences", "2"])
    assert "step_00000003" in capsys.readouterr().out


def test_sample_continues_the_prompt_and_is_a_function_of_the_seed(trained, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        main(["sample", str(trained.folder.path), "--prompt", "def ", "--tokens", "12", "--seed", seed])
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("def ")
    assert len(texts[0]) > len("def \n")
    assert texts[0] == texts[1] != texts[2]


def test_train_launches_what_the_run_wrote_down(trained, pool):
    name = "again"
    pool.run(main, ["train", str(trained.folder.recipe_file), "--name", name], world_size=2)
    again = small_recipe(trained.folder.path.parent.parent, name)
    assert curve(again) == curve(trained)


def test_doctor_says_what_runs_here(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    text = capsys.readouterr().out
    assert stop.value.code == 0, text
    for word in ("torch", "deepspeed", "segments", "naive"):
        assert word in text


def test_a_run_goes_out_and_comes_back_and_trains_on(trained, pool, tmp_path, capsys):
    out, back = tmp_path / "out", tmp_path / "back"
    main(["export-hf", str(trained.folder.path), str(out), "--verify"])
    text = capsys.readouterr().out
    assert "MixtralForCausalLM, from step 6" in text
    assert "verified: logits within" in text and "32 greedy tokens equal" in text
    main(["import-hf", str(out), str(back), "--verify"])
    text = capsys.readouterr().out
    assert "active per token" in text and "32 greedy tokens equal" in text
    prompts = []
    for place in (trained.folder.path, back):
        main(["sample", str(place), "--prompt", "def ", "--tokens", "8"])
        prompts.append(capsys.readouterr().out)
    assert prompts[0] == prompts[1]
    # two ranks with expert parallelism start from it where the run ended
    root = trained.folder.path.parent.parent
    data = {"cache_dir": trained.data.cache_dir, "tokenizer": str(back / "tokenizer")}
    further = small_recipe(root, "further", steps=2, data=data, parallel={"ep_size": 2})
    pool.run(train, replace(further, init_from=str(back)), world_size=2)
    ended = [row for row in rows_of(trained) if "eval/cpp/loss" in row][-1]
    started = next(row for row in rows_of(further) if "eval/cpp/loss" in row)
    assert started["step"] == 0
    for domain in ("cpp", "maths"):
        assert started[f"eval/{domain}/loss"] == pytest.approx(ended[f"eval/{domain}/loss"], rel=1e-5)
    other = replace(further, name="other", model=replace(further.model, num_experts_per_tok=1))
    other = replace(other, init_from=str(back), model=replace(other.model, router=TopKConfig()))
    with pytest.raises(RecipeError, match="num_experts_per_tok = 1, there 2"):
        other.validate(world_size=2)
    with pytest.raises(RecipeError, match="is no model folder, run or checkpoint"):
        replace(further, init_from=str(tmp_path / "none")).validate(world_size=2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["import-hf", "no/such/folder", "out"], "no folder of a transformers model"),
        (["export-hf", "no/such/run", "out"], "neither a run folder"),
        (["eval", "no/such/run"], "neither a run folder"),
        (["sample", "no/such/run"], "neither a run folder"),
        (["train", "no/such/recipe.json"], "no recipe at"),
        (["train"], "needs the path of a recipe.json"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_a_run_without_a_checkpoint_is_refused(tmp_path, capsys):
    recipe = small_recipe(tmp_path)
    recipe.folder.path.mkdir(parents=True)
    recipe.folder.recipe_file.write_text("{}")
    with pytest.raises(SystemExit):
        main(["sample", str(recipe.folder.path)])
    assert "has no good checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["sample", "--temperature", "-1"], "temperature = -1"),
        (["sample", "--top-p", "0"], "top_p = 0"),
        (["sample", "--tokens", "-5"], "max_new_tokens = -5"),
        (["sample", "--seed", "99999999999999999999"], "seed = 99999999999999999999"),
        (["eval", "--sequences", "0"], "--sequences 0"),
    ],
)
def test_values_out_of_range_are_refused_in_one_line(trained, flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main([flags[0], str(trained.folder.path), *flags[1:]])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_is_sampled_without_its_text_and_not_evaluated_on_another(pool, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"line {n} of the text " * 40}) for n in range(200)))
    recipe = small_recipe(tmp_path, steps=2, data={"sources": {"mine": str(text)}})
    pool.run(train, recipe, world_size=1)
    text.write_text("\n".join(json.dumps({"text": f"another text, line {n} " * 40}) for n in range(200)))
    with pytest.raises(SystemExit):
        main(["eval", str(recipe.folder.path)])
    assert "was trained on other data" in capsys.readouterr().err
    text.unlink()
    main(["sample", str(recipe.folder.path), "--tokens", "3"])
    with pytest.raises(SystemExit):
        main(["eval", str(recipe.folder.path)])
    assert "does not exist" in capsys.readouterr().err
