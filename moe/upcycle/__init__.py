"""Upcycling: a dense checkpoint becomes an MoE whose experts come from its feed-forward layers.

One file per method, found through `METHODS`. A method says which model it makes, what it keeps of the function of the
dense one, and how the weights of one layer are made; moe.upcycle.run does the rest, tensor by tensor.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from moe.config import ModelConfig
from moe.convert import ConversionError
from moe_kernels.registry import Registry

Identity = Literal["exact", "in the limit", "changed on purpose"]


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """What is made of a dense model. Options that are not those of the method are refused."""

    method: str = "copy"
    """copy: every expert is the dense feed-forward. fine_grained: experts are slices of it. drop: copies of which a
    part is drawn anew."""
    num_experts: int = 8
    top_k: int = 2
    every: int = 1
    """Every so many layers becomes MoE; the others stay dense."""
    shared_expert: bool = False
    """Keep the dense feed-forward beside the routed experts, each contributing half."""
    norm_topk_prob: bool = True
    """Weights of a token sum to one, which keeps the function whatever the router."""
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    scale_on: Literal["down_proj", "routed_scaling_factor"] = "down_proj"
    """Where the factor goes that makes up for what routing takes off; not all formats have the second."""
    router_std: float = 0.02
    seed: int = 0
    granularity: int = 1
    """fine_grained: how many experts a feed-forward is cut into."""
    noise_std: float = 0.0
    """copy: of noise on half of each expert's weights, relative to their own deviation; it tells experts apart."""
    drop_ratio: float = 0.5
    """drop: share of each expert's neurons that is drawn anew."""


@dataclass(frozen=True, kw_only=True)
class DenseLayer:
    """The feed-forward of one layer, float32: gate and up [F, D], down [D, F]."""

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor


class Method:
    """One way to make experts. `options` are the fields of UpcycleConfig that belong to it alone."""

    options: ClassVar[tuple[str, ...]] = ()
    training: ClassVar[str]  # what the result needs before it is better than what it came from

    def check(self, config: UpcycleConfig, dense: ModelConfig) -> None:
        """Raise ConversionError for options that do not go with the method or the dense model."""

    def identity(self, config: UpcycleConfig) -> Identity:
        """Return what the new model keeps of the function of the dense one."""
        raise NotImplementedError

    def expert(self, config: UpcycleConfig, layer: DenseLayer, *, index: int, expert: int) -> DenseLayer:
        """Return the weights of one expert of layer `index`, before the factor."""
        raise NotImplementedError


METHODS: Registry[Method] = Registry("upcycling method", package=__name__)


def check_own_options(config: UpcycleConfig) -> None:
    """Raise ConversionError for an option that belongs to another method than the chosen one."""
    if config.method not in METHODS:
        raise ConversionError(f"--method {config.method!r} is unknown; known are {', '.join(METHODS)}")
    own, default = METHODS[config.method].options, UpcycleConfig()
    others = {option: name for name in METHODS for option in METHODS[name].options if option not in own}
    for option, name in others.items():
        value = getattr(config, option)
        if value != getattr(default, option):
            flag = f"--{option.replace('_', '-')} {value}"
            raise ConversionError(f"{flag} belongs to method {name}, not {config.method}")
