"""Fine-grained upcycling by virtual groups (arXiv 2410.07524): experts are slices of the dense feed-forward.

A feed-forward is cut into G slices of its hidden neurons, which add up to it. N experts are N / G groups of all G
slices, expert e * G + g is slice g of group e, and the router has the same row for all slices of a group. A token that
chooses K = m G experts so chooses m whole groups, and the function is kept, up to the factor that moe.upcycle.run works
out.
"""

from typing import ClassVar

from moe.config import ModelConfig
from moe.convert import ConversionError
from moe.upcycle import METHODS, DenseLayer, Identity, LayerOf, Method, UpcycleConfig


def check_slices(config: UpcycleConfig, dense: ModelConfig, *, num_experts: int) -> None:
    """Raise ConversionError unless a token can choose whole groups of slices only."""
    G = config.granularity
    if G < 1:
        raise ConversionError(f"--granularity {G} must be at least 1")
    for name, value in (
        ("intermediate_size", dense.intermediate_size),
        ("--num-experts", num_experts),
        ("--top-k", config.top_k),
    ):
        if value % G:
            raise ConversionError(
                f"--granularity {G} does not divide {name} = {value}: a token would get some slices of a feed-forward "
                "and not others, which is another function"
            )


class FineGrained(Method):
    """Slices in virtual groups."""

    options: ClassVar[tuple[str, ...]] = ("granularity",)
    training: ClassVar[str] = "slices of a group stay together until training parts their router rows"

    def check(self, config: UpcycleConfig, dense: ModelConfig) -> None:
        G = config.granularity
        if G < 2:
            raise ConversionError(f"--granularity {G} must be at least 2; whole feed-forwards are method copy")
        check_slices(config, dense, num_experts=self.num_experts(config))

    def identity(self, config: UpcycleConfig) -> Identity:
        return "exact" if config.norm_topk_prob else "in the limit"

    def expert(self, config: UpcycleConfig, layer_of: LayerOf, *, index: int, expert: int) -> DenseLayer:
        return layer_of(0).slice(expert % config.granularity, config.granularity)


METHODS.register("fine_grained")(FineGrained())
