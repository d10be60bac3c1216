"""Pictures: the files exist, have a sensible size, and their cells have the colour of their share."""

from pathlib import Path

import numpy
import pytest
import torch
from matplotlib.image import imread

from moe.inspect.pictures import domain_heat_map, load_heat_map

WHITE, BLUE, RED, GREY = (247, 247, 247), (5, 48, 97), (103, 0, 31), (204, 204, 204)  # 1, <= 1/4, >= 4, no rows


def pixels(path: Path) -> numpy.ndarray:
    return numpy.round(imread(path)[..., :3] * 255).astype(int)


def share_of(image: numpy.ndarray, colour: tuple[int, int, int]) -> float:
    """Share of the pixels that have this colour, give or take the steps of the colour table."""
    return float((abs(image - colour) <= 2).all(-1).mean())


@pytest.mark.parametrize(("L", "E"), [(1, 1), (4, 16), (16, 128)])
def test_load_picture_grows_with_layers_and_experts(tmp_path: Path, L: int, E: int) -> None:
    counts_LE = torch.randint(1, 100, (L, E))
    load_heat_map(counts_LE, tmp_path / "load.png", layers=range(L))
    height, width, _ = pixels(tmp_path / "load.png").shape
    assert 300 <= height <= 1200
    assert 300 <= width <= 2000
    assert width >= 12 * E
    assert height >= 40 * L


def test_even_load_is_white_and_uneven_load_is_not(tmp_path: Path) -> None:
    load_heat_map(torch.full((4, 16), 9), tmp_path / "even.png", layers=range(4))
    even = pixels(tmp_path / "even.png")
    uneven_LE = torch.full((4, 16), 1)
    uneven_LE[:, ::4] = 30  # 3.6x the mean, the others 0.12x
    load_heat_map(uneven_LE, tmp_path / "uneven.png", layers=range(4))
    uneven = pixels(tmp_path / "uneven.png")
    # the colour bar alone has some of every colour
    assert share_of(even, WHITE) > 0.4
    assert share_of(even, BLUE) < 0.01
    assert share_of(uneven, WHITE) < 0.01
    assert share_of(uneven, BLUE) > 0.3


def test_all_to_one_expert_is_red_beside_blue(tmp_path: Path) -> None:
    counts_LE = torch.zeros(4, 8, dtype=torch.int64)
    counts_LE[:, 2] = 50
    load_heat_map(counts_LE, tmp_path / "load.png", layers=range(4))
    image = pixels(tmp_path / "load.png")
    assert share_of(image, BLUE) > 5 * share_of(image, RED) > 0.05


@pytest.mark.parametrize(("D", "L", "E"), [(1, 1, 2), (3, 2, 16), (2, 9, 4)])
def test_domain_picture_holds_a_panel_per_layer(tmp_path: Path, D: int, L: int, E: int) -> None:
    names = [f"a domain with a long name {d} of $x_1" for d in range(D)]
    domain_heat_map(torch.randint(0, 9, (D, L, E)) + 1, names, tmp_path / "domains.png", layers=range(L))
    image = pixels(tmp_path / "domains.png")
    assert image.shape[0] >= 200
    assert image.shape[1] >= 250
    assert max(image.shape) <= 2600
    assert len(numpy.unique(image.reshape(-1, 3), axis=0)) > 50


def test_domain_without_rows_is_grey(tmp_path: Path) -> None:
    counts_DLE = torch.full((3, 2, 8), 7)
    names = ["one", "two", "three"]
    domain_heat_map(counts_DLE, names, tmp_path / "full.png", layers=[1, 3])
    assert share_of(pixels(tmp_path / "full.png"), GREY) < 0.03
    counts_DLE[1] = 0
    domain_heat_map(counts_DLE, names, tmp_path / "gap.png", layers=[1, 3])
    gap = pixels(tmp_path / "gap.png")
    assert share_of(gap, GREY) > 0.1
    assert share_of(gap, WHITE) > 1.5 * share_of(gap, GREY)
