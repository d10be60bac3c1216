"""Pictures: the heat maps of a run as PNG files. The one place that imports matplotlib; needs no display.

A cell shows an expert's share of the rows over the uniform share 1/E, on a logarithmic scale: white at 1, red above,
blue below, a cross where not a single row went. Letter D counts domains, R the rows of one map.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from moe.inspect.heat_map import relative_load

_DPI = 120
_COLOURS = colormaps["RdBu_r"].with_extremes(bad="0.8")  # grey for a domain or a layer without rows
_NUMBERED_INCHES = 0.36  # a cell this wide has room for its number
_LEGEND = "white = an equal share of the layer's rows, x = no row at all"


def load_heat_map(counts_LE: Tensor, path: Path, *, layers: Sequence[int | str]) -> None:
    """Write a PNG of how the rows of each layer are spread over its experts; `layers` names the rows of the counts."""
    ratio_LE = relative_load(counts_LE).numpy()
    L, E = ratio_LE.shape
    cell, reach = _cell_inches(E), _reach(ratio_LE)
    figure = Figure(figsize=(E * cell + 2.5, max(2.6, L * 0.34 + 1.4)), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    _draw(axes, ratio_LE, reach, [str(layer) for layer in layers], cell)
    axes.set(ylabel="layer", xlabel="expert")
    _finish(figure, "How busy each expert is", reach, path)


def domain_heat_map(counts_DLE: Tensor, names: Sequence[str], path: Path, *, layers: Sequence[int | str]) -> None:
    """Write a PNG with one panel per layer: how the rows of each domain are spread over the layer's experts."""
    ratio_DLE = relative_load(counts_DLE).numpy()
    D, L, E = ratio_DLE.shape
    num_columns = 1 if L <= 8 else 2 if L <= 32 else 3
    num_rows = -(-L // num_columns)
    cell, reach = _cell_inches(E) / (1 if num_columns == 1 else 1.5), _reach(ratio_DLE)
    figure = Figure(
        figsize=(num_columns * (E * cell + 1.2) + 1.3, num_rows * (D * 0.24 + 0.4) + 1.3),
        dpi=_DPI,
        layout="constrained",
    )
    panels = figure.subplots(num_rows, num_columns, squeeze=False)
    # columns are filled from top to bottom, so that layers follow each other as in the model
    for index, axes in enumerate(panels.T.flat):
        if index >= L:
            axes.remove()
            continue
        _draw(axes, ratio_DLE[:, index], reach, [_shortened(name) for name in names], cell)
        axes.set_title(f"layer {layers[index]}", fontsize=9, loc="left")
        if index == L - 1 or index % num_rows == num_rows - 1:
            axes.set_xlabel("expert")
        else:
            axes.set_xticklabels([])
    _finish(figure, "Which experts each domain uses", reach, path)


def _cell_inches(num_experts: int) -> float:
    """Width of a cell: 16 of them take 7 inches and have room for numbers, 128 take 13."""
    return min(0.45, max(0.1, 9 / num_experts))


def _reach(ratio: NDArray[numpy.float64]) -> int:
    """Powers of two that the colours span on either side of 1: one if all experts lie within, else two."""
    seen = ratio[ratio > 0]
    return 1 if numpy.all((seen >= 0.5) & (seen <= 2)) else 2


def _draw(axes: Axes, ratio_RE: NDArray[numpy.float64], reach: int, row_names: list[str], cell_inches: float) -> None:
    """Draw one map, a row of cells per name, from top to bottom."""
    num_rows, E = ratio_RE.shape
    power_RE = numpy.log2(numpy.clip(ratio_RE, 2.0**-reach, 2.0**reach))
    axes.pcolormesh(
        numpy.ma.masked_invalid(power_RE), cmap=_COLOURS, vmin=-reach, vmax=reach, edgecolors="0.85", linewidth=0.5
    )
    axes.invert_yaxis()
    axes.set_yticks(numpy.arange(num_rows) + 0.5, row_names, fontsize=8, parse_math=False)
    step = next(step for step in (1, 2, 4, 8, 16) if step * cell_inches >= 0.24 or step == 16)
    axes.set_xticks(numpy.arange(0, E, step) + 0.5, [str(e) for e in range(0, E, step)], fontsize=8)
    row_of, expert_of = numpy.nonzero(ratio_RE == 0)
    axes.plot(expert_of + 0.5, row_of + 0.5, "x", color="white", markersize=4)
    if cell_inches < _NUMBERED_INCHES:
        return
    for row, expert in zip(*numpy.nonzero(ratio_RE > 0), strict=True):
        ratio, is_dark = ratio_RE[row, expert], abs(power_RE[row, expert]) > 0.65 * reach
        axes.text(
            expert + 0.5,
            row + 0.5,
            f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}",
            color="white" if is_dark else "black",
            ha="center",
            va="center",
            fontsize=7,
        )


def _finish(figure: Figure, title: str, reach: int, path: Path) -> None:
    """Add title and colour bar, and write the file."""
    figure.suptitle(title, fontsize=12)
    figure.supxlabel(_LEGEND, fontsize=8)
    bar = figure.colorbar(
        ScalarMappable(Normalize(-reach, reach), _COLOURS),
        ax=figure.axes,
        ticks=list(range(-reach, reach + 1)),
        pad=0.02,
        aspect=4 * figure.get_figheight(),  # a quarter of an inch wide
    )
    bar.set_label("share of rows / uniform share", fontsize=9)
    names = [str(2**power) if power >= 0 else f"1/{2**-power}" for power in range(-reach, reach + 1)]
    if reach == 2:  # the ends hold everything beyond them too
        names = [f"\N{LESS-THAN OR EQUAL TO} {names[0]}", *names[1:-1], f"\N{GREATER-THAN OR EQUAL TO} {names[-1]}"]
    bar.ax.set_yticklabels(names, fontsize=8)
    figure.savefig(path)


def _shortened(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:13]}..."
