"""Cases, yardsticks and traps for tests and benchmarks of expert kernels.

Data keeps every value inside the layer near 1, so that an error cannot hide below a tolerance, and scales
experts differently, so that reading the wrong one is loud. Upstream gradients are random: a sum would hide
mistakes.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from moe_kernels import reference
from moe_kernels.backends import ExpertsBackend

ROUTINGS = (
    "random",
    "skewed",
    "balanced",
    "all_to_first",
    "all_to_last",
    "one_row_each",
    "half_empty",
    "ends_empty",
    "repeated",
    "ragged",
    "some_unused",
    "all_unused",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """The arguments of one call of a backend, and the gradient that comes back to it."""

    x_TD: Tensor
    token_N: Tensor
    expert_N: Tensor
    weight_N: Tensor
    gate_up_E2FD: Tensor
    down_EDF: Tensor
    dy_TD: Tensor
    fan_out: int | None


@dataclass(frozen=True, slots=True)
class Result:
    """What a backend returns for a case, and the gradient of every input that has one."""

    y_TD: Tensor
    dx_TD: Tensor
    dweight_N: Tensor
    dgate_up_E2FD: Tensor
    ddown_EDF: Tensor


def make_rows(routing: str, *, T: int, E: int, K: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return token_N and expert_N. Every routing of ROUTINGS but "ragged" and "one_row_each" has fan-out K.

    random: K different experts per token, evenly likely. skewed: the same, with very unequal popularity.
    balanced: experts in turn. all_to_first, all_to_last: every row to one expert. one_row_each: expert e gets
    one row, of token e mod T, in shuffled order. half_empty: odd experts get nothing. ends_empty: neither the
    first nor the last gets any. repeated: all K rows of a token go to one expert. ragged: 0 to 2K rows per
    token, in shuffled order. some_unused, all_unused: random, with a third of the rows, or all, unused.
    """
    token_N = torch.arange(T).repeat_interleave(K)
    chosen_TK = torch.rand(T, E, generator=generator).topk(K, dim=1).indices
    expert_N = chosen_TK.flatten()
    if routing == "skewed":
        popularity_E = 2 * torch.randn(E, generator=generator)
        gumbel_TE = -torch.rand(T, E, generator=generator).log_().neg_().log_()
        expert_N = (popularity_E + gumbel_TE).topk(K, dim=1).indices.flatten()
    elif routing == "balanced":
        expert_N = torch.arange(T * K) % E
    elif routing in ("all_to_first", "all_to_last"):
        expert_N = torch.full((T * K,), 0 if routing == "all_to_first" else E - 1)
    elif routing == "one_row_each":
        expert_N = torch.randperm(E, generator=generator)[: E if T else 0]
        token_N = expert_N % max(T, 1)
    elif routing == "half_empty":
        expert_N = expert_N // 2 * 2
    elif routing == "ends_empty":
        expert_N = expert_N.clamp(min(1, E - 1), max(E - 2, 0))
    elif routing == "repeated":
        expert_N = chosen_TK[:, :1].expand(T, K).flatten()
    elif routing == "ragged":
        count_T = torch.randint(0, 2 * K + 1, (T,), generator=generator)
        token_N = torch.arange(T).repeat_interleave(count_T)
        token_N = token_N[torch.randperm(token_N.numel(), generator=generator)]
        expert_N = torch.randint(0, E, token_N.shape, generator=generator)
    elif routing in ("some_unused", "all_unused"):
        share = 1 / 3 if routing == "some_unused" else 1.0
        expert_N = expert_N.masked_fill(torch.rand(T * K, generator=generator) < share, E)
    elif routing != "random":
        raise ValueError(f"routing {routing!r} is unknown; known are {', '.join(ROUTINGS)}")
    return token_N, expert_N


