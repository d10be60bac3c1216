"""What torch_grouped refuses, at the call itself: it never falls back to another way."""

import pytest
import torch

from moe_kernels.backends import BACKENDS
from moe_kernels.testing import make_case, run

TORCH_GROUPED = BACKENDS["torch_grouped"]


def test_float64_is_refused_with_the_remedy() -> None:
    case = make_case(T=4, D=16, F=8, E=2, K=1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"torch\.float64: grouped_mm takes .*; use backend 'naive'"):
        run(TORCH_GROUPED, case)


@pytest.mark.parametrize(
    ("dtype", "D", "F", "width", "multiple"),
    [(torch.float32, 18, 8, 18, 4), (torch.float32, 16, 7, 7, 4), (torch.bfloat16, 16, 12, 12, 8)],
)
def test_unaligned_widths_are_refused_with_the_remedy(
    dtype: torch.dtype, D: int, F: int, width: int, multiple: int
) -> None:
    case = make_case(T=4, D=D, F=F, E=2, K=1, dtype=dtype)
    with pytest.raises(ValueError, match=f"a width is {width}; use a multiple of {multiple}, or backend 'naive'"):
        run(TORCH_GROUPED, case)
