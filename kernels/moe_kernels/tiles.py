"""Tiles: how each kernel cuts its work, by kind of GPU, element size and mean rows per expert. A table, no autotuning.

The table is tiles.json; benchmarks/tune_tiles.py rewrites entries of it and notes what it measured in `seen`.
All kernels of one entry share block_m, so that one schedule of row tiles serves a whole layer.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).parent / "tiles.json"
KERNELS = ("up", "matmul", "down_bwd", "weight_bwd")
SAFE = ("safe_wide", "safe")  # they compile for every GPU; float32 and everything narrower


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """The shape of one kernel's tile and how it is run.

    block_n counts columns of the product, gate and up columns alike; for weight_bwd, block_m and block_n are the
    sides of a tile of the weight and block_k the rows it takes at a time. sub_tiles: into how many pieces of its
    columns the epilogue is cut: 1, 2, 4 or 8. per_sm: programs per multiprocessor. max_registers: of a thread, where
    the compiler would take more and so keep a second program off the multiprocessor; 0 leaves it to the compiler.
    flatten: whether the loads of a program's next tile begin while this one is stored; for weight_bwd, which is then
    run by as many programs as fit, without it by one program a tile.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    use_tma: bool = False
    flatten: bool = False
    sub_tiles: int = 1
    per_sm: int = 1
    max_registers: int = 0

    def launch_options(self) -> dict[str, int]:
        """Return what the compiler is told of this tile."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | {"maxnreg": self.max_registers} if self.max_registers else options


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line of the table: the tiles of all kernels for one kind of device, element size and load.

    itemsize: bytes of an element of the tokens; 0 for any. max_mean_rows: the entry serves layers with at most so many
    rows per expert on average. seen: where and when it was measured, and what came out; "unmeasured" where it was
    only compiled and inspected.
    """

    name: str
    arch: str
    itemsize: int
    max_mean_rows: float
    seen: str
    tiles: dict[str, Tile]

    @property
    def block_m(self) -> int:
        return self.tiles["up"].block_m


@functools.cache
def table() -> dict[str, Entry]:
    """Return the entries of tiles.json by name, in file order. Raises ValueError if one contradicts itself."""
    entries = [_entry(raw) for raw in json.loads(TABLE.read_text())]
    return {entry.name: entry for entry in entries}


def _entry(raw: dict[str, Any]) -> Entry:
    tiles = {kernel: Tile(**fields) for kernel, fields in raw.pop("tiles").items()}
    raw["max_mean_rows"] = float(raw["max_mean_rows"])
    entry = Entry(**raw, tiles=tiles)
    if set(tiles) != set(KERNELS):
        raise ValueError(f"tiles {entry.name!r} has entries for {sorted(tiles)}, not {sorted(KERNELS)}")
    heights = {tile.block_m for kernel, tile in tiles.items() if kernel != "weight_bwd"}
    if len(heights) > 1:
        raise ValueError(f"tiles {entry.name!r} has row tiles of {sorted(heights)} rows; one schedule needs one height")
    return entry


# torch.compile looks through functools.cache and cannot read a file: it takes what these return as it is
@torch.compiler.assume_constant_result
def block_m_of(name: str) -> int:
    """Return how many rows a row tile has in the entry of that name."""
    return table()[name].block_m


@torch.compiler.assume_constant_result
def _loads(arch: str, itemsize: int) -> tuple[tuple[float, str], ...]:
    """Return (max_mean_rows, name) of the entries for a device and an element size, in file order."""
    entries = [e for e in table().values() if e.arch in (arch, "any") and e.itemsize in (0, itemsize)]
    return tuple((entry.max_mean_rows, entry.name) for entry in entries)


def choose(*, arch: str, itemsize: int, num_rows: int, num_experts: int) -> str:
    """Return the name of the entry for a layer: the first for this arch, or for any, that is made for its load.

    Args:
        arch: "sm_90", "gfx942", ..., or "interpreter".
        itemsize: bytes of one element of the tokens.
        num_rows: rows there are at most; the mean over experts decides, as the loads are not known on the host.
    """
    mean_rows = num_rows / num_experts
    for max_mean_rows, name in _loads(arch, itemsize):
        if mean_rows <= max_mean_rows:
            return name
    raise AssertionError("the last entry is for any layer")


def dump(rows: list[dict[str, Any]]) -> str:
    """Return rows of the table as the text of tiles.json: one line per kernel."""
    blocks = []
    for row in rows:
        head = json.dumps({key: value for key, value in row.items() if key != "tiles"})[:-1]
        tiles = ",\n".join(f'    "{kernel}": {json.dumps(tile)}' for kernel, tile in row["tiles"].items())
        blocks.append(f'  {head}, "tiles": {{\n{tiles}}}}}')
    return "[\n" + ",\n".join(blocks) + "\n]\n"
