"""The triton backend, forward and backward, on the smallest of layers: for tools that slow it a hundredfold.

    compute-sanitizer --tool memcheck python benchmarks/smallest_layer.py      out-of-bounds and misaligned accesses
    compute-sanitizer --tool racecheck python benchmarks/smallest_layer.py     shared memory read before it is written

Every kernel of the layer runs, for SwiGLU without biases and GPT-OSS with them. Widths are odd, and some experts get no
row: what a mask forgets lies outside. Answers are compared with the reference's; memory comes straight from the driver
(PYTORCH_NO_CUDA_MEMORY_CACHING), because within a cached block a stray access is none.
"""

import dataclasses
import os
from typing import Any

# read by torch when it first allocates
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

from moe_kernels.backends import BACKENDS
from moe_kernels.spec import PLAIN, ExpertSpec
from moe_kernels.testing import assert_close, make_case, run, run_reference

SPECS = {PLAIN: False, ExpertSpec(activation="gpt_oss", gate_up="interleaved", weights="in_out"): True}
WIDTHS = {"aligned": (64, 32), "odd": (41, 19)}  # D, F: with 16-byte rows, which TMA reads, and without
TOLERANCE = 2e-2  # bfloat16 on sums of 41 terms


def on(record: Any, device: str) -> Any:
    """Return a dataclass with its tensors on a device."""
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(record, **{name: tensor.to(device) for name, tensor in tensors.items()})


def main() -> None:
    """Run and check every configuration; a line for each."""
    if not torch.cuda.is_available():
        raise SystemExit("this runs kernels on a CUDA GPU; tests/moe_kernels/interpreted runs them without one")
    for spec, biases in SPECS.items():
        for name, (D, F) in WIDTHS.items():
            sizes = {"T": 19, "D": D, "F": F, "E": 6, "K": 2}
            case = make_case("skewed", **sizes, dtype=torch.bfloat16, spec=spec, biases=biases)
            # the reference goes row by row: on the CPU, where no tool watches it
            expected = run_reference(case)
            result = run(BACKENDS["triton"], on(case, "cuda"))
            assert_close(on(result, "cpu"), expected, tolerance=TOLERANCE)
            print(f"{spec.name} {name}: equal to the reference", flush=True)


if __name__ == "__main__":
    main()
