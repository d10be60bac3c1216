"""How many parameters a model has and uses per token, and what a token costs.

Counted on the meta device from the module itself, so nothing is allocated and no formula can drift from the
model.
"""

from dataclasses import dataclass
from math import prod

import torch

from moe.model import Model, ModelConfig
from moe.parallel.groups import ParallelGroups


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCount:
    """Parameters of a whole model (all ranks together). `total` is the sum of the parts below it.

    `active` is what one token passes: num_experts_per_tok experts of each MoE layer and everything else. It
    includes the embedding table and the head in full, as published figures do; `active - embedding` leaves
    the table out.
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
    return ParameterCount(total=total, active=total - parts["experts"] + _active(config, parts["experts"]), **parts)


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Return floating-point operations of one token's forward pass, the mean over a sequence of
    `sequence_length`.

    Every active weight matrix costs 2 per element (one multiplication, one addition), the head included, the
    embedding table (a look-up) excluded. Attention costs 4*H*d per layer and visible token: scores and
    values; causality makes half of the sequence visible. Norms, activations, softmax and biases are not
    counted. Training costs three times as much (backward counts double), four times with activation
    checkpointing.

    Raises ValueError if the configuration is invalid.
    """
    matrices, experts = 0, 0
    for name, shape in _parameter_shapes(config).items():
        if _part(name) == "experts":
            experts += prod(shape)
        elif len(shape) > 1 and (_part(name) != "embedding" or config.tie_word_embeddings):
            matrices += prod(shape)
    attention_width = config.num_hidden_layers * config.num_attention_heads * config.attention_head_dim
    return 2 * (matrices + _active(config, experts)) + 2 * attention_width * sequence_length


def _active(config: ModelConfig, experts: int) -> int:
    """Return the share of all experts' parameters that one token passes."""
    return experts // config.num_experts * config.num_experts_per_tok if experts else 0


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
        (".moe.shared_expert.", "shared_expert"),
        (".feed_forward.", "feed_forward"),
    ):
        if piece in name:
            return part
    assert "norm." in name, name
    return "norm"
