"""Trainer: the loop over optimizer steps, with logging, evaluation and checkpoints.

The loop owns no training state beyond the number of finished steps: data order, learning rate and router noise are
functions of the step, everything else lives in the engine and in the model's buffers.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from moe.checkpoint import CheckpointError, CheckpointReader, Shard, prune, save_checkpoint
from moe.data.batching import BatchConfig
from moe.data.store import PreparedData
from moe.data.tokens import BatchStream
from moe.parallel.agree import all_gather, on_first_rank
from moe.parallel.groups import ParallelGroups
from moe.train.checks import check_moved, check_replicas, snapshot
from moe.train.console import RunConsole
from moe.train.engine import Engine
from moe.train.evaluate import DomainEvaluation, evaluate
from moe.train.optimizer import OptimizerConfig
from moe.train.requests import Requests, StopRequestedError, TooManySkippedStepsError
from moe.train.schedule import ScheduleConfig, TrainerConfig
from moe.train.state import num_updates, read_state, write_state
from moe.train.step import StepRecord, TrainStep
from moe.train.tracker import Tracker

LAGGED = "balance/lagged_LE"  # float64, what scope lagged remembers


class Trainer:
    """Runs the steps of one recipe on an engine. All arguments are built parts; `run` is collective."""

    def __init__(
        self,
        *,
        engine: Engine,
        train_step: TrainStep,
        stream: BatchStream,
        data: PreparedData,
        groups: ParallelGroups,
        config: TrainerConfig,
        batch: BatchConfig,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        run_dir: Path,
        state: dict[str, Any],
        tracker: Tracker | None,
        console: RunConsole,
        requests: Requests,
    ) -> None:
        self._engine, self._train_step, self._stream, self._data = engine, train_step, stream, data
        self._groups, self._config, self._batch = groups, config, batch
        self._optimizer, self._schedule = optimizer, schedule
        self._run_dir, self._state = run_dir, state
        self._tracker, self._console, self._requests = tracker, console, requests
        self._step = 0  # finished steps
        self._tokens = 0  # valid tokens trained on
        self._saved_step: int | None = None
        self._skipped = 0  # steps without an update, in all
        self._skipped_in_a_row = 0
        self._is_unchecked = True  # in debug mode: no update has been looked at yet

    def restore(self, reader: CheckpointReader) -> None:
        """Continue from a checkpoint of any layout. Collective."""
        write_state(self._engine, reader, num_updates=reader.state["num_updates"])
        self._step = self._saved_step = reader.state["step"]
        self._tokens = reader.state["tokens"]
        self._skipped = reader.state["skipped_steps"]
        self._skipped_in_a_row = reader.state["skipped_in_a_row"]
        if LAGGED in reader.names:
            self._train_step.load.lagged_LE = reader.read(LAGGED).to(self._groups.device)

    def run(self) -> dict[str, DomainEvaluation]:
        """Train to the last step and return the final evaluation by domain."""
        config = self._config
        if self._step == 0:
            self._evaluate()
        train_seconds, window_seconds, window_tokens = 0.0, 0.0, 0
        first = self._step
        micro_batches = self._batch.micro_batches(rank=self._groups.rank, world_size=self._groups.world_size)
        while self._step < config.steps:
            started = time.perf_counter()
            batches = [self._stream.batch(self._step, indices) for indices in micro_batches]
            learning_rate = self._optimizer.learning_rate * self._schedule.factor(self._step, steps=config.steps)
            before = snapshot(self._engine) if config.debug and self._is_unchecked else None
            record = self._train_step.run(
                batches,
                step=self._step,
                progress=self._step / config.steps,
                learning_rate=learning_rate,
                measures_gradients=self._is_due(config.log_every, step=self._step + 1),
            )
            elapsed = time.perf_counter() - started
            train_seconds, window_seconds = train_seconds + elapsed, window_seconds + elapsed
            window_tokens += record.num_tokens
            self._step += 1
            self._tokens += record.num_tokens
            self._console.step(self._step)
            if self._is_due(config.log_every):
                left = train_seconds / (self._step - first) * (config.steps - self._step)
                self._log(record, learning_rate, window_tokens / window_seconds, seconds_left=left)
                window_seconds, window_tokens = 0.0, 0
            self._check(record, before)
            if self._step < config.steps:
                if self._is_due(config.eval_every):
                    self._evaluate()
                self._answer_requests()
        evaluations = self._evaluate()
        self._save(is_last=True)
        return evaluations

    def _check(self, record: StepRecord, before: dict[str, Tensor] | None) -> None:
        """Count steps without an update, and look closely in debug mode. Collective."""
        if record.is_skipped:
            self._skipped += 1
            self._skipped_in_a_row += 1
            self._report_skip(record)
            if self._skipped_in_a_row >= self._config.max_skipped_steps:
                raise TooManySkippedStepsError(
                    f"{self._skipped_in_a_row} steps in a row, up to step {self._step}, had no finite loss and "
                    "gradient; lower optimizer.learning_rate, or look at the sequences that metrics.jsonl names"
                )
            return
        self._skipped_in_a_row = 0
        if self._config.debug:
            check_replicas(self._engine.module, self._groups)
            if before is not None:
                check_moved(self._engine, before)
                self._is_unchecked = False

    def _report_skip(self, record: StepRecord) -> None:
        """Log which sequences of the global batch had a loss or router logits that were not finite. Collective."""
        micro_batches = self._batch.micro_batches(rank=self._groups.rank, world_size=self._groups.world_size)
        mine = [index for m in record.bad_micro_batches for index in micro_batches[m]]
        sequences = sorted(index for indices in all_gather(self._groups, mine) for index in indices)
        where = f"sequences {sequences} of the batch" if sequences else "the gradient alone"
        self._console.say(f"step {self._step}: not finite in {where}; the update was skipped on all ranks")
        if self._tracker is not None:
            self._tracker.log(
                {"step": self._step, "train/skipped_steps": self._skipped, "skipped/sequences": sequences}
            )

    def _answer_requests(self) -> None:
        """Save when it is due or asked for; stop when asked to. Collective."""
        request = self._requests.poll()
        if request.save or request.stop_signal or self._is_due(self._config.save_every):
            self._save(is_last=bool(request.stop_signal))
        if request.stop_signal:
            raise StopRequestedError(128 + request.stop_signal)

    def _is_due(self, every: int, *, step: int | None = None) -> bool:
        at = self._step if step is None else step
        return every > 0 and (at % every == 0 or at == self._config.steps)

    def _log(self, record: StepRecord, learning_rate: float, tokens_per_s: float, *, seconds_left: float) -> None:
        load = asdict(record.load) if record.load else {"max_over_mean": 1.0, "cv": 0.0, "dead_expert_frac": 0.0}
        row: dict[str, Any] = {
            "step": self._step,
            "tokens": self._tokens,
            "train/loss": record.loss,
            "train/lm_loss": record.lm_loss,
            "train/load_balancing_loss": record.load_balancing_loss,
            "train/z_loss": record.z_loss,
            "train/grad_norm": record.grad_norm,
            "train/lr": learning_rate,
            "train/skipped_steps": self._skipped + record.is_skipped,
            "perf/tokens_per_s": tokens_per_s,
            "moe/load_max_over_mean": load["max_over_mean"],
            "moe/load_cv": load["cv"],
            "moe/dead_expert_frac": load["dead_expert_frac"],
            "moe/router_entropy": record.router_entropy,
            "moe/router_grad_ratio": record.router_grad_ratio,
            "moe/experts_per_token": record.experts_per_token,
            "moe/dropped_frac": record.dropped_frac,
        }
        if record.domain_loss is not None:
            row |= {"moe/domain_loss": record.domain_loss, "moe/domain_accuracy": record.domain_accuracy}
        if self._tracker is not None:
            self._tracker.log(row)
        self._console.row(row, seconds_left=seconds_left)

    def _evaluate(self) -> dict[str, DomainEvaluation]:
        evaluations = evaluate(
            self._engine.module,
            self._data,
            groups=self._groups,
            sequence_length=self._batch.sequence_length,
            batch_sequences=self._batch.micro_sequences,
            max_sequences=self._config.eval_sequences,
            context=self._train_step.context(step=self._step, progress=self._step / self._config.steps),
        )
        row: dict[str, Any] = {"step": self._step, "tokens": self._tokens}
        for name, result in evaluations.items():
            row[f"eval/{name}/loss"] = result.loss
            row[f"eval/{name}/perplexity"] = result.perplexity
            row[f"eval/{name}/bits_per_byte"] = result.bits_per_byte
        if self._tracker is not None:
            self._tracker.log(row)
        losses = "  ".join(f"{name} {result.loss:.4f}" for name, result in evaluations.items())
        self._console.say(f"step {self._step}/{self._config.steps}  validation loss  {losses}")
        return evaluations

    def _shards(self) -> Iterator[Shard]:
        yield from read_state(self._engine)
        lagged_LE = self._train_step.load.lagged_LE
        if lagged_LE is not None and self._groups.rank == 0:
            yield Shard(name=LAGGED, tensor=lagged_LE, logical_shape=tuple(lagged_LE.shape))

    def _save(self, *, is_last: bool) -> None:
        """Save unless this step is saved; a failure ends the run only where no later save can make up for it."""
        if self._saved_step == self._step:
            return
        try:
            self._write_checkpoint()
        except CheckpointError as error:
            # raised on all ranks alike; the checkpoints before are intact
            if is_last:
                raise
            self._console.say(f"step {self._step}: {error}; the run goes on and saves again when it is next due")
            if self._tracker is not None:
                self._tracker.log({"step": self._step, "save/failed": str(error)})

    def _write_checkpoint(self) -> None:
        state = {
            **self._state,
            "step": self._step,
            "tokens": self._tokens,
            "num_updates": num_updates(self._engine),
            "skipped_steps": self._skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
        }
        directory = self._run_dir / "checkpoints"
        path = save_checkpoint(
            directory,
            step=self._step,
            shards=self._shards(),
            state=state,
            rank=self._groups.rank,
            world_size=self._groups.world_size,
            gather=partial(all_gather, self._groups),
        )
        self._saved_step = self._step
        on_first_rank(self._groups, lambda: self._prune(directory, path))
        self._console.say(f"step {self._step}/{self._config.steps}  saved {path}")

    def _prune(self, directory: Path, newest: Path) -> None:
        try:
            prune(directory, self._config.keep_checkpoints, known_good=newest)
        except OSError as error:
            # an old checkpoint too many does no harm; ending the run over it would
            self._console.say(f"an old checkpoint could not be removed: {error}")
