"""The table of seeded defects stays true: every one can still be seeded, and its tests exist."""

import re
from pathlib import Path

import pytest

from benchmarks.mutate_kernels import MUTANTS, TESTS, times_found

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_old_text_stands_once_in_the_kernels(mutant) -> None:
    assert times_found(mutant) == 1
    assert mutant.old != mutant.new


def test_names_differ_and_tests_named_exist() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20
    for mutant in MUTANTS:
        source = (ROOT / TESTS / mutant.tests).read_text()
        words = [word for word in re.findall(r"\w+", mutant.select) if word not in ("and", "or", "not")]
        assert any(word in source for word in words), mutant.name
