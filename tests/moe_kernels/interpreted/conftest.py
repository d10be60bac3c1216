"""Settings of the tests that run the Triton kernels in Triton's interpreter: test_interpreter.py starts them.

They need TRITON_INTERPRET=1 before a kernel is imported, in a process that compiles nothing; elsewhere none is
collected. The whole process computes products as every processor computes them alike.
"""

import os

import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if IS_INTERPRETED else ["test_*.py"]

if IS_INTERPRETED:
    from kernel_runs import patch_the_language_once, sum_products_in_one_order

    patch_the_language_once()
    sum_products_in_one_order()


@pytest.fixture(params=["interpreter", "interpreter_tma"])
def tiles(request: pytest.FixtureRequest) -> str:
    """Give the names of the two entries of tiles.json for the interpreter: pointers, and descriptors."""
    return request.param


@pytest.fixture
def dtype(tiles: str) -> torch.dtype:
    """Give each way of loading a dtype of its own; two of each would show no more."""
    return torch.float32 if tiles == "interpreter" else torch.float16
