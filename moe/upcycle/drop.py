"""Drop-Upcycling (arXiv 2502.19261): copies of which a share of the neurons is drawn anew, so that experts differ.

The same neurons in all three matrices, drawn for each expert; what replaces them has the mean and deviation of what it
replaces. The released code draws indices anew for every matrix, which leaves (1 - r)^3 of the neurons whole instead of
1 - r; the paper's text is followed here.
"""

from typing import ClassVar

import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.convert import ConversionError
from moe.initial import draw, generator
from moe.upcycle import METHODS, DenseLayer, Identity, LayerOf, Method, UpcycleConfig


class Drop(Method):
    """Copies in which `drop_ratio` of the neurons is new."""

    options: ClassVar[tuple[str, ...]] = ("drop_ratio",)
    training: ClassVar[str] = "the loss jumps at first and is made up for over many tokens: plan a long training"

    def check(self, config: UpcycleConfig, dense: ModelConfig) -> None:
        if not 0 <= config.drop_ratio <= 1:
            raise ConversionError(f"--drop-ratio {config.drop_ratio} must lie in [0, 1]")

    def identity(self, config: UpcycleConfig) -> Identity:
        if config.drop_ratio:
            return "changed on purpose"
        return "exact" if config.norm_topk_prob else "in the limit"

    def expert(self, config: UpcycleConfig, layer_of: LayerOf, *, index: int, expert: int) -> DenseLayer:
        layer = layer_of(0)
        F, key = layer.gate_FD.shape[0], f"{config.seed}/drop/{index}/{expert}"
        neuron_n = torch.from_numpy(generator(key).permutation(F)[: int(config.drop_ratio * F)])
        return DenseLayer(
            gate_FD=_redrawn(layer.gate_FD, neuron_n, f"{key}/gate"),
            up_FD=_redrawn(layer.up_FD, neuron_n, f"{key}/up"),
            down_DF=_redrawn(layer.down_DF.t(), neuron_n, f"{key}/down").t(),
        )


def _redrawn(weight_FD: Tensor, neuron_n: Tensor, key: str) -> Tensor:
    if not len(neuron_n):
        return weight_FD
    replaced = weight_FD[neuron_n]
    new = draw(replaced.shape, key) * replaced.std() + replaced.mean()
    return weight_FD.index_copy(0, neuron_n, new)


METHODS.register("drop")(Drop())
