"""What torch_grouped refuses, at the call itself: it never falls back to another way. And how it sums biases."""

from dataclasses import replace

import pytest
import torch

from moe_kernels.backends import BACKENDS
from moe_kernels.testing import make_case, rms_ratio, run

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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bias_gradients_of_many_rows_are_summed_in_float32(device: str) -> None:
    # where sums are made row after row in bfloat16, as on CUDA, a sum of ones ends at 256
    case = make_case("all_to_first", T=2000, D=16, F=8, E=2, K=1, dtype=torch.bfloat16, device=device, biases=True)
    case = replace(case, dy_TD=torch.ones_like(case.dy_TD))
    result = run(TORCH_GROUPED, case)
    assert result.ddown_bias_ED is not None
    assert rms_ratio(result.ddown_bias_ED[0], case.weight_N.double().sum().expand(16)) < 4e-3