def make_case(
    routing: str = "random",
    *,
    T: int,
    D: int,
    F: int,
    E: int,
    K: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Case:
    """Return a case with seeded data, the same for every dtype up to rounding; weight_N lies in 0.1..1.1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    token_N, expert_N = make_rows(routing, T=T, E=E, K=K, generator=generator)
    weight_N = 0.1 + torch.rand(token_N.numel(), generator=generator, dtype=torch.float64)
    scale_E11 = 2.0 ** (torch.arange(E) % 4).view(E, 1, 1)
    return Case(
        x_TD=normal(T, D).to(device, dtype),
        token_N=token_N.to(device),
        expert_N=expert_N.to(device),
        weight_N=weight_N.to(device, torch.promote_types(dtype, torch.float32)),
        gate_up_E2FD=(normal(E, 2 * F, D) / D**0.5).to(device, dtype),
        down_EDF=(normal(E, D, F) / F**0.5 * scale_E11).to(device, dtype),
        dy_TD=normal(T, D).to(device, dtype),
        fan_out=None if routing in ("ragged", "one_row_each") else K,
    )


def _leaves(case: Case, dtype: torch.dtype | None = None) -> list[Tensor]:
    tensors = (case.x_TD, case.weight_N, case.gate_up_E2FD, case.down_EDF)
    return [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors]


def call(backend: ExpertsBackend, case: Case, leaves: Sequence[Tensor]) -> Tensor:
    """Return y_TD of `backend` for the rows of `case`, with x, weight, gate_up and down from `leaves`."""
    x_TD, weight_N, gate_up_E2FD, down_EDF = leaves
    return backend(x_TD, case.token_N, case.expert_N, weight_N, gate_up_E2FD, down_EDF, fan_out=case.fan_out)


def run(backend: ExpertsBackend, case: Case) -> Result:
    """Return what `backend` makes of the case. Raises RuntimeError if an input gets no gradient at all."""
    leaves = _leaves(case)
    y_TD = call(backend, case, leaves)
    return Result(y_TD.detach(), *torch.autograd.grad(y_TD, leaves, case.dy_TD))


def run_reference(case: Case) -> Result:
    """Return the truth for the numbers in the case: the reference in float64."""
    leaves = _leaves(case, torch.float64)
    x_TD, weight_N, *weights = leaves
    y_TD = reference.experts(x_TD, case.token_N, case.expert_N, weight_N, *weights)
    if not y_TD.requires_grad:  # no row is in use, so y depends on nothing
        return Result(y_TD, *(torch.zeros_like(leaf) for leaf in leaves))
    return Result(y_TD.detach(), *torch.autograd.grad(y_TD, leaves, case.dy_TD.double(), materialize_grads=True))


def run_mirrored(case: Case) -> Result:
    """Return the result in float64, rounded to the dtype of x where a backend that keeps x and H stores it.

    Those are H, A, Y and y going forward; W2^T dy, the weighted A, dH, each row's dx and the gradients going
    back. What differs from this by more than a stray rounding is a mistake, however small.
    """

    def stored(tensor: Tensor) -> Tensor:
        return tensor.to(case.x_TD.dtype).double()

    used_N = case.expert_N < case.down_EDF.shape[0]
    token_R, expert_R = case.token_N[used_N], case.expert_N[used_N]
    x_TD, weight_N, gate_up_E2FD, down_EDF = (leaf.detach() for leaf in _leaves(case, torch.float64))
    weight_R1, x_RD, dy_RD = weight_N[used_N, None], x_TD[token_R], case.dy_TD.double()[token_R]
    h_R2F = stored(torch.einsum("rfd,rd->rf", gate_up_E2FD[expert_R], x_RD))
    gate_RF, up_RF = h_R2F.chunk(2, dim=1)
    sigmoid_RF = torch.sigmoid(gate_RF)
    a_RF = gate_RF * sigmoid_RF * up_RF
    y_RD = stored(torch.einsum("rdf,rf->rd", down_EDF[expert_R], stored(a_RF)))
    da_RF = stored(torch.einsum("rdf,rd->rf", down_EDF[expert_R], dy_RD))
    dsilu_RF = sigmoid_RF * (1 + gate_RF * (1 - sigmoid_RF))
    dh_R2F = stored(weight_R1 * torch.cat((da_RF * up_RF * dsilu_RF, da_RF * gate_RF * sigmoid_RF), dim=1))
    dx_RD = stored(torch.einsum("rf,rfd->rd", dh_R2F, gate_up_E2FD[expert_R]))
    ddown_RDF = dy_RD[:, :, None] * stored(weight_R1 * a_RF)[:, None, :]
    dgate_up_R2FD = dh_R2F[:, :, None] * x_RD[:, None, :]
    return Result(
        stored(torch.zeros_like(x_TD).index_add(0, token_R, weight_R1 * y_RD)),
        stored(torch.zeros_like(x_TD).index_add(0, token_R, dx_RD)),
        torch.zeros_like(weight_N).masked_scatter(used_N, (da_RF * a_RF).sum(1)),
        stored(torch.zeros_like(gate_up_E2FD).index_add(0, expert_R, dgate_up_R2FD)),
        stored(torch.zeros_like(down_EDF).index_add(0, expert_R, ddown_RDF)),
    )


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """Return rms(actual - expected) / rms(expected) in float64; 0 or infinity where expected is all zero."""
    error = (actual.double() - expected.double()).square().sum().sqrt().item()
    size = expected.double().square().sum().sqrt().item()
    if size == 0:
        return 0.0 if error == 0 else float("inf")
    return error / size


def assert_close(actual: Result, expected: Result, *, tolerance: float) -> None:
    """Raise AssertionError unless y and every gradient are within `tolerance` of `expected` by RMS ratio.

    Shapes must match; a NaN never passes; what is expected to be zero throughout must be exactly that.
    """
    for field in fields(Result):
        got, want = getattr(actual, field.name), getattr(expected, field.name)
        assert got.shape == want.shape, f"{field.name}: {tuple(got.shape)}, expected {tuple(want.shape)}"
        ratio = rms_ratio(got, want)
        assert ratio <= tolerance, f"{field.name}: RMS ratio {ratio:.2e}, tolerance {tolerance:.0e}"


def assert_same(actual: Result, expected: Result) -> None:
    """Raise AssertionError unless y and every gradient are equal to the bit."""
    for field in fields(Result):
        got, want = getattr(actual, field.name), getattr(expected, field.name)
        assert torch.equal(got, want), f"{field.name} differs by RMS ratio {rms_ratio(got, want):.2e}"


def poison_unused(case: Case) -> Case:
    """Return the case with NaN weights and token ids out of range in its unused rows."""
    unused_N = case.expert_N == case.down_EDF.shape[0]
    return replace(
        case,
        token_N=case.token_N.masked_fill(unused_N, 2**40),
        weight_N=case.weight_N.masked_fill(unused_N, float("nan")),
    )


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every newly allocated tensor with NaN inside the block, so that reading what nobody wrote shows.

    torch does so in its deterministic mode, which is set for the block and put back after it.
    """
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic)


def saved_bytes(backend: ExpertsBackend, case: Case) -> int:
    """Return the bytes the forward pass keeps for the backward pass, beside the arguments of the call."""
    leaves = _leaves(case)
    known = {t.untyped_storage().data_ptr() for t in (*leaves, case.token_N, case.expert_N)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y_TD = call(backend, case, leaves)
    assert y_TD.requires_grad
    return sum(kept.values())
