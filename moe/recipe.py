"""Recipe: a whole run as one value; and `launch`, which runs it.

A recipe script builds a Recipe and hands it to `main`, which adds the command line:

    torchrun --nproc-per-node 2 recipes/quickstart.py --parallel.ep-size 2 --trainer.steps 100

Everything a user can get wrong is checked before DeepSpeed is imported and before anything is allocated.
"""

import json
import re
import shutil
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import torch.distributed as dist
import tyro
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from moe.balance.load import BalanceConfig
from moe.checkpoint import CheckpointError, CheckpointReader, RunLockedError, load_weights
from moe.checks import check_finite, check_routing, check_trained, check_vocabulary
from moe.data.batching import BatchConfig
from moe.data.prepare import DataConfig, declared_vocab_size, prepare, validate_data
from moe.data.store import PreparedData
from moe.data.tokens import BatchStream
from moe.data.unigram import unigram_losses
from moe.initial import initialise
from moe.model import Model, ModelConfig
from moe.parallel.agree import on_first_rank
from moe.parallel.dispatch import check_expert_split
from moe.parallel.groups import ParallelConfig, ParallelGroups, launched_rank, launched_world_size, start_process_group
from moe.plan import plan_text
from moe.report import ReportInput, next_commands, print_report
from moe.run import RecipeError, RunFolder, Start, check_same_model, open_weights, read_rows
from moe.sample import complete
from moe.train import prepare_environment
from moe.train.console import RunConsole
from moe.train.evaluate import DomainEvaluation
from moe.train.optimizer import OptimizerConfig
from moe.train.requests import Requests, StopRequestedError, TooManySkippedStepsError
from moe.train.schedule import ScheduleConfig, TrainerConfig
from moe.train.tracker import Tracker, TrackerConfig
from moe_kernels.backends import resolve_backend


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a run depends on. The same recipe and seed give the same run on every layout."""

    __pydantic_config__ = {"extra": "forbid"}

    name: str  # of the run folder, runs_dir/name
    seed: int = 0
    runs_dir: str = "runs"
    init_from: str = ""
    """Folder whose weights the run starts with: a model folder (import, upcycling), a run, or a checkpoint."""
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    trainer: TrainerConfig
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    backend: str = "auto"  # how expert weights are run; `moe doctor` lists what works here

    def validate(self, *, world_size: int, check_data: bool = True) -> None:
        """Raise RecipeError for the first value that cannot work on `world_size` ranks. Takes milliseconds.

        `check_data` also looks at the files that `data` names; a dry run does without them.
        """
        try:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
                raise ValueError(
                    f"name = {self.name!r} must be a folder name of up to 100 letters, digits, '.', '_' and '-'"
                )
            if not 0 <= self.seed < 2**63:
                raise ValueError(f"seed = {self.seed} must lie in 0..2**63 - 1")
            check_finite(self.to_json())
            self.model.validate()
            self.parallel.validate(world_size=world_size)
            for num_experts in self.model.pool_sizes:
                check_expert_split(num_experts, self.parallel.ep_size)
            self.batch.validate(world_size=world_size, max_position_embeddings=self.model.max_position_embeddings)
            self.balance.validate()
            check_routing(self.model, self.balance, list(self.data.sources))
            self.optimizer.validate()
            check_trained(self.model, self.optimizer)
            self.trainer.validate()
            self.schedule.validate(steps=self.trainer.steps)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            resolve_backend(self.backend, device, self.dtype, widths=self._expert_widths)
            if check_data:
                if self.init_from:
                    check_same_model(self.model, Path(self.init_from))
                validate_data(self.data)
                if self.data.tokenizer:
                    check_vocabulary(self.model.vocab_size, declared_vocab_size(Path(self.data.tokenizer)))
            if not self.data.tokenizer:
                check_vocabulary(self.model.vocab_size, self.data.vocab_size)
        except RecipeError:
            raise
        except ValueError as error:
            raise RecipeError(str(error)) from error

    @property
    def dtype(self) -> torch.dtype:
        """What activations and working weights are held in."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.parallel.dtype]

    @property
    def _expert_widths(self) -> tuple[int, ...]:
        return (self.model.hidden_size, self.model.moe_intermediate_size) if self.model.moe_layers else ()

    @property
    def folder(self) -> RunFolder:
        """Where the run is kept."""
        return RunFolder(path=Path(self.runs_dir) / self.name)

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON-able values; `read_recipe` reads them back."""
        return _ADAPTER.dump_python(self, mode="json")


_ADAPTER = TypeAdapter(Recipe)


def up_to_date(saved: Any) -> dict[str, Any]:
    """Return a recipe saved as JSON with the fields that recipes have come to have since, at their defaults.

    Raises ValueError for fields that are no longer known.
    """
    return _ADAPTER.validate_python(saved).to_json()


def read_recipe(path: Path) -> Recipe:
    """Return the recipe of a recipe.json. Raises RecipeError naming the fields that are unknown or wrong."""
    try:
        return _ADAPTER.validate_python(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RecipeError(f"no recipe at {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path} is not JSON: {error}") from error
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()]
        raise RecipeError(f"{path}: {'; '.join(problems)}") from error


@dataclass(frozen=True, kw_only=True)
class Command:
    """The command line of a recipe script."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    resume: bool = False  # continue the newest complete checkpoint of the run folder
    dry_run: bool = False  # print parameters, memory per rank and tokens; start nothing
    world_size: int = 0  # ranks to assume in a dry run; 0 means as launched


