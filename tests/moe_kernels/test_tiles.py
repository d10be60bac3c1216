"""The table of tiles: whole, consistent, chosen by rule, and written back as it was."""

import json

import pytest

from moe_kernels.tiles import KERNELS, SAFE, TABLE, choose, dump, table


def test_every_entry_holds_every_kernel_and_one_height_of_row_tiles():
    for entry in table().values():
        assert set(entry.tiles) == set(KERNELS)
        assert {tile.block_m for kernel, tile in entry.tiles.items() if kernel != "weight_bwd"} == {entry.block_m}
        assert entry.seen


def test_names_are_unique_and_the_safe_entries_come_last():
    names = [row["name"] for row in json.loads(TABLE.read_text())]
    assert len(set(names)) == len(names)
    assert tuple(names[-2:]) == SAFE


@pytest.mark.parametrize(
    ("arch", "itemsize", "rows", "name"),
    [
        ("sm_90", 2, 64 * 384, "sm_90_small"),
        ("sm_90", 2, 64 * 384 + 1, "sm_90_large"),
        ("sm_100", 2, 10**7, "sm_100_large"),
        ("sm_80", 2, 0, "sm_80_small"),
        ("gfx942", 2, 10**6, "gfx942_large"),
        ("sm_90", 4, 10**6, "safe_wide"),
        ("sm_89", 2, 10**6, "safe"),
        ("gfx90a", 2, 100, "safe"),
        ("interpreter", 8, 100, "interpreter"),
    ],
)
def test_an_entry_is_chosen_by_device_element_size_and_mean_load(arch, itemsize, rows, name):
    assert choose(arch=arch, itemsize=itemsize, num_rows=rows, num_experts=64) == name


def test_the_table_is_written_as_it_is_read():
    text = TABLE.read_text()
    assert dump(json.loads(text)) == text


def test_an_entry_that_contradicts_itself_is_refused(monkeypatch, tmp_path):
    rows = json.loads(TABLE.read_text())
    rows[0]["tiles"]["matmul"]["block_m"] *= 2
    (tmp_path / "tiles.json").write_text(json.dumps(rows))
    monkeypatch.setattr("moe_kernels.tiles.TABLE", tmp_path / "tiles.json")
    with pytest.raises(ValueError, match="one schedule needs one height"):
        table.__wrapped__()
