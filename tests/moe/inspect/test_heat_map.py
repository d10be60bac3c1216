"""Heat map in text: what each cell says, what a terminal's width does to it, what has a colour."""

import pytest
import torch

from moe.inspect.heat_map import heat_map_text, relative_load


def lines(counts_LE: torch.Tensor, *, width: int = 80, layers: range | tuple[int, ...] | None = None) -> list[str]:
    layers = range(len(counts_LE)) if layers is None else layers
    return [line.plain for line in heat_map_text(counts_LE, layers=layers, width=width)]


def test_relative_load_is_the_share_over_the_uniform_share() -> None:
    ratio = relative_load(torch.tensor([[1, 2, 3, 2], [0, 0, 0, 0]]))
    assert ratio[0].tolist() == [0.5, 1.0, 1.5, 1.0]
    assert ratio[1].isnan().all()


def test_few_experts_are_shown_as_numbers() -> None:
    counts_LE = torch.tensor([[10, 10, 10, 10], [0, 5, 1, 34]])
    assert lines(counts_LE, layers=(0, 12)) == [
        "expert     0   1   2   3",
        "layer 0  1.0 1.0 1.0 1.0",
        "layer 12   - 0.5 0.1 3.4",
        "1.0 = uniform share of the layer's rows; - = no row at all",
    ]


def test_large_numbers_keep_the_columns() -> None:
    counts_LE = torch.zeros(2, 16, dtype=torch.int64)
    counts_LE[0, 3] = 5  # all to one
    counts_LE[1, :2] = torch.tensor([62, 38])
    assert lines(counts_LE)[1] == "layer 0   -   -   -  16   -   -   -   -   -   -   -   -   -   -   -   -"
    assert lines(counts_LE)[2] == "layer 1 9.9 6.1   -   -   -   -   -   -   -   -   -   -   -   -   -   -"


def test_many_experts_are_shown_as_digits_in_groups_of_eight() -> None:
    counts_LE = torch.full((1, 20), 100)
    counts_LE[0, :8] = torch.tensor([0, 1, 49, 51, 149, 151, 849, 350])  # 1700 of 2900 in all
    counts_LE[0, 8:] = 300 / 12
    counts_LE[0, 19] += 2000 - int(counts_LE.sum())  # mean 100: ratios are hundredths
    assert lines(counts_LE, width=40) == [
        "expert  0        8        16",
        "layer 0 -..11284 ........ ...1",
        "1 = uniform share, rounded; . = under half; 9 = 8.5 or more; - = no row at all",
    ]


def test_lines_that_are_too_long_go_on_below() -> None:
    counts_LE = torch.ones(2, 24, dtype=torch.int64)
    counts_LE[1, 17] = 0
    assert lines(counts_LE, width=26)[:-1] == [
        "expert  0        8",
        "layer 0 11111111 11111111",
        "    +16 11111111",
        "layer 1 11111111 11111111",
        "    +16 1-111111",
    ]


@pytest.mark.parametrize("E", [1, 2, 5, 16, 18, 19, 64, 65, 128, 257])
@pytest.mark.parametrize("width", [40, 79, 80, 200])
def test_every_expert_has_its_cell_within_the_width(E: int, width: int) -> None:
    counts_LE = torch.ones(48, E, dtype=torch.int64)
    shown = lines(counts_LE, width=width)
    assert max(len(line) for line in shown[:-1]) <= width
    cells = "".join(line[9:] for line in shown[1:-1])
    assert cells.count("1") == 48 * E
    assert "".join(shown).isascii()


def test_layer_without_rows_is_all_idle() -> None:
    assert lines(torch.zeros(1, 4, dtype=torch.int64))[1] == "layer 0   -   -   -   -"


def test_colour_marks_what_stands_out() -> None:
    counts_LE = torch.tensor([[0, 40, 70, 100, 110, 180, 100, 200, 100]])  # mean 100
    line = heat_map_text(counts_LE, layers=[0])[1]
    styles = {line.plain[span.start : span.end].strip(): str(span.style) for span in line.spans if span.style}
    assert styles == {
        "-": "bold white on blue",
        "0.4": "white on blue",
        "0.7": "cyan",
        "1.8": "yellow",
        "2.0": "black on yellow",
    }
    assert str(heat_map_text(torch.tensor([[1, 0, 0, 0, 0]]), layers=[0])[1].spans[0].style) == "white on red"
