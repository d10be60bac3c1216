"""`moe ...`: what one does with a run once there is one.

    moe train runs/NAME/recipe.json    launch again what a run wrote down, with the same overrides as its script
    moe eval RUN                       loss per domain and expert load of the newest checkpoint
    moe sample RUN --prompt "def "     text from it
    moe doctor                         what this machine can run, and what is missing with its install line

A RUN is the folder of a run, or of one of its checkpoints.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from moe.checkpoint import (
    CheckpointError,
    CheckpointReader,
    list_checkpoints,
    load_weights,
    newest_checkpoint,
)
from moe.data.prepare import prepare
from moe.data.unigram import unigram_losses
from moe.model import Model
from moe.parallel.groups import ParallelGroups
from moe.recipe import Recipe, read_recipe
from moe.recipe import main as run_recipe
from moe.report import ReportInput, print_evaluation
from moe.routing import RouterContext
from moe.run import RecipeError, read_rows
from moe.sample import complete
from moe.train.evaluate import evaluate

Run = Annotated[Path, tyro.conf.Positional]


def train(args: list[str]) -> None:
    """Launch the recipe.json in the first argument; the others are overrides, as for its script."""
    if args[:1] in (["-h"], ["--help"]):
        print("usage: moe train RECIPE_JSON [overrides]\n\nmoe train RECIPE_JSON --help lists the overrides.")
        return
    if not args or args[0].startswith("-"):
        raise RecipeError("moe train needs the path of a recipe.json, such as runs/quickstart/recipe.json")
    run_recipe(read_recipe(Path(args[0])), args=args[1:])


def eval_run(run: Run, /, *, sequences: int = 64) -> None:
    """Print loss, perplexity and bits per byte of each domain.

    Args:
        run: folder of a run or of a checkpoint.
        sequences: of each domain, from its held-out text.
    """
    if sequences < 1:
        raise RecipeError(f"--sequences {sequences} must be at least 1")
    recipe, reader = open_run(run)
    try:
        data = prepare(recipe.data)
    except (ValueError, OSError) as error:
        raise RecipeError(str(error)) from error
    if data.fingerprint != reader.state["data_fingerprint"]:
        raise RecipeError(
            f"{reader.path} was trained on other data (fingerprint {reader.state['data_fingerprint']}, now "
            f"{data.fingerprint}): its tokens would mean something else; bring the text of {recipe.folder.path} back"
        )
    model = load_model(recipe, reader)
    evaluations = evaluate(
        model,
        data,
        groups=ParallelGroups.single(model.embed_tokens.weight.device),
        sequence_length=recipe.batch.sequence_length,
        batch_sequences=recipe.batch.micro_sequences,
        max_sequences=sequences,
        context=context_of(recipe, reader),
    )
    run_dir = reader.path.parent.parent
    print(f"{reader.path}")
    report = ReportInput(
        run_dir=run_dir,
        script="",
        rows=[row for row in read_rows(run_dir / "metrics.jsonl") if row["step"] <= reader.step],
        unigram=unigram_losses(data),
        evaluations=evaluations,
        sample_prompt="",
        sample_text="",
        moe_layers=recipe.model.routing_names,
    )
    print_evaluation(report, Console(highlight=False))


def sample(
    run: Run,
    /,
    *,
    prompt: str = "",
    tokens: int = 120,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Print text that continues a prompt.

    Args:
        run: folder of a run or of a checkpoint.
        prompt: text to continue; empty begins a new document.
        tokens: how many to add at most.
        temperature: 0 takes the likeliest token.
        top_k: draw among the k likeliest only; 0 means all.
        top_p: draw among the likeliest that together have this probability.
        seed: the same seed gives the same text.
    """
    recipe, reader = open_run(run)
    model = load_model(recipe, reader)
    try:
        text = complete(
            model,
            reader.path.parent.parent / "tokenizer",
            prompt,
            max_new_tokens=tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            context=context_of(recipe, reader),
        )
    except ValueError as error:
        raise RecipeError(str(error)) from error
    print(prompt + text)


def doctor() -> None:
    """Print what this machine can run, and what is missing with its install line."""
    from moe.doctor import run_doctor

    sys.exit(run_doctor())


def open_run(path: Path) -> tuple[Recipe, CheckpointReader]:
    """Return recipe and checkpoint of a run folder (its newest complete checkpoint) or of a checkpoint folder.

    Raises RecipeError if there is none.
    """
    if (path / "manifest.json").exists():
        checkpoint, recipe_file = path, path.parent.parent / "recipe.json"
    elif (path / "recipe.json").exists():
        newest = newest_checkpoint(path / "checkpoints", report=lambda text: print(text, file=sys.stderr))
        if newest is None:
            found = len(list_checkpoints(path / "checkpoints"))
            raise RecipeError(f"{path} has no good checkpoint ({found} found); train it first, or further")
        checkpoint, recipe_file = newest, path / "recipe.json"
    else:
        raise RecipeError(f"{path} is neither a run folder (no recipe.json) nor a checkpoint (no manifest.json)")
    return read_recipe(recipe_file), CheckpointReader.open(checkpoint)


def context_of(recipe: Recipe, reader: CheckpointReader) -> RouterContext:
    """Return what routers may know at the step of a checkpoint: a pool of experts may still have been growing."""
    return RouterContext(seed=recipe.seed, step=reader.step, progress=reader.step / recipe.trainer.steps)


def load_model(recipe: Recipe, reader: CheckpointReader) -> Model:
    """Return the model of a checkpoint on this process alone, ready to evaluate."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    groups = ParallelGroups.single(device)
    with torch.device(groups.device):
        model = Model(recipe.model, groups=groups, backend=recipe.backend)
    load_weights(model, reader)
    return model.eval()


def main(args: list[str] | None = None) -> None:
    """The entry point of `moe`. Ends the process with 2 for anything the user can put right."""
    args = sys.argv[1:] if args is None else args
    commands: dict[str, Callable[..., None]] = {"eval": eval_run, "sample": sample, "doctor": doctor}
    try:
        # a recipe's own fields are the flags of `train`, and they are known only once the file is read
        if args[:1] == ["train"]:
            train(args[1:])
        else:
            tyro.extras.subcommand_cli_from_dict(
                {"train": train, **commands}, prog="moe", description=__doc__, args=args
            )
    except (RecipeError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