def main(recipe: Recipe, args: list[str] | None = None) -> None:
    """Run `recipe` with the overrides of the command line. How the process ends: docs/runs.md, exit codes."""
    command = tyro.cli(Command, default=Command(recipe=recipe), args=args, description=recipe.name)
    try:
        if command.world_size < 0 or (command.world_size and not command.dry_run):
            raise RecipeError(
                f"--world-size {command.world_size} is how many ranks a --dry-run assumes; it must be positive, "
                "and a run takes the ranks that torchrun starts"
            )
        if command.dry_run:
            world_size = command.world_size or launched_world_size()
            command.recipe.validate(world_size=world_size, check_data=False)
            print(_plan(command.recipe, world_size=world_size))
        else:
            launch(command.recipe, resume=command.resume)
    except (RecipeError, CheckpointError) as error:
        _end(f"error: {error}", 2)
    except StopRequestedError as stop:
        _end(f"{stop}; {command.recipe.folder.path} is saved, --resume continues it", stop.exit_code)
    except TooManySkippedStepsError as error:
        _end(f"error: {error}", error.exit_code)
    except KeyboardInterrupt:
        _end("interrupted at once, without a save", 130)


def _end(message: str, exit_code: int) -> NoReturn:
    """End the process. What ends all ranks alike is said once."""
    if launched_rank() == 0:
        print(message, file=sys.stderr)
    sys.exit(exit_code)


def _plan(recipe: Recipe, *, world_size: int) -> str:
    return plan_text(
        model=recipe.model,
        batch=recipe.batch,
        parallel=recipe.parallel,
        steps=recipe.trainer.steps,
        world_size=world_size,
    )


def launch(recipe: Recipe, *, resume: bool = False) -> None:
    """Train `recipe` to its end on the ranks torchrun started, or on this process alone. Collective.

    Raises:
        RecipeError: the recipe, the run folder or the data cannot be used; nothing has been trained.
    """
    recipe.validate(world_size=launched_world_size())
    # before any collective: building may take longer than one is allowed to, and a file lock orders the ranks
    data = _prepare_data(recipe)
    is_ours = not dist.is_initialized()
    device = start_process_group(timeout_s=recipe.parallel.timeout_s)
    try:
        groups = ParallelGroups.create(ep_size=recipe.parallel.ep_size, device=device)
        with ExitStack() as stack:
            start = on_first_rank(groups, lambda: _open_folder(recipe, data, resume, stack))
            if start.action == "finished":
                if groups.rank == 0:
                    print(f"{recipe.folder.path} is finished ({start.checkpoint}); nothing to do")
                    is_even = recipe.model.num_experts > 0 and recipe.model.num_experts % 2 == 0
                    print(next_commands(recipe.folder.path, script=_script(), ep_size=2 if is_even else 1))
                return
            on_first_rank(groups, lambda: _keep_tokenizer(recipe, data))
            _train(recipe, start, data, groups)
    finally:
        if is_ours:
            _end_process_group()


def _end_process_group() -> None:
    if "moe.train.engine" in sys.modules:  # else DeepSpeed never came in
        from moe.train.engine import end_process_group

        end_process_group()
    else:
        dist.destroy_process_group()


def _open_folder(recipe: Recipe, data: PreparedData, resume: bool, stack: ExitStack) -> Start:
    """Lock the run folder until `stack` closes, and see what it holds. Rank 0 only."""
    try:
        stack.enter_context(recipe.folder.lock())
    except RunLockedError as error:
        raise RecipeError(str(error)) from error
    recipe.folder.check_data(data.fingerprint)
    return recipe.folder.open(
        recipe.to_json(),
        resume=resume,
        steps=recipe.trainer.steps,
        read=up_to_date,
    )


