"""What every launch of a kernel needs to know: the device's kind, number formats, descriptors, how many programs."""

import functools
import os
from typing import Any

import torch
from torch import Tensor

INTERPRETED_PROGRAMS = 3  # so few that a program takes several tiles and the loop over them is tested
RAGGED = 2**30  # rows that a tensor read in segments may have
TMA_ALIGNMENT = 16  # bytes, of a descriptor's base and strides


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def is_interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter. Triton decides so when it first reads a kernel."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# torch.compile takes what it returns as it is
@torch.compiler.assume_constant_result
@functools.cache
def arch_of(device: torch.device) -> str:
    """Return "interpreter", or the kind of the GPU as the table of tiles names it: "sm_90", "gfx942"."""
    if is_interpreted():
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_programs(device: torch.device, num_tiles: int, per_sm: int) -> int:
    """Return the size of a persistent grid over at most `num_tiles` tiles.

    Where the device takes fewer than two rounds over all tiles, every tile gets a program of its own.
    """
    resident = INTERPRETED_PROGRAMS if is_interpreted() else _num_multiprocessors(device) * per_sm
    return num_tiles if num_tiles < 2 * resident else resident


def formats(dtype: torch.dtype) -> dict[str, Any]:
    """Return the kernels' number formats for tokens of `dtype`: what they sum in, how float32 products are made.

    float32 follows torch's switch for TF32; everything narrower sums in float32.
    """
    # imported here: where Triton is missing, this file must still say so
    import triton.language as tl

    matmul = torch.backends.cuda.matmul
    # torch 2.9 renamed the switch, and mixing both names raises there
    uses_tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return {
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if uses_tf32 and dtype == torch.float32 else "ieee",
    }


def can_describe(*tensors: Tensor, strides: tuple[int, ...] = ()) -> bool:
    """Return whether TMA descriptors can be made of tensors with these outer strides (in elements)."""
    return all(t.data_ptr() % TMA_ALIGNMENT == 0 and t.numel() for t in tensors) and all(
        stride * tensors[0].element_size() % TMA_ALIGNMENT == 0 for stride in strides
    )


def describe(tensor: Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    """Return a TMA descriptor of `tensor` seen with this shape and these strides, read in blocks of this shape."""
    # imported here: Triton 3.3, which runs the pointer path, has no such module
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, shape, strides, block)


def describe_segments(rows: Tensor, block: list[int]) -> Any:
    """Return a TMA descriptor of rows [R, columns] for parts.load_segment, which reads any run of rows as if alone.

    Two dimensions come first whose strides cancel out over 2^64: they move the third, which ends at RAGGED, so that it
    ends with the segment, and the hardware fills in zeros behind it. Triton's own ragged descriptors do the same.
    """
    stride, columns = rows.stride(0), rows.shape[1]
    shape, strides = [2**31 - 2**16, 2**31 - 2**16, RAGGED, columns], [2**34 - stride, stride, stride, 1]
    return describe(rows, shape, strides, [1, 1, *block])
