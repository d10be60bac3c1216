"""Small models for tests: one with every kind of part, and weights that leave none unused."""

from typing import Any

import torch
from torch import Tensor

from moe.model import Model, ModelConfig
from moe.parallel.groups import ParallelGroups
from moe.routers.topk import TopKConfig


def tiny_config(**changes: Any) -> ModelConfig:
    """A dense layer among MoE layers, grouped heads, a shared expert; widths that are no powers of two."""
    fields: dict[str, Any] = {
        "vocab_size": 37,
        "hidden_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 14,
        "intermediate_size": 22,
        "mlp_only_layers": (1,),
        "shared_expert_intermediate_size": 10,
        "router": TopKConfig(norm_topk_prob=True),
    }
    return ModelConfig(**{**fields, **changes})


def tiny_model(
    config: ModelConfig | None = None, *, dtype: torch.dtype = torch.float32, seed: int = 0, **arguments: Any
) -> Model:
    """A model whose every parameter is random, norms and biases too, so that a part left out shows."""
    model = Model(config or tiny_config(), groups=ParallelGroups.single(), backend="naive", **arguments).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_(1 + 0.2 * noise if name.endswith("norm.weight") else 0.3 * noise)
    return model


def tiny_tokens(*shape: int, vocab_size: int = 37, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """RMS of the difference over RMS of the expected values."""
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).norm()
    assert difference <= tolerance * expected.double().norm(), f"{difference / expected.double().norm():.2e}"
