"""Registry: entries by name, files imported at the first look-up, and errors that help."""

import sys
from pathlib import Path

import pytest

from moe_kernels.registry import Registry

FILE = """
from shelf_of_tests import THINGS

THINGS.register("{name}")("the {name}")
"""


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[str]:
    """A package of two files that each register one entry."""
    package = tmp_path / "shelf_of_tests"
    package.mkdir()
    lines = ["from moe_kernels.registry import Registry", "THINGS = Registry('thing', package=__name__)"]
    (package / "__init__.py").write_text("\n".join(lines))
    for name in ("pear", "apple"):
        (package / f"{name}.py").write_text(FILE.format(name=name))
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("shelf_of_tests", "shelf_of_tests.pear", "shelf_of_tests.apple"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    import shelf_of_tests  # pyright: ignore[reportMissingImports]

    return shelf_of_tests.THINGS


def test_files_are_imported_at_the_first_look_up_and_not_before(shelf: Registry[str]) -> None:
    assert "shelf_of_tests.pear" not in sys.modules
    assert shelf["pear"] == "the pear"
    assert "shelf_of_tests.apple" in sys.modules


def test_names_are_sorted_and_counted(shelf: Registry[str]) -> None:
    assert list(shelf) == ["apple", "pear"]
    assert len(shelf) == 2
    assert "apple" in shelf
    assert "plum" not in shelf


def test_unknown_name_lists_the_known_ones(shelf: Registry[str]) -> None:
    with pytest.raises(KeyError, match="thing 'plum' is unknown; known are apple, pear"):
        shelf["plum"]


def test_second_entry_under_a_name_is_refused(shelf: Registry[str]) -> None:
    len(shelf)
    with pytest.raises(ValueError, match="thing 'pear' is registered twice"):
        shelf.register("pear")("another pear")
    assert shelf["pear"] == "the pear"


def test_same_entry_may_be_registered_again(shelf: Registry[str]) -> None:
    shelf.register("pear")(shelf["pear"])
    assert len(shelf) == 2


def test_a_file_that_fails_to_import_fails_at_every_look_up(tmp_path, monkeypatch):
    package = tmp_path / "half_broken"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "broken.py").write_text("raise ImportError('no such library')")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("thing", package="half_broken")
    for _ in range(2):
        with pytest.raises(ImportError, match="no such library"):
            list(registry)
