"""`moe ...`: what one does with a run once there is one.

    moe train runs/NAME/recipe.json    launch again what a run wrote down, with the same overrides as its script
    moe eval RUN                       loss per domain and expert load of the newest checkpoint
    moe eval RUN --lm-eval TASK.yaml   lm-evaluation-harness on it, with task files of one's own
    moe sample RUN --prompt "def "     text from it
    moe import-hf DIR OUT              a folder of transformers as a model folder of ours
    moe upcycle DIR OUT --num-experts 8   a dense model as an MoE, a model folder
    moe add-expert MODEL DENSE OUT     one more expert for a model whose router was fitted to texts
    moe export-hf RUN OUT --verify     a checkpoint of ours as a folder that plain transformers loads
    moe doctor                         what this machine can run, and what is missing with its install line

A RUN is the folder of a run, or of one of its checkpoints; sample, export-hf and --lm-eval take model folders too.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from moe.checkpoint import (
    CheckpointError,
    CheckpointReader,
    list_checkpoints,
    load_weights,
    newest_checkpoint,
    open_model_folder,
    write_text_atomic,
)
from moe.config import ModelConfig
from moe.convert import ConversionError
from moe.counts import count_parameters
from moe.data.prepare import prepare
from moe.data.unigram import unigram_losses
from moe.model import Model
from moe.parallel.groups import ParallelGroups
from moe.recipe import Recipe, read_recipe
from moe.recipe import main as run_recipe
from moe.report import ReportInput, print_evaluation
from moe.routing import RouterContext
from moe.run import RecipeError, read_rows
from moe.sample import complete, generate
from moe.train.evaluate import evaluate
from moe.upcycle import AddExpertConfig, UpcycleConfig

Run = Annotated[Path, tyro.conf.Positional]
Folder = Annotated[Path, tyro.conf.Positional]


def train(args: list[str]) -> None:
    """Launch the recipe.json in the first argument; the others are overrides, as for its script."""
    if args[:1] in (["-h"], ["--help"]):
        print("usage: moe train RECIPE_JSON [overrides]\n\nmoe train RECIPE_JSON --help lists the overrides.")
        return
    if not args or args[0].startswith("-"):
        raise RecipeError("moe train needs the path of a recipe.json, such as runs/quickstart/recipe.json")
    run_recipe(read_recipe(Path(args[0])), args=args[1:])


def eval_run(run: Run, /, *, sequences: int = 64, lm_eval: tuple[Path, ...] = ()) -> None:
    """Print loss, perplexity and bits per byte of each domain, or what lm-evaluation-harness finds.

    Args:
        run: folder of a run or of a checkpoint; with --lm-eval, of a model too.
        sequences: of each domain, from its held-out text.
        lm_eval: YAML files of tasks of lm-evaluation-harness, to run in place of the domains.
    """
    if sequences < 1:
        raise RecipeError(f"--sequences {sequences} must be at least 1")
    opened = open_model(run)
    if lm_eval:
        run_lm_eval(opened, lm_eval)
        return
    recipe, reader = opened.recipe, opened.reader
    if recipe is None:
        raise RecipeError(f"{run} has no recipe, so no data to evaluate on; train from it first (init_from)")
    try:
        data = prepare(recipe.data)
    except (ValueError, OSError) as error:
        raise RecipeError(str(error)) from error
    if data.fingerprint != reader.state["data_fingerprint"]:
        raise RecipeError(
            f"{reader.path} was trained on other data (fingerprint {reader.state['data_fingerprint']}, now "
            f"{data.fingerprint}): its tokens would mean something else; bring the text of {recipe.folder.path} back"
        )
    model = opened.load()
    evaluations = evaluate(
        model,
        data,
        groups=ParallelGroups.single(model.embed_tokens.weight.device),
        sequence_length=recipe.batch.sequence_length,
        batch_sequences=recipe.batch.micro_sequences,
        max_sequences=sequences,
        context=opened.context,
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


def run_lm_eval(opened: "OpenedModel", tasks: tuple[Path, ...]) -> None:
    """Print the table of lm-evaluation-harness and write its JSON into `lm_eval/` of the run or model folder."""
    from moe.convert.harness import run_harness

    try:
        result = run_harness(opened.load(), opened.tokenizer_dir, tasks)
    except (ValueError, ImportError) as error:
        raise RecipeError(str(error)) from error
    checkpoint = opened.reader.path
    names = "+".join(task.stem for task in tasks)
    file = checkpoint.parent.parent / "lm_eval" / f"{checkpoint.name}_{names}.json"
    file.parent.mkdir(exist_ok=True)
    write_text_atomic(file, result.json)
    print(f"{checkpoint}\n{result.table}\n{file}")


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
    opened = open_model(run)
    model = opened.load()
    try:
        text = complete(
            model,
            opened.tokenizer_dir,
            prompt,
            max_new_tokens=tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            context=opened.context,
        )
    except ValueError as error:
        raise RecipeError(str(error)) from error
    print(prompt + text)


def import_hf(source: Folder, out: Folder, /, *, verify: bool = False) -> None:
    """Write a folder of transformers as a model folder: `moe sample`, export, upcycling and recipes start from it.

    Args:
        source: folder with config.json and safetensors.
        out: folder to make; must not exist.
        verify: load both, transformers in a fresh process, and compare logits and 32 greedy tokens.
    """
    from moe.convert.hf import import_hf as convert

    config = convert(source, out)
    count = count_parameters(config)
    print(f"{out}: {count.total:,} parameters, {count.active:,} of them active per token")
    if verify:
        _verify(source, open_model(out))


def upcycle(source: Folder, out: Folder, /, *, config: Annotated[UpcycleConfig, tyro.conf.arg(name="")]) -> None:
    """Make an MoE of a dense model: the plan is printed before anything is written.

    Args:
        source: folder of a dense model, of transformers or of ours.
        out: folder to make; must not exist.
    """
    from moe.upcycle.run import plan
    from moe.upcycle.run import upcycle as write

    made = plan(source, config)
    print(made)
    routers = write(made, out)
    if routers:
        condition = max(router.condition for router in routers.values())
        residual = max(router.residual for router in routers.values())
        print(f"routers are fitted: condition numbers up to {condition:.1e}, residuals up to {residual:.1e}")
    print(
        f"{out} is written; a recipe trains on from it with init_from, `moe export-hf {out} DIR` writes it for others"
    )


def add_expert(
    model: Folder, branch: Folder, out: Folder, /, *, config: Annotated[AddExpertConfig, tyro.conf.arg(name="")]
) -> None:
    """Give a model whose router was fitted (upcycle --method ridge) one more expert, without the text of the others.

    Args:
        model: model folder.
        branch: folder of the dense model whose feed-forwards become the expert, of transformers or of ours.
        out: folder to make; must not exist.
    """
    from moe.upcycle.add_expert import add_expert as add

    print(f"{out}: {add(model, branch, out, config).num_experts} experts")


def export_hf(run: Run, out: Folder, /, *, family: str = "auto", verify: bool = False) -> None:
    """Write a checkpoint as a folder that plain transformers loads.

    Args:
        run: folder of a run, of a checkpoint or of a model.
        out: folder to make; must not exist.
        family: architecture of transformers, such as qwen3_moe; auto takes the first that expresses the model exactly,
            or else moe_train, which puts our own code beside the weights: to be loaded with trust_remote_code=True.
        verify: load it in a fresh process and compare logits and 32 greedy tokens.
    """
    from moe.convert.hf import export_hf as convert

    opened = open_model(run)
    exported = convert(opened.config, opened.reader, out, tokenizer_dir=opened.tokenizer_dir, family_name=family)
    print(f"{out}: {exported.architecture}, from step {opened.reader.step}")
    if exported.has_own_code:
        if family == "auto":
            print("no architecture of transformers expresses this model; --family NAME says what one of them lacks")
        print("its code goes with it: from_pretrained needs trust_remote_code=True")
    if verify:
        _verify(out, opened, has_own_code=exported.has_own_code)


def _verify(folder: Path, opened: "OpenedModel", *, has_own_code: bool = False) -> None:
    from moe.convert.verify import verify_export

    result = verify_export(folder, **computed(opened.load()), has_own_code=has_own_code)
    print(f"verified: logits within {result.difference:.1e} of the largest, {result.num_greedy} greedy tokens equal")


@torch.no_grad()
def computed(model: Model) -> dict[str, Any]:
    """Return tokens, logits and greedy tokens of a model in float32: what verify_export holds an export against."""
    model = model.float().eval()
    length = min(64, model.config.max_position_embeddings)
    token_BS = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    logits_BSV, _ = model(token_BS.to(model.embed_tokens.weight.device))
    greedy = generate(model, token_BS[0, :4].tolist(), max_new_tokens=min(32, length - 4), temperature=0.0)
    return {"token_BS": token_BS, "logits_BSV": logits_BSV, "greedy": greedy}


def doctor() -> None:
    """Print what this machine can run, and what is missing with its install line."""
    from moe.doctor import run_doctor

    sys.exit(run_doctor())


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model on disk, whoever made it."""

    config: ModelConfig
    reader: CheckpointReader
    tokenizer_dir: Path
    recipe: Recipe | None = None  # of the run it belongs to
    context: RouterContext | None = None  # None: its training is over

    def load(self) -> Model:
        """Return the model on this process alone, ready to evaluate."""
        groups = ParallelGroups.single("cuda" if torch.cuda.is_available() else "cpu")
        backend = self.recipe.backend if self.recipe is not None else "auto"
        with torch.device(groups.device):
            model = Model(self.config, groups=groups, backend=backend)
        load_weights(model, self.reader)
        return model.eval()


