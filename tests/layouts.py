"""Layouts: where a run is computed. All of those the layout matrix knows, and few of them that meet every pair.

A bug of layouts mostly takes two settings to show (ZeRO 2 with expert parallelism, padding under accumulation), so the
test suite runs a set in which every two settings meet, and benchmarks/layout_matrix.py runs the product.
"""

from dataclasses import astuple, dataclass, fields
from itertools import combinations, product
from typing import Any

WORLDS = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))  # ranks, expert-parallel size
STAGES = (0, 1, 2)
MICRO_SEQUENCES = (1, 2)  # of the 8 of a batch; the second takes 4 ranks' whole share at once: no accumulation


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to compute a run; `is_padded` is of the data, and meets every layout."""

    world: tuple[int, int]  # ranks, expert-parallel size
    stage: int
    micro: int  # sequences of a micro-batch
    is_checkpointed: bool
    is_padded: bool

    def __str__(self) -> str:
        words = [f"world{self.world[0]}", f"ep{self.world[1]}", f"zero{self.stage}", f"micro{self.micro}"]
        return "-".join(words + ["checkpointed"] * self.is_checkpointed + ["padded"] * self.is_padded)


def all_layouts(stages: tuple[int, ...] = STAGES) -> list[Layout]:
    """Return the full product."""
    return [
        Layout(world=world, stage=stage, micro=micro, is_checkpointed=is_checkpointed, is_padded=is_padded)
        for world, stage, micro, is_checkpointed, is_padded in product(
            WORLDS, stages, MICRO_SEQUENCES, (False, True), (False, True)
        )
    ]


def combinations_of(layout: Layout, size: int) -> set[tuple[Any, ...]]:
    """Return every `size` settings of a layout together, each setting as (field, value)."""
    settings = zip((field.name for field in fields(layout)), astuple(layout), strict=True)
    return set(combinations(settings, size))


def covering_set(layouts: list[Layout]) -> list[Layout]:
    """Return a part of `layouts` in which every pair of settings of the whole occurs.

    Greedy: the layout with the most pairs not met yet comes next; on a tie the one with the most new triples, then the
    earlier one. So the set is always the same, little larger than it must be, and not all alike at its end.
    """
    pairs = set().union(*(combinations_of(layout, 2) for layout in layouts))
    triples: set[tuple[Any, ...]] = set()
    chosen: list[Layout] = []

    def news(layout: Layout) -> tuple[int, int]:
        return len(combinations_of(layout, 2) & pairs), len(combinations_of(layout, 3) - triples)

    while pairs:
        best = max(layouts, key=news)
        chosen.append(best)
        pairs -= combinations_of(best, 2)
        triples |= combinations_of(best, 3)
    return chosen
