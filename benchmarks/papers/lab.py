"""What the studies of upcycling share: small dense parents, runs that are trained once, losses on held-out text.

Runs go through launch() as a user's do, on the built-in text, in a folder that keeps them: a study that was stopped
goes on where it was. The model has 3 layers of width 96 and 1,024 tokens; 0.5 million parameters, 2.9 with 8 experts.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.checkpoint import load_weights, open_any_model
from moe.config import ModelConfig
from moe.data.batching import BatchConfig
from moe.data.corpus import BUILTINS
from moe.data.prepare import DataConfig, prepare
from moe.data.store import PreparedData
from moe.data.tokens import validation_batches
from moe.model import Model
from moe.parallel.groups import ParallelGroups
from moe.recipe import Recipe, launch
from moe.run import read_rows
from moe.train.evaluate import evaluate
from moe.train.optimizer import OptimizerConfig
from moe.train.schedule import ScheduleConfig, TrainerConfig

BATCH = BatchConfig(global_sequences=8, micro_sequences=8, sequence_length=128)
BYTES = 1_500_000  # of each domain
EVALUATED = 24  # sequences of each domain
DENSE = ModelConfig(
    vocab_size=1024,
    hidden_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=128,
    tie_word_embeddings=True,
    qk_norm="head",
    intermediate_size=384,
    num_experts=0,
    num_experts_per_tok=0,
    moe_intermediate_size=0,
)


@dataclass(frozen=True)
class Lab:
    """Runs in one folder."""

    home: Path

    @cached_property
    def data(self) -> PreparedData:
        """All domains in equal parts, with the tokenizer that every run uses."""
        config = DataConfig(vocab_size=DENSE.vocab_size, builtin_bytes=BYTES, cache_dir=str(self.home / "data"))
        return prepare(config, report=lambda _: None)

    def recipe(
        self,
        name: str,
        *,
        seed: int,
        steps: int,
        model: ModelConfig = DENSE,
        weights: Mapping[str, float] | None = None,
        init_from: Path | None = None,
        learning_rate: float = 2e-3,
        trainable: tuple[str, ...] = (),
        **changes: Any,
    ) -> Recipe:
        """Return a run. `weights` names its domains; all in equal parts if left out."""
        shares = dict(weights or dict.fromkeys(BUILTINS, 1.0))
        return Recipe(
            name=name,
            seed=seed,
            runs_dir=str(self.home),
            init_from=str(init_from) if init_from else "",
            model=model,
            data=DataConfig(
                sources={domain: f"builtin:{domain}" for domain in shares},
                weights=shares,
                tokenizer=str(self.data.tokenizer_dir),
                builtin_bytes=BYTES,
                cache_dir=str(self.home / "data"),
            ),
            batch=BATCH,
            optimizer=OptimizerConfig(learning_rate=learning_rate, trainable=trainable),
            schedule=ScheduleConfig(warmup_steps=20),
            trainer=TrainerConfig(
                steps=steps, log_every=50, eval_every=50, eval_sequences=EVALUATED, save_every=0, keep_checkpoints=1
            ),
            **changes,
        )

    def trained(self, recipe: Recipe) -> Path:
        """Return the folder of a run, after training it unless it is finished."""
        folder = recipe.folder.path
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            launch(recipe, resume=(folder / "recipe.json").exists())
        return folder

    def losses(self, model: Model) -> dict[str, float]:
        """Return the loss on held-out text of each domain."""
        results = evaluate(
            model,
            self.data,
            groups=ParallelGroups.single(),
            sequence_length=BATCH.sequence_length,
            batch_sequences=BATCH.micro_sequences,
            max_sequences=EVALUATED,
        )
        return {name: result.loss for name, result in results.items()}

    @torch.no_grad()
    def probabilities(self, model: Model, domains: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (domain, its tokens' probabilities [T, E]) for each batch of held-out text and each layer."""
        for domain in self.data.domains:
            if domain.name not in domains:
                continue
            batches = validation_batches(
                domain,
                sequence_length=BATCH.sequence_length,
                batch_size=BATCH.micro_sequences,
                max_sequences=EVALUATED,
            )
            for batch in batches:
                for routing in model(batch.token_BS, valid_BS=batch.valid_BS)[1]:
                    yield domain.name, routing.probs_TE[batch.valid_BS.flatten()]


def opened(folder: Path) -> Model:
    """Return the model in a folder, ready to evaluate."""
    config, reader = open_any_model(folder)
    model = Model(config, groups=ParallelGroups.single())
    load_weights(model, reader)
    return model.eval()


def curve(run: Path) -> dict[int, dict[str, float]]:
    """Return the losses on held-out text of a run's own domains, by step."""
    found = {}
    for row in read_rows(run / "metrics.jsonl"):
        losses = {key.split("/")[1]: value for key, value in row.items() if key.startswith("eval/") and "loss" in key}
        if losses:
            found[row["step"]] = losses
    return found


def general(lab: Lab, seed: int) -> Recipe:
    """A parent that has read prose for the most part."""
    weights = {"prose": 0.7, "python": 0.1, "maths": 0.1, "cpp": 0.1}
    return lab.recipe(f"general-{seed}", seed=seed, steps=400, weights=weights)


def mixed(lab: Lab, seed: int) -> Recipe:
    """A parent that has read all domains in equal parts."""
    return lab.recipe(f"mixed-{seed}", seed=seed, steps=400)
