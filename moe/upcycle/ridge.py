"""DUME (arXiv 2603.29765): the experts of Branch-Train-MiX, and a router that is fitted instead of trained.

The router of each layer is the ridge regression from its inputs to the domain of the text (moe/upcycle/statistics.py),
divided by a temperature. With one expert per token every weight is exactly 1. The sums it was made of stay in the
model folder, so that `moe add-expert` can add a domain without the text of the others.

Departures from the released code: float64 instead of float32 sums, padding is left out, experts that are not chosen do
not run.
"""

from typing import ClassVar

from moe.config import ModelConfig
from moe.convert import ConversionError
from moe.upcycle import METHODS, UpcycleConfig
from moe.upcycle.branch_train_mix import BranchTrainMix

FIT_OPTIONS = ("texts", "text_tokens", "text_length", "penalty", "temperature", "router_bias", "cache_dir")


def check_fit(config: UpcycleConfig, dense: ModelConfig) -> None:
    """Raise ConversionError for what a router cannot be fitted with."""
    if len(config.texts) != len(config.branches):
        raise ConversionError(
            f"--texts names {len(config.texts)} texts for {len(config.branches)} branches; a fitted router needs the "
            "text of each branch's domain, in the same order"
        )
    for name in ("text_tokens", "text_length", "penalty", "temperature"):
        if getattr(config, name) <= 0:
            raise ConversionError(f"--{name.replace('_', '-')} {getattr(config, name)} must be positive")
    if config.text_length > dense.max_position_embeddings:
        raise ConversionError(
            f"--text-length {config.text_length} exceeds the {dense.max_position_embeddings} positions of the model"
        )
    if not config.norm_topk_prob or config.scoring_func != "softmax":
        raise ConversionError("a fitted router weighs the chosen experts by their softmax: leave --norm-topk-prob")


class Ridge(BranchTrainMix):
    """One expert of each branch, chosen by a fitted router."""

    options: ClassVar[tuple[str, ...]] = (*BranchTrainMix.options, *FIT_OPTIONS)
    training: ClassVar[str] = "nothing: the router is fitted to the texts; training it further may still help"

    def check(self, config: UpcycleConfig, dense: ModelConfig) -> None:
        super().check(config, dense)
        check_fit(config, dense)

    def fits_router(self, config: UpcycleConfig) -> bool:
        return True


METHODS.register("ridge")(Ridge())
