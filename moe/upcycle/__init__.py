"""Upcycling: dense checkpoints become an MoE whose experts come from their feed-forward layers.

One file per method, found through `METHODS`. A method says which model it makes, what it keeps of the function of the
dense one, and how the weights of one expert are made; moe.upcycle.run does the rest, tensor by tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from moe.config import ModelConfig
from moe.convert import ConversionError
from moe_kernels.registry import Registry

Identity = Literal["exact", "in the limit", "changed on purpose", "new"]


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """What is made of a dense model. Options that are not those of the method are refused."""

    method: str = "copy"
    """copy: every expert is the dense feed-forward. fine_grained: experts are slices of it. drop: copies of which a
    part is drawn anew. branch_train_mix: one expert of each branch. ridge: the same, with a router fitted to texts
    instead of trained. innovator: slices of the branches beside the whole dense feed-forward."""
    num_experts: int = 0
    """0 makes 8, or as many as the branches give."""
    top_k: int = 2
    every: int = 1
    """Every so many layers becomes MoE; the others stay dense."""
    shared_expert: bool = False
    """Keep the dense feed-forward beside the routed experts."""
    shared_share: float = 0.5
    """What a shared expert contributes; the routed experts contribute the rest to one."""
    norm_topk_prob: bool = True
    """Weights of a token sum to one, which keeps the function whatever the router."""
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    scale_on: Literal["down_proj", "routed_scaling_factor"] = "down_proj"
    """Where the factor goes that makes up for what routing takes off; not all formats have the second."""
    router_std: float = 0.02
    seed: int = 0
    granularity: int = 1
    """fine_grained, innovator: how many experts a feed-forward is cut into."""
    noise_std: float = 0.0
    """copy: of noise on half of each expert's weights, relative to their own deviation; it tells experts apart."""
    drop_ratio: float = 0.5
    """drop: share of each expert's neurons that is drawn anew."""
    branches: tuple[str, ...] = ()
    """branch_train_mix, ridge, innovator: dense models trained on from one parent, folders as the source may be."""
    average_rest: bool = True
    """branch_train_mix, ridge, innovator: attention, norms and embeddings are the branches' mean, not the source's."""
    router: Literal["random", "ridge"] = "random"
    """innovator: ridge fits the router to texts, as method ridge does."""
    texts: tuple[str, ...] = ()
    """Fitted routers: text of each branch's domain, in the order of branches; files, folders or builtin:python."""
    text_tokens: int = 200_000
    """Fitted routers: tokens to read of each text."""
    text_length: int = 256
    """Fitted routers: tokens of one sequence."""
    penalty: float = 1e-2
    """Fitted routers: lambda of the ridge regression."""
    temperature: float = 0.1
    """Fitted routers: what logits are divided by; they lie below 1, so at 1 a softmax over them is nearly even."""
    router_bias: bool = True
    """Fitted routers: with a bias, as in the paper; most architectures of transformers have none."""
    cache_dir: str = "data"
    """Fitted routers: folder for tokenised text."""


@dataclass(frozen=True, kw_only=True)
class AddExpertConfig:
    """How the text of the new domain is read; the penalty and the temperature are those of the model."""

    text: str
    """Text of the new expert's domain: a file, a folder or builtin:python and the like."""
    text_tokens: int = 200_000
    text_length: int = 256
    cache_dir: str = "data"


@dataclass(frozen=True, kw_only=True)
class DenseLayer:
    """The feed-forward of one layer, float32: gate and up [F, D], down [D, F]."""

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor

    def slice(self, number: int, num_slices: int) -> "DenseLayer":
        """Return one of equal slices of the hidden neurons; the slices' outputs add up to the whole's."""
        F = self.gate_FD.shape[0] // num_slices
        rows = slice(number * F, (number + 1) * F)
        return DenseLayer(gate_FD=self.gate_FD[rows], up_FD=self.up_FD[rows], down_DF=self.down_DF[:, rows])


LayerOf = Callable[[int], DenseLayer]  # 0: of the source, 1 + b: of branch b


class Method:
    """One way to make experts. `options` are the fields of UpcycleConfig that belong to it alone."""

    options: ClassVar[tuple[str, ...]] = ()
    training: ClassVar[str]  # what the result needs before it is better than what it came from

    def num_experts(self, config: UpcycleConfig) -> int:
        """Return the number of experts of each layer."""
        return config.num_experts or 8

    def has_shared_expert(self, config: UpcycleConfig) -> bool:
        """Return whether the source's feed-forward stays as a shared expert."""
        return config.shared_expert

    def fits_router(self, config: UpcycleConfig) -> bool:
        """Return whether the router is fitted to texts; expert e then belongs to text e // granularity."""
        return False

    def check(self, config: UpcycleConfig, dense: ModelConfig) -> None:
        """Raise ConversionError for options that do not go with the method or the dense model."""

    def identity(self, config: UpcycleConfig) -> Identity:
        """Return what the new model keeps of the function of the dense one."""
        raise NotImplementedError

    def expert(self, config: UpcycleConfig, layer_of: LayerOf, *, index: int, expert: int) -> DenseLayer:
        """Return the weights of one expert of layer `index`, before the factor."""
        raise NotImplementedError


METHODS: Registry[Method] = Registry("upcycling method", package=__name__)


def check_own_options(config: UpcycleConfig) -> None:
    """Raise ConversionError for an option that belongs to another method than the chosen one."""
    if config.method not in METHODS:
        raise ConversionError(f"--method {config.method!r} is unknown; known are {', '.join(METHODS)}")
    own, default = METHODS[config.method].options, UpcycleConfig()
    owners: dict[str, list[str]] = {}
    for name in METHODS:
        for option in METHODS[name].options:
            owners.setdefault(option, []).append(name)
    for option, names in owners.items():
        value = getattr(config, option)
        if option not in own and value != getattr(default, option):
            flag = f"--{option.replace('_', '-')} {value}"
            raise ConversionError(f"{flag} belongs to method {' and '.join(names)}, not {config.method}")
