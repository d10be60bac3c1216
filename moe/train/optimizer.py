"""Optimizer settings, which parameters train at all, and which of them decay."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101). Decay applies to matrices; norms, biases and embeddings are left alone."""

    __pydantic_config__ = {"extra": "forbid"}

    learning_rate: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0  # 0 = no clipping
    trainable: tuple[str, ...] = ()
    """Patterns of parameter names, such as '*.router.*'; all others stay as they start. Empty trains all."""

    def validate(self) -> None:
        """Raise ValueError with the field that cannot be used."""
        if self.learning_rate <= 0:
            raise ValueError(f"optimizer.learning_rate = {self.learning_rate} must be positive")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} = {getattr(self, name)} must lie in [0, 1)")
        for name in ("weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} = {getattr(self, name)} must not be negative")
        if self.eps <= 0:
            raise ValueError(f"optimizer.eps = {self.eps} must be positive")

    def trains(self, name: str) -> bool:
        """Return whether the parameter of that name is trained."""
        return not self.trainable or any(fnmatchcase(name, pattern) for pattern in self.trainable)


def freeze(model: nn.Module, config: OptimizerConfig) -> None:
    """Leave what is not trained without a gradient, and so without moments and out of every reduction.

    Raises ValueError for a pattern that names no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in config.trainable:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"optimizer.trainable names {pattern!r}, which no parameter of the model is called; there are "
                f"{', '.join(sorted({_generic(name) for name in names}))}"
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and config.trains(name))


def _generic(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW groups, each with the `name` that DeepSpeed asks for: matrices decay, the rest does not."""
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # biases of experts are stacked, so they have two dimensions and are none the less biases
            is_matrix = parameter.dim() >= 2 and not name.startswith("embed_tokens") and not name.endswith("bias")
            (decay if is_matrix else no_decay).append(parameter)
    groups = [
        {"params": decay, "weight_decay": weight_decay, "name": "decay"},
        {"params": no_decay, "weight_decay": 0.0, "name": "no_decay"},
    ]
    return [group for group in groups if group["params"]]
