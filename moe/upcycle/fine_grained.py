"""Fine-grained upcycling by virtual groups (arXiv 2410.07524): experts are slices of the dense feed-forward.

A feed-forward is cut into G slices of its hidden neurons, which add up to it. N experts are N / G groups of all G
slices, expert e * G + g is slice g of group e, and the router has the same row for all slices of a group. A token that
chooses K = m G experts so chooses m whole groups, and the function is kept, up to the factor that moe.upcycle.run works
out.
"""

from typing import ClassVar

from moe.config import ModelConfig
from moe.convert import ConversionError
from moe.upcycle import METHODS, DenseLayer, Identity, Method, UpcycleConfig


class FineGrained(Method):
    """Slices in virtual groups."""

    options: ClassVar[tuple[str, ...]] = ("granularity",)
    training: ClassVar[str] = "slices of a group stay together until training parts their router rows"

    def check(self, config: UpcycleConfig, dense: ModelConfig) -> None:
        G = config.granularity
        if G < 2:
            raise ConversionError(f"--granularity {G} must be at least 2; whole feed-forwards are method copy")
        for name, value in (
            ("intermediate_size", dense.intermediate_size),
            ("--num-experts", config.num_experts),
            ("--top-k", config.top_k),
        ):
            if value % G:
                raise ConversionError(
                    f"--granularity {G} does not divide {name} = {value}: a token would get some slices of a "
                    "feed-forward and not others, which is another function"
                )

    def identity(self, config: UpcycleConfig) -> Identity:
        return "exact" if config.norm_topk_prob else "in the limit"

    def expert(self, config: UpcycleConfig, layer: DenseLayer, *, index: int, expert: int) -> DenseLayer:
        F = layer.gate_FD.shape[0] // config.granularity
        rows = slice(expert % config.granularity * F, (expert % config.granularity + 1) * F)
        return DenseLayer(gate_FD=layer.gate_FD[rows], up_FD=layer.up_FD[rows], down_DF=layer.down_DF[:, rows])


METHODS.register("fine_grained")(FineGrained())
