"""Sparse upcycling (arXiv 2212.05055): every expert is a copy of the dense feed-forward.

With normalised weights the copies' answers, all equal, are averaged: the function is kept whatever the router chooses.
`noise_std` adds noise to half of each expert's weights, which gives that up and lets experts part sooner.
"""

from typing import ClassVar

from moe.config import ModelConfig
from moe.convert import ConversionError
from moe.initial import draw, generator
from moe.upcycle import METHODS, DenseLayer, Identity, LayerOf, Method, UpcycleConfig


class Copy(Method):
    """Copies, with or without noise."""

    options: ClassVar[tuple[str, ...]] = ("noise_std",)
    training: ClassVar[str] = "experts are equal until they are trained on, and a router that knows nothing chooses"

    def check(self, config: UpcycleConfig, dense: ModelConfig) -> None:
        if config.noise_std < 0:
            raise ConversionError(f"--noise-std {config.noise_std} must not be negative")

    def identity(self, config: UpcycleConfig) -> Identity:
        if config.noise_std:
            return "changed on purpose"
        return "exact" if config.norm_topk_prob else "in the limit"

    def expert(self, config: UpcycleConfig, layer_of: LayerOf, *, index: int, expert: int) -> DenseLayer:
        layer = layer_of(0)
        if not config.noise_std:
            return layer
        noisy = {}
        for name in ("gate_FD", "up_FD", "down_DF"):
            weight, key = getattr(layer, name), f"{config.seed}/noise/{index}/{expert}/{name}"
            noise = config.noise_std * weight.std() * draw(weight.shape, key)
            noise.flatten()[generator(f"{key}/half").permutation(weight.numel())[: weight.numel() // 2]] = 0.0
            noisy[name] = weight + noise
        return DenseLayer(**noisy)


METHODS.register("copy")(Copy())
