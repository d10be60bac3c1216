"""Upcycle: plan first, then write a model folder tensor by tensor.

What routing takes off. With all experts of a token equal, or making up whole feed-forwards, an MoE layer computes c
times the dense one; a factor s = 1 / c makes up for it (s = 1 / 2c beside a shared expert, which gives the other half).
K of N experts in N / G groups of G slices:

    weights normalised            c = 1 / G                     whatever the router
    softmax, not normalised       c = K / (N / G * G^2)         as router rows go to zero
    sigmoid, not normalised       c = K / (2 G)                 as router rows go to zero
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moe.checkpoint.model_folder import write_model
from moe.checkpoint.stream import Entry
from moe.config import ModelConfig
from moe.convert import ConversionError
from moe.convert.hf import Source, appearing, copy_tokenizer, open_source
from moe.counts import count_parameters
from moe.initial import draw
from moe.model import Model
from moe.parallel.groups import ParallelGroups
from moe.routers.topk import TopKConfig
from moe.upcycle import METHODS, DenseLayer, Identity, UpcycleConfig, check_own_options


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What upcycling a folder will make; nothing has been written yet."""

    config: UpcycleConfig
    source: Source
    target: ModelConfig
    identity: Identity
    factor: float  # on the routed experts

    def __str__(self) -> str:
        dense, moe = count_parameters(self.source.config), count_parameters(self.target)
        size, dense_layers = sum(entry.bytes for entry in self.entries), self.source.config.num_hidden_layers
        promise = {
            "exact": "exact: logits equal those of the dense model up to rounding",
            "in the limit": "in the limit: equal as the router starts nearer to zero (--router-std)",
            "changed on purpose": "changed on purpose: the loss will jump",
        }[self.identity]
        rows = [
            ("dense", f"{dense.total:,} parameters, {self.source.folder.family.model_type}"),
            ("MoE", f"{moe.total:,} parameters, {moe.active:,} active per token; {size / 1e9:.2f} GB"),
            (
                "experts",
                f"{self.target.num_experts} in {len(self.target.moe_layers)} of {dense_layers} layers, "
                f"{self.target.num_experts_per_tok} per token, factor {self.factor:g} on {self.config.scale_on}",
            ),
            ("function", promise),
            ("needs", METHODS[self.config.method].training),
        ]
        return "\n".join(f"{name:<10}{text}" for name, text in rows)

    @property
    def entries(self) -> list[Entry]:
        """The tensors of the new model, in the dtype of the dense one."""
        dtypes = {entry.name: entry.dtype for entry in self.source.entries}
        common = dtypes["model/embed_tokens.weight"]
        with torch.device("meta"):
            model = Model(self.target, groups=ParallelGroups.single())
        return [
            Entry(name=f"model/{name}", dtype=dtypes.get(f"model/{name}", common), shape=tuple(parameter.shape))
            for name, parameter in model.named_parameters()
        ]

    def tensors(self) -> Iterator[Tensor]:
        """Yield them one by one; the largest and one feed-forward are held at a time."""
        known = set(self.source.names.shapes)
        for entry in self.entries:
            if entry.name in known:
                yield self.source.tensor(entry.name)
            else:
                yield self._made(entry).to(entry.dtype)

    def _made(self, entry: Entry) -> Tensor:
        layer, _, name = entry.name.removeprefix("model/layers.").partition(".moe.")
        index = int(layer)
        if name == "router.weight":
            return self._router(index, entry.shape)
        dense = self._dense(index)
        if name == "shared_expert.sigmoid_gate.weight":
            return torch.zeros(entry.shape)  # sigmoid(0): a half for every token
        if name.startswith("shared_expert."):
            part = name.removeprefix("shared_expert.").removesuffix("_proj.weight")
            return {"gate": dense.gate_FD, "up": dense.up_FD, "down": dense.down_DF}[part]
        method, is_down = METHODS[self.config.method], name == "experts.down_proj"
        scale = self.factor if self.config.scale_on == "down_proj" else 1.0
        stack = torch.empty(entry.shape, dtype=entry.dtype)
        for e in range(self.target.num_experts):
            made = method.expert(self.config, dense, index=index, expert=e)
            if is_down:
                stack[e] = made.down_DF * scale
            else:
                # halves one by one: the two side by side in float32 would be as large as half of 4 experts
                stack[e, : len(made.gate_FD)] = made.gate_FD
                stack[e, len(made.gate_FD) :] = made.up_FD
        return stack

    def _dense(self, index: int) -> DenseLayer:
        prefix = f"model/layers.{index}.feed_forward."
        gate, up, down = (self.source.tensor(f"{prefix}{name}_proj.weight").float() for name in ("gate", "up", "down"))
        return DenseLayer(gate_FD=gate, up_FD=up, down_DF=down)

    def _router(self, index: int, shape: tuple[int, ...]) -> Tensor:
        G = self.config.granularity
        rows = draw((shape[0] // G, shape[1]), f"{self.config.seed}/router/{index}") * self.config.router_std
        return rows.repeat_interleave(G, dim=0)


def plan(path: Path, config: UpcycleConfig) -> Plan:
    """Return what upcycling the dense folder `path` would make. Reads headers only.

    Raises ConversionError for a folder that is not dense, and for options that do not go together.
    """
    check_own_options(config)
    source = open_source(path)
    dense = source.config
    if dense.num_experts:
        raise ConversionError(
            f"{path} has experts already ({dense.num_experts} a layer); upcycling starts from a dense model"
        )
    for name, value in (("--num-experts", config.num_experts), ("--top-k", config.top_k), ("--every", config.every)):
        if value < 1:
            raise ConversionError(f"{name} {value} must be at least 1")
    if config.router_std < 0:
        raise ConversionError(f"--router-std {config.router_std} must not be negative")
    method = METHODS[config.method]
    method.check(config, dense)
    factor = (0.5 if config.shared_expert else 1.0) / multiplier(config)
    target = replace(
        dense,
        num_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
        moe_intermediate_size=dense.intermediate_size // config.granularity,
        decoder_sparse_step=config.every,
        shared_expert_intermediate_size=dense.intermediate_size if config.shared_expert else 0,
        use_shared_expert_gate=config.shared_expert,
        router=TopKConfig(
            scoring_func=config.scoring_func,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=factor if config.scale_on == "routed_scaling_factor" else 1.0,
        ),
    )
    try:
        target.validate()
    except ValueError as error:
        raise ConversionError(str(error)) from error
    return Plan(config=config, source=source, target=target, identity=method.identity(config), factor=factor)


def multiplier(config: UpcycleConfig) -> float:
    """Return c: what a layer of the new model computes, as a share of the dense one, before the factor."""
    K, G = config.top_k, config.granularity
    if config.norm_topk_prob:
        return 1 / G
    if config.scoring_func == "sigmoid":
        return K / (2 * G)
    return K / (config.num_experts // G * G * G)


def upcycle(made: Plan, path: Path, out: Path) -> None:
    """Write the planned model folder. It appears complete or not at all.

    Raises ConversionError for an `out` that exists.
    """
    with appearing(out) as folder:
        write_model(folder, made.target, made.entries, made.tensors(), origin=f"upcycled by {made.config.method}")
        copy_tokenizer(path, folder / "tokenizer")
