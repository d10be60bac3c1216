"""What every test gets: no network, seeds, and a skip where a GPU is needed and there is none."""

import os
import random

# before any test imports transformers, datasets or wandb, which read them once; subprocesses inherit them
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    TOKENIZERS_PARALLELISM="false",
)

from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch

from moe.data.prepare import prepare
from pool import Pool
from runs import copy_data, small_recipe

SEED = 1234
# tests are many small tensors: a second thread only waits for the first, ten times as long on a busy machine
torch.set_num_threads(1)


# what keeps a core busy for minutes begins first, beside tests that mostly wait for one another's processes
FIRST = ("test_interpreter.py", "test_compiled.py", "test_house.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` on a machine without one; -ra lists them with the reason. And see FIRST."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Seed every generator, so that a test draws the same numbers alone and in the whole run."""
    random.seed(SEED)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Processes for distributed tests, started once; see pool.py."""
    processes = Pool(max_ranks=4)
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def prepared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of runs.small_recipe, built once."""
    root = tmp_path_factory.mktemp("prepared")
    prepare(small_recipe(root).data, report=lambda _: None)
    return root / "data"


@pytest.fixture
def run_root(tmp_path: Path, prepared_data: Path) -> Path:
    """A folder of its own for runs, with the data there."""
    copy_data(prepared_data, tmp_path)
    return tmp_path
