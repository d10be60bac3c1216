"""A run is a function of its recipe, not of its layout: free fp32 steps through the engine as users run it.

Tolerances: losses 1e-6, gradient norm 1e-5, counts equal. Rounding differs between layouts, and beyond about six
steps it may flip a top-k choice, from where two right runs part; so six steps. Without accumulation the rolling
balance is exact, so every layout here takes its whole share of the batch in one micro-batch.
"""

from pathlib import Path

import pytest

from runs import curve, small_recipe, train

LAYOUTS = [  # world, ep, ZeRO stage, activation checkpointing
    (1, 1, 0, False),
    (1, 1, 2, True),
    (2, 1, 0, False),
    (2, 2, 1, False),
    (2, 2, 0, True),
    (4, 2, 1, True),
    (4, 4, 2, False),
    (4, 1, 1, False),
]


@pytest.mark.parametrize(("world", "ep", "stage", "checkpointing"), LAYOUTS)
@pytest.mark.parametrize("packing", ["concatenate", "pad"])
def test_every_layout_gives_the_same_curve(pool, prepared_data, run_root, packing, world, ep, stage, checkpointing):
    reference = reference_curve(pool, prepared_data, packing)
    recipe = small_recipe(
        run_root,
        batch={"micro_sequences": 8 // world},
        data={"packing": packing},
        parallel={"ep_size": ep, "zero_stage": stage, "activation_checkpointing": checkpointing},
    )
    pool.run(train, recipe, world_size=world)
    assert_same(curve(recipe), reference)


_REFERENCES: dict[str, list] = {}


def reference_curve(pool, prepared_data: Path, packing: str) -> list:
    """One process, ZeRO 1, one micro-batch."""
    if packing not in _REFERENCES:
        root = prepared_data.parent / f"reference-{packing}"
        recipe = small_recipe(
            root,
            batch={"micro_sequences": 8},
            data={"packing": packing, "cache_dir": str(prepared_data)},
        )
        pool.run(train, recipe, world_size=1)
        _REFERENCES[packing] = curve(recipe)
    return _REFERENCES[packing]


def assert_same(rows: list[dict], reference: list[dict]) -> None:
    assert [row["step"] for row in rows] == [row["step"] for row in reference] == list(range(1, 7))
    for row, expected in zip(rows, reference, strict=True):
        for name, tolerance in (
            ("train/loss", 1e-6),
            ("train/lm_loss", 1e-6),
            ("train/load_balancing_loss", 1e-6),
            ("train/z_loss", 1e-5),
            ("train/grad_norm", 1e-5),
            ("moe/router_entropy", 1e-6),
        ):
            assert row[name] == pytest.approx(expected[name], rel=tolerance), (row["step"], name)
        # figures of counts: equal counts give equal figures
        for name in (
            "tokens",
            "moe/load_max_over_mean",
            "moe/load_cv",
            "moe/dead_expert_frac",
            "moe/experts_per_token",
        ):
            assert row[name] == expected[name], (row["step"], name)


def test_accumulation_changes_only_what_the_rolling_balance_sees(pool, prepared_data, run_root):
    """With the balance loss off, accumulation must not matter at all."""
    curves = []
    for micro in (2, 8):
        recipe = small_recipe(
            run_root, f"micro-{micro}", batch={"micro_sequences": micro}, balance={"coefficient": 0.0}
        )
        pool.run(train, recipe, world_size=1)
        curves.append(curve(recipe))
    assert_same(*curves)
