"""resolve_backend: what a name stands for, and how a wrong one is refused."""

import logging

import pytest
import torch

from moe_kernels.backends import AUTO, BACKENDS, resolve_backend

CPU = torch.device("cpu")


def test_auto_is_segments_on_a_cpu_for_every_dtype() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert resolve_backend("auto", CPU, dtype) == ("segments", BACKENDS["segments"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_auto_is_triton_on_cuda(dtype: torch.dtype) -> None:
    assert resolve_backend("auto", torch.device("cuda"), dtype, widths=(17, 13))[0] == "triton"


def test_auto_passes_on_and_logs_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="moe_kernels.backends"):
        assert resolve_backend("auto", torch.device("cuda"), torch.float64)[0] == "naive"
    (message,) = caplog.messages
    assert "backend 'auto' on cuda in torch.float64 is naive; not triton: it takes" in message
    assert "not torch_grouped: grouped_mm takes" in message


def test_auto_names_every_refusal_where_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AUTO, "cpu", ("triton", "megablocks"))
    with pytest.raises(ValueError, match=r"'triton' cannot run on cpu .*; backend 'megablocks' cannot run on cpu"):
        resolve_backend("auto", CPU, torch.float32)


def test_auto_says_which_devices_it_knows() -> None:
    with pytest.raises(ValueError, match="'auto' knows cpu, cuda, not 'mps'; name a backend"):
        resolve_backend("auto", torch.device("mps"), torch.float32)


def test_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'fast' is unknown; known are auto, .*naive, segments, torch_grouped"):
        resolve_backend("fast", CPU, torch.float32)


def test_backend_that_cannot_run_says_why_and_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"'segments' cannot run on cuda .*; use 'auto' or 'naive'"):
        resolve_backend("segments", torch.device("cuda"), torch.float32)
    with pytest.raises(ValueError, match=r"'torch_grouped' cannot run on cpu in torch\.float64: .*use backend 'naive'"):
        resolve_backend("torch_grouped", CPU, torch.float64)
    with pytest.raises(ValueError, match="a width is 12; use a multiple of 8"):
        resolve_backend("torch_grouped", CPU, torch.bfloat16, widths=(16, 12))
    assert resolve_backend("torch_grouped", CPU, torch.float32, widths=(16, 12))[0] == "torch_grouped"