def open_model(path: Path) -> OpenedModel:
    """Return the model of a run, a checkpoint or a model folder. Raises RecipeError if there is none."""
    root = path.parent.parent if (path / "manifest.json").exists() else path
    if (root / "model.json").exists():
        config, reader = open_model_folder(root)
        return OpenedModel(config=config, reader=reader, tokenizer_dir=root / "tokenizer")
    recipe, reader = open_run(path)
    return OpenedModel(
        config=recipe.model,
        reader=reader,
        tokenizer_dir=reader.path.parent.parent / "tokenizer",
        recipe=recipe,
        # a pool of experts may still have been growing
        context=RouterContext(seed=recipe.seed, step=reader.step, progress=reader.step / recipe.trainer.steps),
    )


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


def main(args: list[str] | None = None) -> None:
    """The entry point of `moe`. Ends the process with 2 for anything the user can put right."""
    args = sys.argv[1:] if args is None else args
    commands: dict[str, Callable[..., None]] = {
        "eval": eval_run,
        "sample": sample,
        "import-hf": import_hf,
        "upcycle": upcycle,
        "add-expert": add_expert,
        "export-hf": export_hf,
        "doctor": doctor,
    }
    try:
        # a recipe's own fields are the flags of `train`, and they are known only once the file is read
        if args[:1] == ["train"]:
            train(args[1:])
        else:
            tyro.extras.subcommand_cli_from_dict(
                {"train": train, **commands}, prog="moe", description=__doc__, args=args
            )
    except (RecipeError, CheckpointError, ConversionError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
