"""How many parameters a model has and uses per token, and what a token costs.

Counted on the meta device from the module itself, so nothing is allocated and no formula can drift from the
model.
"""

from dataclasses import dataclass, replace
from math import prod

import torch

from moe.blocks.chain import ChainConfig
from moe.model import Model, ModelConfig
from moe.parallel.groups import ParallelGroups


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCount:
    """Parameters of a whole model (all ranks together). `total` is the sum of the parts below it.

    `active` is what the average token passes: as many experts of each MoE layer as its router says
    (num_experts_per_tok, or the target it holds) and everything else, in a chain of experts as often as it
    passes them. It includes the embedding table and the head in full, as published figures do;
    `active - embedding` leaves the table out.
    """

    total: int
    active: int
    embedding: int
    attention: int  # with biases and q/k norms
    norm: int
    router: int
    experts: int  # routed experts
    shared_expert: int
    feed_forward: int  # dense layers
    head: int  # 0 if tied: the table is counted once


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Return the parameter counts of a model. Raises ValueError if the configuration is invalid."""
    parts = {
        "embedding": 0,
        "attention": 0,
        "norm": 0,
        "router": 0,
        "experts": 0,
        "shared_expert": 0,
        "feed_forward": 0,
        "head": 0,
    }
    for name, shape in _parameter_shapes(config).items():
        parts[_part(name)] += prod(shape)
    total = sum(parts.values())
    idle = parts["experts"] - _active(config, parts["experts"])
    repeated = (config.chain.num_shared_runs - 1) * parts["shared_expert"]
    return ParameterCount(total=total, active=total - idle + repeated, **parts)


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Return floating-point operations of one token's forward pass, the mean over a sequence of
    `sequence_length`.

    Every active weight matrix costs 2 per element (one multiplication, one addition), the head included, the
    embedding table (a look-up) excluded. Attention costs 4*H*d per layer and visible token: scores and
    values; causality makes half of it visible, a window less. Norms, activations, softmax and biases are not
    counted. Training costs three times as much (backward counts double), four times with activation
    checkpointing.

    Raises ValueError if the configuration is invalid.
    """
    matrices, experts = 0, 0
    chain = config.chain
    runs = {"shared_expert": chain.num_shared_runs, "router": chain.rounds // chain.num_routers}
    for name, shape in _parameter_shapes(config).items():
        part = _part(name)
        if part == "experts":
            experts += 0 if name.endswith("bias") else prod(shape)
        elif len(shape) > 1 and (part != "embedding" or config.tie_word_embeddings):
            matrices += runs.get(part, 1) * prod(shape)
    visible = sum(_visible(config.window(index), sequence_length) for index in range(config.num_attention_layers))
    attention = 2 * config.num_attention_heads * (config.query_dim + config.value_dim) * visible
    return 2 * (matrices + _active(config, experts)) + round(attention)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertCompute:
    """What the experts of one layer do for one token. A shared expert n times as wide as an expert counts n."""

    num_expert_runs: float
    flops: int  # of the matrices of routed and shared experts, forward

    @classmethod
    def of(cls, config: ModelConfig) -> "ExpertCompute":
        """Return the compute of a model's MoE layer."""
        routed = config.chain.rounds * config.mean_experts_per_tok * config.moe_intermediate_size
        shared = config.chain.num_shared_runs * config.shared_expert_intermediate_size
        # 2 for each weight: of the up and down matrices and, in a gated expert, the gate's
        per_width = 2 * config.hidden_size * (config.expert_spec.halves + 1)
        return cls(
            num_expert_runs=(routed + shared) / config.moe_intermediate_size,
            flops=round(per_width * routed + 6 * config.hidden_size * shared),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeMatch:
    """A chain of C rounds of K experts beside one round of C*K; printed, it is two lines and the difference."""

    chain: ExpertCompute
    plain: ExpertCompute

    @property
    def ratio(self) -> float:
        """Expert operations of the chain over those of its counterpart."""
        return self.chain.flops / self.plain.flops

    def __str__(self) -> str:
        rows = [
            f"{name:<6} {compute.num_expert_runs:g} experts per token and layer, {compute.flops:,} expert operations"
            for name, compute in (("chain", self.chain), ("plain", self.plain))
        ]
        return "\n".join([*rows, f"       the chain computes {self.ratio - 1:+.1%}"])


def match_compute(config: ModelConfig) -> ComputeMatch:
    """Return what a chain of experts computes beside its plain counterpart, one round of C*K experts.

    The two differ by the shared expert, which a chain runs in every round unless chain.shared_expert = "once":
    with one shared expert, two rounds of 4 run 10 experts where one round of 8 runs 9: 11 % more.

    Raises ValueError if either model cannot be built.
    """
    num_experts_per_tok = config.chain.rounds * config.num_experts_per_tok
    plain = replace(config, chain=ChainConfig(), num_experts_per_tok=num_experts_per_tok)
    config.validate()
    plain.validate()
    return ComputeMatch(chain=ExpertCompute.of(config), plain=ExpertCompute.of(plain))


def _visible(window: int, sequence_length: int) -> float:
    """Return how many tokens the average token of a sequence sees."""
    seen = min(window or sequence_length, sequence_length)
    return seen - seen * seen / (2 * sequence_length)


def _active(config: ModelConfig, experts: int) -> int:
    """Return how many of all experts' parameters one token passes, each as often as a chain runs it."""
    return round(experts // config.num_experts * config.mean_experts_per_tok * config.chain.rounds) if experts else 0


def _parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = Model(config, groups=ParallelGroups.single())
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _part(name: str) -> str:
    """Return the field of ParameterCount that a parameter belongs to, by its state-dict name."""
    for piece, part in (
        ("embed_tokens.", "embedding"),
        ("lm_head.", "head"),
        (".attention.", "attention"),
        (".moe.router.", "router"),
        (".moe.experts.", "experts"),
        ("pools.", "experts"),
        (".moe.shared_expert.", "shared_expert"),
        (".feed_forward.", "feed_forward"),
    ):
        if piece in name:
            return part
    assert "norm." in name, name
    return "norm"
