"""A run is a function of its recipe, not of its layout: the debug recipe launched as users launch it, in float32.

Every launch is compared with the plain torch loop of plain_loop.py, on the same text: losses to 1e-6, gradient norm to
1e-5, expert counts equal. Rounding differs between layouts, and beyond about six steps it may flip a top-k choice, from
where two right runs part; so six steps. test_layout_matrix.py goes further, in float64 and with choices replayed.
"""

from pathlib import Path

import pytest

from layout_runs import LIMITS, launched_recipe, launched_reference, run_launched
from layouts import Layout, all_layouts, covering_set
from runs import curve


@pytest.mark.parametrize("layout", covering_set(all_layouts()), ids=str)
def test_every_layout_gives_the_curve_of_the_plain_loop(pool, prepared_data, tmp_path, layout):
    part, result = run_launched(pool, layout, root=tmp_path, data_dir=prepared_data)
    assert not result.over(LIMITS[part])
    assert_logged(tmp_path, layout, prepared_data)


def assert_logged(root: Path, layout: Layout, data_dir: Path) -> None:
    """The rows of metrics.jsonl say what the steps gave."""
    rows = curve(launched_recipe(root, layout, data_dir=data_dir))
    expected = launched_reference(data_dir, layout.is_padded, "exact").rows
    assert [row["step"] for row in rows] == list(range(1, len(expected) + 1))
    for row, plain in zip(rows, expected, strict=True):
        assert row["train/loss"] == pytest.approx(plain.loss, rel=1e-6)
        assert row["train/lm_loss"] == pytest.approx(plain.lm_loss, rel=1e-6)
        assert row["train/load_balancing_loss"] == pytest.approx(plain.load_balancing_loss, rel=1e-6)
        assert row["train/z_loss"] == pytest.approx(plain.z_loss, rel=1e-5)
        assert row["train/grad_norm"] == pytest.approx(plain.grad_norm, rel=1e-5)
        means = [sum(count) / len(count) for count in plain.tokens_per_expert]
        highest = [max(count) / mean for count, mean in zip(plain.tokens_per_expert, means, strict=True)]
        assert row["moe/load_max_over_mean"] == pytest.approx(sum(highest) / len(highest), rel=1e-12)
        assert row["moe/experts_per_token"] == 2.0


@pytest.mark.parametrize(
    "layout",
    [
        Layout(world=(1, 1), stage=1, micro=2, is_checkpointed=False, is_padded=False),
        Layout(world=(2, 2), stage=0, micro=1, is_checkpointed=True, is_padded=True),
        Layout(world=(4, 2), stage=2, micro=1, is_checkpointed=False, is_padded=True),
    ],
    ids=str,
)
def test_sequence_wise_balance_does_not_depend_on_the_layout(pool, prepared_data, tmp_path, layout):
    part, result = run_launched(pool, layout, root=tmp_path, data_dir=prepared_data, scope="sequence")
    assert not result.over(LIMITS[part])


@pytest.mark.parametrize("scope", ["ranks", "global"])
def test_without_accumulation_the_other_scopes_over_ranks_are_exact(pool, prepared_data, tmp_path, scope):
    layout = Layout(world=(4, 2), stage=1, micro=2, is_checkpointed=True, is_padded=True)
    part, result = run_launched(pool, layout, root=tmp_path, data_dir=prepared_data, scope=scope)
    assert not result.over(LIMITS[part])
