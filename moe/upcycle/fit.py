"""Fitting routers to domains without training: what every layer's router would see on the text of each domain.

The text of domain c runs through the dense model that has the new model's attention and the feed-forwards of branch c,
which is the new model with every token sent to the right expert in every layer. The input of each feed-forward there
is the router's input.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe.blocks.feed_forward import FeedForward
from moe.config import ModelConfig
from moe.convert import ConversionError
from moe.data.packing import Sequences
from moe.data.prepare import DataConfig, prepare
from moe.data.store import PreparedData
from moe.model import Model
from moe.parallel.groups import ParallelGroups
from moe.upcycle.dense import DenseModel
from moe.upcycle.statistics import RidgeStatistics

BATCH = 8  # sequences that run at a time


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Text of several domains as tokens of one tokenizer; domain c is `names[c]` of the data."""

    data: PreparedData
    names: tuple[str, ...]
    sequence_length: int
    tokens: int  # to read of each

    @classmethod
    def of(
        cls, texts: Sequence[str], *, tokenizer_dir: Path, cache_dir: str, sequence_length: int, tokens: int
    ) -> "Texts":
        """Return texts by their places: files, folders, or builtin:python and the like.

        Raises ConversionError for a place that holds no text, or too little, and for a tokenizer that is missing.
        """
        names = tuple(f"domain-{c}" for c in range(len(texts)))
        config = DataConfig(
            sources=dict(zip(names, texts, strict=True)), tokenizer=str(tokenizer_dir), cache_dir=cache_dir
        )
        try:
            data = prepare(config)
        except (ValueError, OSError) as error:
            raise ConversionError(f"--texts {' '.join(texts)}: {error}") from error
        return cls(data=data, names=names, sequence_length=sequence_length, tokens=tokens)

    def batches(self, domain: int) -> list[tuple[Tensor, Tensor]]:
        """Return (token ids, which are no padding), [B, S] each, from the start of a domain's training text."""
        found = {domain.name: domain for domain in self.data.domains}[self.names[domain]]
        sequences = Sequences(
            found.train,
            sequence_length=self.sequence_length,
            packing="concatenate",
            eos_token_id=found.eos_token_id,
            keep_tail=True,
        )
        count = min(sequences.num_sequences, -(-self.tokens // self.sequence_length))
        rows = [sequences[i] for i in range(count)]
        return [
            (
                torch.stack([torch.from_numpy(row.token_S) for row in rows[i : i + BATCH]]),
                torch.stack([torch.from_numpy(row.valid_S) for row in rows[i : i + BATCH]]),
            )
            for i in range(0, count, BATCH)
        ]


@torch.no_grad()
def dense_model(config: ModelConfig, tensor: Callable[[str], Tensor]) -> Model:
    """Return a dense model ready to evaluate, its weights given by name, `model/...`."""
    groups = ParallelGroups.single("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device(groups.device):
        model = Model(config, groups=groups)
    for name, parameter in model.named_parameters():
        parameter.copy_(tensor(f"model/{name}"))
    return model.eval()


@torch.no_grad()
def put_feed_forwards(model: Model, branch: DenseModel, *, layers: Sequence[int]) -> None:
    """Give `layers` of a model the feed-forwards of a branch."""
    for index in layers:
        made, feed_forward = branch.feed_forward(index), model.layers[index].feed_forward
        assert isinstance(feed_forward, FeedForward)
        feed_forward.gate_proj.weight.copy_(made.gate_FD)
        feed_forward.up_proj.weight.copy_(made.up_FD)
        feed_forward.down_proj.weight.copy_(made.down_DF)


@torch.no_grad()
def collect(
    statistics: RidgeStatistics, model: Model, *, domain: int, layers: Sequence[int], texts: Texts, text: int
) -> None:
    """Add to `statistics` what the routers of `layers` would see on one text.

    Args:
        model: dense, with the feed-forwards of the domain's branch.
        domain: the column in the statistics of the text, which is number `text` of the texts.
    """
    device = model.embed_tokens.weight.device
    valid_BS = torch.ones(0, dtype=torch.bool)

    def seen(_module: nn.Module, inputs: tuple[Any, ...], *, layer: int) -> None:
        x_ND = inputs[0].reshape(-1, model.config.hidden_size)
        statistics.update(layer, x_ND[valid_BS.flatten()].cpu(), domain)

    hooks = [
        model.layers[index].feed_forward.register_forward_pre_hook(partial(seen, layer=place))  # pyright: ignore
        for place, index in enumerate(layers)
    ]
    try:
        for token_BS, valid in texts.batches(text):
            valid_BS = valid.to(device)
            model(token_BS.to(device), valid_BS=valid_BS)
    finally:
        for hook in hooks:
            hook.remove()
