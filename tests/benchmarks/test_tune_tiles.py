"""The tiles that the tuner tries: they fit, and the table can hold what it finds."""

import importlib
from pathlib import Path

import pytest

from moe_kernels import tiles


@pytest.mark.parametrize("block_m", [64, 128])
@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_candidates_fit_and_differ(monkeypatch, kernel, block_m):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    tune_tiles = importlib.import_module("tune_tiles")
    found = list(tune_tiles.candidates(kernel, block_m, use_tma=True))
    assert 8 <= len(found) == len(set(found))
    for tile in found:
        shared = tile.num_stages * tile.block_k * (tile.block_m + tile.block_n) * 2
        assert shared * tile.per_sm <= tune_tiles.SHARED, tile
        registers = tile.max_registers or tune_tiles.MOST_REGISTERS
        assert registers * 32 * tile.num_warps * tile.per_sm <= tune_tiles.REGISTERS, tile
        assert tile.block_m == block_m or kernel == "weight_bwd"
        assert tiles.Tile(**tune_tiles.compact(tile)) == tile
