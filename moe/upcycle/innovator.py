"""Innovator (arXiv 2507.18671): experts of disciplines beside the whole dense feed-forward, which keeps what it knew.

Branches are the dense model trained on one discipline each. The feed-forward of each is cut into G slices, the experts
e * G + g of which the router at first sees one row; the source's own feed-forward is the shared expert. With
alpha = `shared_share`, a token that chooses the group of branch e gets

    y = alpha FFN_source(x) + (1 - alpha) FFN_e(x)

At alpha = 1 that is the dense model to the last digit, and the experts have to be learned from nothing. The paper's
abstract gives the stages, its sizes give G = 8 and K = 8; initial scale and warm-up are ours. recipes/innovator.py runs
the stages.
"""

from typing import ClassVar

from moe.config import ModelConfig
from moe.convert import ConversionError
from moe.upcycle import METHODS, DenseLayer, Identity, LayerOf, UpcycleConfig
from moe.upcycle.branch_train_mix import BranchTrainMix
from moe.upcycle.fine_grained import check_slices
from moe.upcycle.ridge import FIT_OPTIONS, check_fit


class Innovator(BranchTrainMix):
    """Slices of the branches, and the source's feed-forward as shared expert."""

    options: ClassVar[tuple[str, ...]] = (*BranchTrainMix.options, "granularity", "router", *FIT_OPTIONS)
    training: ClassVar[str] = "a warm-up of the router, then all of it on a mixture (recipes/innovator.py)"
    min_branches: ClassVar[int] = 1

    def num_experts(self, config: UpcycleConfig) -> int:
        return len(config.branches) * config.granularity

    def has_shared_expert(self, config: UpcycleConfig) -> bool:
        return True

    def fits_router(self, config: UpcycleConfig) -> bool:
        return config.router == "ridge"

    def check(self, config: UpcycleConfig, dense: ModelConfig) -> None:
        super().check(config, dense)
        check_slices(config, dense, num_experts=self.num_experts(config))
        if self.fits_router(config):
            check_fit(config, dense)
        elif config.texts:
            raise ConversionError("--texts are for a fitted router; add --router ridge")

    def identity(self, config: UpcycleConfig) -> Identity:
        return "exact" if config.shared_share == 1 else "new"

    def expert(self, config: UpcycleConfig, layer_of: LayerOf, *, index: int, expert: int) -> DenseLayer:
        return layer_of(1 + expert // config.granularity).slice(expert % config.granularity, config.granularity)


METHODS.register("innovator")(Innovator())
