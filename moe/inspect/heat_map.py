"""Heat map in text: how evenly the experts of each layer are loaded, for a terminal or a log file.

A cell says what share of its layer's rows an expert takes, relative to the uniform share 1/E. With few experts it is
a number, else one character. Colour repeats what the characters say: blue below 1, yellow and red above.
"""

from collections.abc import Sequence

from rich.text import Text
from torch import Tensor

_GROUP = 8  # experts between two gaps, where a cell is one character
# upper limits of the ratio; nothing between 4/5 and 5/4, so that only what stands out has a colour. These are among the
# sixteen colours of every terminal: finer ones would be rounded to grey where there are no others.
_IDLE = "bold white on blue"
_STYLES = (
    (0.5, "white on blue"),
    (0.8, "cyan"),
    (1.25, ""),
    (2.0, "yellow"),
    (4.0, "black on yellow"),
    (float("inf"), "white on red"),
)
_NUMBERS_LEGEND = "1.0 = uniform share of the layer's rows; - = no row at all"
_DIGITS_LEGEND = "1 = uniform share, rounded; . = under half; 9 = 8.5 or more; - = no row at all"


def relative_load(counts: Tensor) -> Tensor:
    """Return counts [..., E] over the uniform share of their sum over E: float64, mean 1, NaN where there is no row."""
    counts = counts.double()
    return counts / counts.mean(-1, keepdim=True)


def heat_map_text(counts_LE: Tensor, *, layers: Sequence[int | str], width: int = 80) -> list[Text]:
    """Return the lines of the map: a header, then one line per layer or more if they are too long, then a legend.

    Args:
        counts_LE: routed rows of each expert, integers.
        layers: what to call the rows of `counts_LE`.
        width: columns of the terminal.
    """
    E = counts_LE.shape[1]
    names = [f"layer {layer}" for layer in layers]
    margin = max(map(len, ["expert", *names])) + 1
    has_numbers = margin + 4 * E <= width
    if has_numbers:
        chunks = [range(E)]
    else:
        per_line = _GROUP * max(1, (width - margin + 1) // (_GROUP + 1))
        chunks = [range(start, min(E, start + per_line)) for start in range(0, E, per_line)]
    lines = [_header(chunks[0], margin, has_numbers)]
    for name, count_E, ratio_E in zip(names, counts_LE.tolist(), relative_load(counts_LE).tolist(), strict=True):
        for chunk in chunks:
            line = Text((name if chunk.start == 0 else f"+{chunk.start}".rjust(margin - 1)).ljust(margin))
            for expert in chunk:
                if not has_numbers and expert > chunk.start and expert % _GROUP == 0:
                    line.append(" ")
                line.append(*_cell(count_E[expert], ratio_E[expert], has_numbers))
            line.rstrip()
            lines.append(line)
    return [*lines, Text(_NUMBERS_LEGEND if has_numbers else _DIGITS_LEGEND, style="dim")]


def _header(experts: range, margin: int, has_numbers: bool) -> Text:
    """Return the line of expert numbers: each of them, or the first of each group."""
    cells = [f"{e:>3} " for e in experts] if has_numbers else [f"{e:<{_GROUP + 1}}" for e in experts[::_GROUP]]
    return Text(("expert".ljust(margin) + "".join(cells)).rstrip(), style="dim")


def _cell(count: int, ratio: float, has_numbers: bool) -> tuple[str, str]:
    """Return the characters of one expert and their style."""
    if count == 0:
        return ("  - " if has_numbers else "-"), _IDLE
    style = next(style for limit, style in _STYLES if ratio < limit)
    if has_numbers:
        return f"{ratio:3.1f} " if ratio < 9.95 else f"{ratio:3.0f} ", style
    return "." if ratio < 0.5 else str(min(9, int(ratio + 0.5))), style
