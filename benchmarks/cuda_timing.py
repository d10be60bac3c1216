"""How long the passes of a contender take on CUDA, and how much memory they need, for bench_backends."""

import torch

from moe_kernels.backends import ExpertsBackend
from moe_kernels.testing import Case, call, leaves_of, run

FLUSHED_BYTES = 2**28  # written before every pass on CUDA: several times the L2 cache of any card
CUDA_REPEATS = (5, 200)  # no fewer and no more passes are timed on CUDA
WARMUP_PASSES = 2


def time_on_cuda(contender: ExpertsBackend, case: Case, repeat_ms: float) -> list[dict[str, float]]:
    """Return the milliseconds of forward and backward passes, by mode, one entry per pass of each.

    Every backward pass has a forward pass of its own: some of the peers write to what they have saved.
    """
    leaves = leaves_of(case)
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=case.x_TD.device)

    def one_pass() -> list[torch.cuda.Event]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        flushed.zero_()
        events[0].record()
        y_TD = call(contender, case, leaves)
        events[1].record()
        flushed.zero_()
        events[2].record()
        torch.autograd.grad(y_TD, leaves, case.dy_TD)
        events[3].record()
        return events

    def read(passes: list[list[torch.cuda.Event]]) -> list[dict[str, float]]:
        torch.cuda.synchronize()
        return [{"forward": a.elapsed_time(b), "backward": c.elapsed_time(d)} for a, b, c, d in passes]

    estimate = read([one_pass() for _ in range(WARMUP_PASSES)])[-1]
    least, most = CUDA_REPEATS
    repeats = min(max(round(repeat_ms / sum(estimate.values())), least), most)
    return read([one_pass() for _ in range(repeats)])


def peak_mib(contender: ExpertsBackend, case: Case) -> float:
    """Return how far one forward and backward pass raises the memory in use on the GPU."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(contender, case)
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)
