"""Upcycle: plan first, then write a model folder tensor by tensor.

What routing takes off. With all experts of a token equal, or making up whole feed-forwards, an MoE layer computes c
times the dense one; a factor s = 1 / c makes up for it (s = (1 - a) / c beside a shared expert, which gives the share
a). K of N experts in N / G groups of G slices:

    weights normalised            c = 1 / G                     whatever the router
    softmax, not normalised       c = K / (N / G * G^2)         as router rows go to zero
    sigmoid, not normalised       c = K / (2 G)                 as router rows go to zero
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from moe.checkpoint.model_folder import write_model
from moe.checkpoint.stream import Entry
from moe.config import ModelConfig
from moe.convert import ConversionError
from moe.convert.folder import appearing, copy_tokenizer
from moe.counts import count_parameters
from moe.initial import draw
from moe.routers.topk import TopKConfig
from moe.upcycle import METHODS, DenseLayer, Identity, LayerOf, Method, UpcycleConfig, check_own_options
from moe.upcycle.dense import DenseModel, check_alike, entries_of, open_dense
from moe.upcycle.fit import Texts, collect, dense_model, put_feed_forwards
from moe.upcycle.statistics import FittedRouter, RidgeStatistics

_PROMISES = {
    "exact": "exact: logits equal those of the dense model up to rounding",
    "in the limit": "in the limit: equal as the router starts nearer to zero (--router-std)",
    "changed on purpose": "changed on purpose: the loss will jump",
    "new": "new: experts of different models, between which the router chooses",
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What upcycling will make; nothing has been written yet."""

    config: UpcycleConfig
    source: DenseModel
    branches: tuple[DenseModel, ...]
    target: ModelConfig
    identity: Identity
    factor: float  # on the routed experts

    def __str__(self) -> str:
        dense, moe = count_parameters(self.source.config), count_parameters(self.target)
        size, dense_layers = sum(entry.bytes for entry in self.entries), self.source.config.num_hidden_layers
        rows = [
            ("dense", f"{dense.total:,} parameters, {self.source.kind}"),
            ("MoE", f"{moe.total:,} parameters, {moe.active:,} active per token; {size / 1e9:.2f} GB"),
            (
                "experts",
                f"{self.target.num_experts} in {len(self.target.moe_layers)} of {dense_layers} layers, "
                f"{self.target.num_experts_per_tok} per token, factor {self.factor:g} on {self.config.scale_on}",
            ),
            ("function", _PROMISES[self.identity]),
            ("needs", self.method.training),
        ]
        if self.branches:
            rest = "the branches' mean" if self.config.average_rest else "the source's"
            names = ", ".join(str(branch.path) for branch in self.branches)
            rows.insert(3, ("branches", f"{names}; attention, norms and embeddings are {rest}"))
        return "\n".join(f"{name:<10}{text}" for name, text in rows)

    @property
    def method(self) -> Method:
        """The chosen method."""
        return METHODS[self.config.method]

    @property
    def entries(self) -> list[Entry]:
        """The tensors of the new model, in the dtype of the dense one."""
        return entries_of(self.target, self.source)

    def tensors(self, routers: dict[int, FittedRouter]) -> Iterator[Tensor]:
        """Yield them one by one; the largest and one feed-forward are held at a time. `routers` are by layer."""
        layer_of = lru_cache(maxsize=1)(self._feed_forward)
        for entry in self.entries:
            if entry.name in self.source.dtypes:
                yield self.rest(entry.name).to(entry.dtype)
                continue
            layer, _, name = entry.name.removeprefix("model/layers.").partition(".moe.")
            index = int(layer)
            if name.startswith("router."):
                yield self._router(index, name, entry.shape, routers).to(entry.dtype)
            elif name.startswith("shared_expert."):
                yield self._shared(layer_of(index, 0), name.removeprefix("shared_expert."), entry.shape).to(entry.dtype)
            else:
                yield self._stack(entry, partial(layer_of, index), index=index, is_down=name == "experts.down_proj")

    def _stack(self, entry: Entry, layer_of: LayerOf, *, index: int, is_down: bool) -> Tensor:
        stack = torch.empty(entry.shape, dtype=entry.dtype)
        for e in range(self.target.num_experts):
            made = self.method.expert(self.config, layer_of, index=index, expert=e)
            if is_down:
                stack[e] = self._scaled(made)
            else:
                # halves one by one: the two side by side in float32 would be as large as half of 4 experts
                stack[e, : len(made.gate_FD)] = made.gate_FD
                stack[e, len(made.gate_FD) :] = made.up_FD
        return stack

    def rest(self, name: str) -> Tensor:
        """Return a tensor that is no expert's: the mean of the branches', in the first one's dtype, or the source's."""
        if not self.branches or not self.config.average_rest:
            return self.source.tensor(name)
        first = self.branches[0].tensor(name)
        # in float64 the mean of equal numbers is that number
        total = first.double()
        for branch in self.branches[1:]:
            total += branch.tensor(name)
        return (total / len(self.branches)).to(first.dtype)

    def _feed_forward(self, index: int, source: int) -> DenseLayer:
        return (self.source, *self.branches)[source].feed_forward(index)

    def _scaled(self, layer: DenseLayer) -> Tensor:
        return layer.down_DF * (self.factor if self.config.scale_on == "down_proj" else 1.0)

    def _shared(self, dense: DenseLayer, name: str, shape: tuple[int, ...]) -> Tensor:
        if name == "sigmoid_gate.weight":
            return torch.zeros(shape)  # sigmoid(0): a half for every token
        part = name.removesuffix("_proj.weight")
        if part == "down":
            return dense.down_DF * (self.config.shared_share / 0.5)
        return {"gate": dense.gate_FD, "up": dense.up_FD}[part]

    def _router(self, index: int, name: str, shape: tuple[int, ...], routers: dict[int, FittedRouter]) -> Tensor:
        G = self.config.granularity
        if index in routers:
            fitted = {"router.weight": routers[index].weight_CD, "router.bias": routers[index].bias_C}[name]
            return (fitted / self.config.temperature).repeat_interleave(G, dim=0)
        rows = draw((shape[0] // G, shape[1]), f"{self.config.seed}/router/{index}") * self.config.router_std
        return rows.repeat_interleave(G, dim=0)


def plan(path: Path, config: UpcycleConfig) -> Plan:
    """Return what upcycling the dense model in `path` would make. Reads no weight, but to compare hashes.

    Raises ConversionError for a model that is not dense, branches that are not like it, and for options that do not go
    together.
    """
    check_own_options(config)
    source = open_dense(path)
    dense, method = source.config, METHODS[config.method]
    for name, value, least in (
        ("--num-experts", config.num_experts, 0),
        ("--top-k", config.top_k, 1),
        ("--every", config.every, 1),
    ):
        if value < least:
            raise ConversionError(f"{name} {value} must be at least {least}")
    if config.router_std < 0:
        raise ConversionError(f"--router-std {config.router_std} must not be negative")
    if not 0 <= config.shared_share <= 1:
        raise ConversionError(f"--shared-share {config.shared_share} must lie in [0, 1]")
    has_shared_expert = method.has_shared_expert(config)
    if config.shared_share != 0.5 and not has_shared_expert:
        raise ConversionError(f"--shared-share {config.shared_share} needs --shared-expert")
    method.check(config, dense)
    branches = tuple(open_dense(Path(branch)) for branch in config.branches)
    for branch in branches:
        check_alike(source, branch)
    factor = (1 - config.shared_share if has_shared_expert else 1.0) / multiplier(config)
    target = replace(
        dense,
        num_experts=method.num_experts(config),
        num_experts_per_tok=config.top_k,
        moe_intermediate_size=dense.intermediate_size // config.granularity,
        decoder_sparse_step=config.every,
        shared_expert_intermediate_size=dense.intermediate_size if has_shared_expert else 0,
        use_shared_expert_gate=has_shared_expert,
        router=TopKConfig(
            scoring_func=config.scoring_func,
            norm_topk_prob=config.norm_topk_prob,
            use_router_bias=method.fits_router(config) and config.router_bias,
            routed_scaling_factor=factor if config.scale_on == "routed_scaling_factor" else 1.0,
        ),
    )
    try:
        target.validate()
        if not method.fits_router(config):
            target.router.check_learns(num_experts_per_tok=config.top_k)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    return Plan(
        config=config,
        source=source,
        branches=branches,
        target=target,
        identity=method.identity(config),
        factor=factor,
    )


def multiplier(config: UpcycleConfig) -> float:
    """Return c: what a layer of the new model computes, as a share of the dense one, before the factor."""
    K, G = config.top_k, config.granularity
    if config.norm_topk_prob:
        return 1 / G
    if config.scoring_func == "sigmoid":
        return K / (2 * G)
    return K / (METHODS[config.method].num_experts(config) // G * G * G)


def upcycle(made: Plan, out: Path) -> dict[int, FittedRouter]:
    """Write the planned model folder; return the routers that were fitted, by layer. It appears complete or not at all.

    Raises ConversionError for an `out` that exists, and for text that a router cannot be fitted to.
    """
    with appearing(out) as folder:
        statistics, routers = fit(made) if made.method.fits_router(made.config) else (None, {})
        origin = f"upcycled by {made.config.method}"
        write_model(folder, made.target, made.entries, made.tensors(routers), origin=origin)
        copy_tokenizer(made.source.tokenizer_dir, folder / "tokenizer")
        if statistics is not None:
            statistics.save(folder, penalty=made.config.penalty, temperature=made.config.temperature)
    return routers


def fit(made: Plan) -> tuple[RidgeStatistics, dict[int, FittedRouter]]:
    """Return sums over the texts of a plan, and the router of each MoE layer."""
    config, layers = made.config, made.target.moe_layers
    texts = Texts.of(
        config.texts,
        tokenizer_dir=made.source.tokenizer_dir,
        cache_dir=config.cache_dir,
        sequence_length=config.text_length,
        tokens=config.text_tokens,
    )
    statistics = RidgeStatistics(
        num_layers=len(layers), hidden_size=made.target.hidden_size, num_domains=len(made.branches)
    )
    # one model, whose rest is made once
    model = dense_model(made.source.config, made.rest)
    for number, branch in enumerate(made.branches):
        put_feed_forwards(model, branch, layers=layers)
        collect(statistics, model, domain=number, layers=layers, texts=texts, text=number)
    return statistics, solve(statistics, layers, penalty=config.penalty, has_bias=config.router_bias)


def solve(
    statistics: RidgeStatistics, layers: tuple[int, ...], *, penalty: float, has_bias: bool
) -> dict[int, FittedRouter]:
    """Return the router of each layer."""
    return {index: statistics.solve(place, penalty=penalty, has_bias=has_bias) for place, index in enumerate(layers)}
