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

from background import Background
from moe.data.prepare import prepare
from pool import Pool
from runs import copy_data, small_recipe

SEED = 1234
# tests are many small tensors: a second thread only waits for the first, ten times as long on a busy machine
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` on a machine without one; -ra lists them with the reason."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start what the collected modules have running beside the tests; see background.py."""
    if not session.config.option.collectonly:
        for background in _backgrounds(session):
            background.start()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End what nobody waited for."""
    for background in _backgrounds(session):
        background.clean()


def _backgrounds(session: pytest.Session) -> list[Background]:
    modules = {item.path: getattr(item, "module", None) for item in session.items}
    return [background for module in modules.values() for background in getattr(module, "BACKGROUND", [])]


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
