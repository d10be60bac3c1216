"""Branch-Train-MiX (arXiv 2403.07816): dense models trained apart from one parent become the experts of one MoE.

Branch b's feed-forwards are expert b. Everything else is the mean of the branches (`average_rest`), or the source's.
The router starts at random and is trained; the result computes what none of its parents did.
"""

from typing import ClassVar

from moe.config import ModelConfig
from moe.convert import ConversionError
from moe.upcycle import METHODS, DenseLayer, Identity, LayerOf, Method, UpcycleConfig


class BranchTrainMix(Method):
    """One expert of each branch."""

    options: ClassVar[tuple[str, ...]] = ("branches", "average_rest")
    training: ClassVar[str] = "a router that knows nothing mixes branches at random: train or fit it (ridge)"
    min_branches: ClassVar[int] = 2

    def num_experts(self, config: UpcycleConfig) -> int:
        return len(config.branches)

    def check(self, config: UpcycleConfig, dense: ModelConfig) -> None:
        if len(config.branches) < self.min_branches:
            raise ConversionError(
                f"--branches names {len(config.branches)} models; {config.method} needs at least {self.min_branches}, "
                "the dense models whose feed-forwards become experts"
            )
        if config.num_experts not in (0, self.num_experts(config)):
            raise ConversionError(
                f"--num-experts {config.num_experts}, but {len(config.branches)} branches give "
                f"{self.num_experts(config)} experts; leave it out"
            )

    def identity(self, config: UpcycleConfig) -> Identity:
        return "new"

    def expert(self, config: UpcycleConfig, layer_of: LayerOf, *, index: int, expert: int) -> DenseLayer:
        return layer_of(1 + expert)


METHODS.register("branch_train_mix")(BranchTrainMix())
