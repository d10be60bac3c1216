"""The layers of published models that kernels are measured on, and what each kernel of a layer must compute and move.

Letters: T tokens, D width, F expert hidden width, E experts, K experts per token, R = T * K routed rows.
"""

from typing import NamedTuple

# measured on the card whose name holds CARD: a dense bf16 product of 8192^3 on random data (894 on zeros, which draw
# less power), and a copy
CARD, PEAK_TFLOPS, PEAK_TB_PER_S = "H200", 790.0, 4.3


class Layer(NamedTuple):
    """The sizes of one expert layer."""

    T: int
    D: int
    F: int
    E: int
    K: int


# widths from the models' published configurations
LAYERS = {
    "mixtral_8x7b": Layer(16384, 4096, 14336, 8, 2),
    "olmoe_1b_7b": Layer(32768, 2048, 1024, 64, 8),
    "qwen3_30b_a3b": Layer(32768, 2048, 768, 128, 8),
    "qwen3_next_80b": Layer(32768, 2048, 512, 512, 10),
    "gpt_oss_20b": Layer(32768, 2880, 2880, 32, 4),
    "deepseek_v3_4_local": Layer(4096, 7168, 2048, 4, 8),  # one of 64 ranks: 4 experts, 32,768 rows
    "sonic_30b_n256": Layer(32768, 4096, 256, 256, 16),
}


class Work(NamedTuple):
    """FLOPs, and bytes if every operand is touched once."""

    flops: float
    bytes: float


def kernel_work(layer: Layer, itemsize: int = 2) -> dict[str, Work]:
    """Return the work of each kernel of a SwiGLU layer, forward then backward, for elements of `itemsize` bytes."""
    T, D, F, E, K = layer
    R = T * K
    first, second = 2 * E * D * F, E * D * F
    product = 2.0 * R * D * F
    return {
        "up": Work(2 * product, itemsize * (R * D + first + 3 * R * F)),
        "down": Work(product, itemsize * (R * F + second + R * D)),
        "combine": Work(2.0 * R * D, itemsize * (R * D + T * D)),
        "down_bwd": Work(product, itemsize * (R * D + second + 5 * R * F)),
        "dW2": Work(product, itemsize * (R * D + R * F + second)),
        "dX": Work(2 * product, itemsize * (2 * R * F + first + R * D)),
        "reduce": Work(1.0 * R * D, itemsize * (R * D + T * D)),
        "dW1": Work(2 * product, itemsize * (R * D + 2 * R * F + first)),
    }


def least_ms(layer: Layer, mode: str) -> float:
    """Return the milliseconds that an H200 needs for "forward" or "backward" at least: the sum over its kernels."""
    forward = ("up", "down", "combine")
    return sum(
        max(work.flops / PEAK_TFLOPS, work.bytes / PEAK_TB_PER_S) / 1e9
        for kernel, work in kernel_work(layer).items()
        if (kernel in forward) == (mode == "forward")
    )