def _prepare_data(recipe: Recipe) -> PreparedData:
    """Build or open the prepared data, and see that it fits the recipe."""
    is_first = launched_rank() == 0
    try:
        data = prepare(recipe.data, report=print if is_first else lambda _: None)
        make_stream(recipe, data)
        check_vocabulary(recipe.model.vocab_size, data.vocab_size)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    except OSError as error:
        raise RecipeError(f"the data cannot be prepared: {error}; look at data.sources and data.cache_dir") from error
    return data


def make_stream(recipe: Recipe, data: PreparedData) -> BatchStream:
    """Return the training sequences in order. Raises ValueError for a domain shorter than one sequence."""
    return BatchStream(
        data=data,
        seed=recipe.seed,
        global_sequences=recipe.batch.global_sequences,
        sequence_length=recipe.batch.sequence_length,
    )


def _keep_tokenizer(recipe: Recipe, data: PreparedData) -> None:
    """Put the tokenizer beside the checkpoints: a run can be sampled when its text is gone."""
    if not recipe.folder.tokenizer_dir.exists():
        # a copy cut short must not look like a tokenizer
        temporary = recipe.folder.tokenizer_dir.with_name(".tmp-tokenizer")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(data.tokenizer_dir, temporary)
        temporary.rename(recipe.folder.tokenizer_dir)


def _script() -> str:
    """Return the recipe script for the report's next commands; nothing if the command line changed the recipe."""
    return "" if sys.argv[1:] else sys.argv[0]


def _train(recipe: Recipe, start: Start, data: PreparedData, groups: ParallelGroups) -> None:
    # rank 0 has just checked the hashes
    reader = CheckpointReader.open(start.checkpoint, check_hashes=False) if start.checkpoint else None
    prepare_environment(groups.device.type)
    # DeepSpeed comes in here: a recipe that fails a check does not pay for its import
    from moe.train.engine import Engine
    from moe.train.step import TrainStep
    from moe.train.trainer import Trainer

    with torch.device(groups.device):
        model = Model(
            recipe.model,
            groups=groups,
            backend=recipe.backend,
            activation_checkpointing=recipe.parallel.activation_checkpointing,
        )
    if reader is None:
        initialise(model, seed=recipe.seed)
        if recipe.init_from:
            _, weights = open_weights(Path(recipe.init_from), check_hashes=groups.rank == 0)
            load_weights(model, weights)
    engine = Engine(model=model, groups=groups, optimizer=recipe.optimizer, parallel=recipe.parallel)
    is_first = groups.rank == 0
    tracker = (
        Tracker(recipe.folder.path, config=recipe.tracker, name=recipe.name, recipe=recipe.to_json())
        if is_first
        else None
    )
    console = RunConsole(
        total_steps=recipe.trainer.steps,
        first_step=reader.state["step"] if reader else 0,
        is_silent=not is_first,
    )
    requests = Requests(run_dir=recipe.folder.path, groups=groups)
    trainer = Trainer(
        engine=engine,
        train_step=TrainStep(
            engine=engine,
            groups=groups,
            balance=recipe.balance,
            seed=recipe.seed,
            domains=[domain.name for domain in data.domains],
        ),
        stream=make_stream(recipe, data),
        data=data,
        groups=groups,
        config=recipe.trainer,
        batch=recipe.batch,
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        run_dir=recipe.folder.path,
        state={"recipe": recipe.to_json(), "data_fingerprint": data.fingerprint},
        tracker=tracker,
        console=console,
        requests=requests,
    )
    try:
        if reader is not None:
            console.say(f"continuing {start.checkpoint}")
            trainer.restore(reader)
        with requests:
            evaluations = trainer.run()
    finally:
        console.close()
        if tracker is not None:
            tracker.close()
    _report(recipe, model, data, evaluations, groups)
    engine.close()


def _report(
    recipe: Recipe,
    model: Model,
    data: PreparedData,
    evaluations: dict[str, DomainEvaluation],
    groups: ParallelGroups,
) -> None:
    """Print what came of the run. Collective: under expert parallelism every rank takes part in sampling."""
    prompt = "The "
    text = complete(model, data.tokenizer_dir, prompt, max_new_tokens=80, seed=recipe.seed)
    if groups.rank:
        return
    report = ReportInput(
        run_dir=recipe.folder.path,
        script=_script(),
        rows=read_rows(recipe.folder.metrics_file),
        unigram=unigram_losses(data),
        evaluations=evaluations,
        sample_prompt=prompt,
        sample_text=text,
        moe_layers=recipe.model.routing_names,
    )
    print_report(report, Console(highlight=False))
