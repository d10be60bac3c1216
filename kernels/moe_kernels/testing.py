"""Cases, yardsticks and traps for tests and benchmarks of expert kernels.

Data keeps every value inside the layer near 1, so that an error cannot hide below a tolerance, and scales
experts differently, so that reading the wrong one is loud. Upstream gradients are random: a sum would hide
mistakes. H is the width of the first product: 2F, or F without a gate.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from moe_kernels import reference
from moe_kernels.backends import BACKENDS, PLAIN, ExpertsBackend
from moe_kernels.spec import ExpertSpec

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
LEAVES = ("x_TD", "weight_N", "gate_up_E2FD", "down_EDF", "gate_up_bias_E2F", "down_bias_ED")


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
    spec: ExpertSpec = PLAIN
    gate_up_bias_E2F: Tensor | None = None
    down_bias_ED: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What a backend returns for a case, and the gradient of every input that has one; None for an absent bias."""

    y_TD: Tensor
    dx_TD: Tensor
    dweight_N: Tensor
    dgate_up_E2FD: Tensor
    ddown_EDF: Tensor
    dgate_up_bias_E2F: Tensor | None = None
    ddown_bias_ED: Tensor | None = None


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
    spec: ExpertSpec = PLAIN,
    biases: bool = False,
    drawn_on: torch.device | str = "cpu",
) -> Case:
    """Return a case with seeded data, the same for every dtype up to rounding; weight_N lies in 0.1..1.1.

    Another device in `drawn_on` draws other numbers, but rows and weight_N are always drawn on the CPU: drawing the
    weights of 128 wide experts takes a CPU a minute, a GPU none. Layouts of one activation hold the same experts. For
    gpt_oss the first product is 4 times as large as for the others, so that one in 25 gates and one in 12 ups lie
    beyond the limits at which they are held.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn_on = torch.device(drawn_on)
    normal_generator = generator if drawn_on.type == "cpu" else torch.Generator(drawn_on).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=normal_generator, dtype=torch.float64, device=drawn_on)

    token_N, expert_N = make_rows(routing, T=T, E=E, K=K, generator=generator)
    weight_N = 0.1 + torch.rand(token_N.numel(), generator=generator, dtype=torch.float64)
    scale_E11 = 2.0 ** (torch.arange(E, device=drawn_on) % 4).view(E, 1, 1)
    H, size = spec.halves * F, 4.0 if spec.activation == "gpt_oss" else 1.0
    x_TD, gate_up_EHD, down_EDF = normal(T, D), normal(E, H, D) / D**0.5 * size, normal(E, D, F) / F**0.5 * scale_E11
    dy_TD = normal(T, D)
    gate_up_bias_EH, down_bias_ED = normal(E, H) * size, normal(E, D) * scale_E11[:, :, 0]
    if spec.gate_up == "interleaved" and spec.halves == 2:
        turns_H = torch.arange(H).view(2, F).T.flatten()
        gate_up_EHD, gate_up_bias_EH = gate_up_EHD[:, turns_H], gate_up_bias_EH[:, turns_H]
    if spec.weights == "in_out":
        gate_up_EHD, down_EDF = gate_up_EHD.mT.contiguous(), down_EDF.mT.contiguous()
    return Case(
        x_TD=x_TD.to(device, dtype),
        token_N=token_N.to(device),
        expert_N=expert_N.to(device),
        weight_N=weight_N.to(device, torch.promote_types(dtype, torch.float32)),
        gate_up_E2FD=gate_up_EHD.to(device, dtype),
        down_EDF=down_EDF.to(device, dtype),
        dy_TD=dy_TD.to(device, dtype),
        fan_out=None if routing in ("ragged", "one_row_each") else K,
        spec=spec,
        gate_up_bias_E2F=gate_up_bias_EH.to(device, dtype) if biases else None,
        down_bias_ED=down_bias_ED.to(device, dtype) if biases else None,
    )


def runs_on_cpu(name: str, dtype: torch.dtype, widths: tuple[int, ...] = (8,), spec: ExpertSpec = PLAIN) -> bool:
    """Return whether the backend of that name runs the spec on a CPU in that dtype and these widths."""
    return BACKENDS[name].refusal(device=torch.device("cpu"), dtype=dtype, widths=widths, spec=spec) is None


def leaves_of(case: Case, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return what a gradient flows to, as leaves that want one: x, weight, gate_up, down, and the biases present.

    Where `dtype` asks for no cast they share the memory of the case.
    """
    tensors = (getattr(case, name) for name in LEAVES)
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors if t is not None]


def _biases(case: Case, leaves: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the leaves that are biases by the name of their argument."""
    present = [name for name in LEAVES if getattr(case, name) is not None]
    return {name: leaf for name, leaf in zip(present, leaves, strict=True) if "bias" in name}


def _result(case: Case, y_TD: Tensor, gradients: Sequence[Tensor]) -> Result:
    present = [name for name in LEAVES if getattr(case, name) is not None]
    return Result(y_TD.detach(), **{f"d{name}": grad for name, grad in zip(present, gradients, strict=True)})


def call(backend: ExpertsBackend, case: Case, leaves: Sequence[Tensor]) -> Tensor:
    """Return y_TD of `backend` for the rows of `case`, with `leaves` in the place of its tensors, as leaves_of."""
    x_TD, weight_N, gate_up_E2FD, down_EDF = leaves[:4]
    options: dict[str, Any] = {"fan_out": case.fan_out, "spec": case.spec, **_biases(case, leaves)}
    return backend(x_TD, case.token_N, case.expert_N, weight_N, gate_up_E2FD, down_EDF, **options)


def run(backend: ExpertsBackend, case: Case) -> Result:
    """Return what `backend` makes of the case. Raises RuntimeError if an input gets no gradient at all."""
    leaves = leaves_of(case)
    y_TD = call(backend, case, leaves)
    return _result(case, y_TD, torch.autograd.grad(y_TD, leaves, case.dy_TD))


def run_reference(case: Case) -> Result:
    """Return the truth for the numbers in the case: the reference in float64."""
    leaves = leaves_of(case, torch.float64)
    x_TD, weight_N, *weights = leaves[:4]
    biases = _biases(case, leaves)
    y_TD = reference.experts(x_TD, case.token_N, case.expert_N, weight_N, *weights, spec=case.spec, **biases)
    if not y_TD.requires_grad:  # no row is in use, so y depends on nothing
        return _result(case, y_TD, [torch.zeros_like(leaf) for leaf in leaves])
    return _result(case, y_TD, torch.autograd.grad(y_TD, leaves, case.dy_TD.double(), materialize_grads=True))


def run_reference_by_expert(case: Case) -> Result:
    """Return what run_reference does up to rounding, one expert at a time instead of one row: for large cases on a GPU.

    No more than one expert's intermediates are alive at once; only the gradients of the weights are as large as they.
    """
    x_TD, weight_N, dy_TD = case.x_TD.double(), case.weight_N.double(), case.dy_TD.double()
    y_TD, dx_TD, dweight_N = torch.zeros_like(x_TD), torch.zeros_like(x_TD), torch.zeros_like(weight_N)
    parameters = {name: getattr(case, name) for name in LEAVES[2:] if getattr(case, name) is not None}
    gradients = {f"d{name}": torch.zeros_like(value, dtype=torch.float64) for name, value in parameters.items()}
    for expert in range(case.down_EDF.shape[0]):
        row_R = (case.expert_N == expert).nonzero()[:, 0]
        token_R = case.token_N[row_R]
        x_RD, weight_R = x_TD[token_R].requires_grad_(), weight_N[row_R].requires_grad_()
        own = {name: value[expert].double().requires_grad_() for name, value in parameters.items()}
        gate_up_HD, down_DF = own["gate_up_E2FD"], own["down_EDF"]
        if case.spec.weights == "in_out":
            gate_up_HD, down_DF = gate_up_HD.T, down_DF.T
        h_RH = x_RD @ gate_up_HD.T + own.get("gate_up_bias_E2F", 0)
        out_RD = reference.activation(h_RH, case.spec) @ down_DF.T + own.get("down_bias_ED", 0)
        y_RD = weight_R[:, None] * out_RD
        dx_RD, dweight_R, *own_gradients = torch.autograd.grad(y_RD, [x_RD, weight_R, *own.values()], dy_TD[token_R])
        y_TD.index_add_(0, token_R, y_RD.detach())
        dx_TD.index_add_(0, token_R, dx_RD)
        dweight_N[row_R] = dweight_R
        for name, gradient in zip(own, own_gradients, strict=True):
            gradients[f"d{name}"][expert] = gradient
    return Result(y_TD, dx_TD, dweight_N, **gradients)


def run_mirrored(case: Case, *, rounds_da: bool = True) -> Result:
    """Return the result in float64, rounded to the dtype of x where a backend that keeps x and H stores it.

    Those are H and Y with their biases, A and y going forward; W2^T dy, the weighted A, dH, each row's dx and the
    gradients going back; the gradient of the first bias sums dH as stored. What differs from this by more than a
    stray rounding is a mistake, however small.

    Args:
        rounds_da: False for a backend that uses W2^T dy where it is computed and never stores it.
    """

    def stored(tensor: Tensor) -> Tensor:
        return tensor.to(case.x_TD.dtype).double()

    def sum_by(index_R: Tensor, value_R: Tensor, like: Tensor) -> Tensor:
        return stored(torch.zeros_like(like).index_add(0, index_R, value_R))

    x_TD, weight_N, gate_up_EHD, down_EDF, *_ = leaves = [leaf.detach() for leaf in leaves_of(case, torch.float64)]
    biases = _biases(case, leaves)
    is_in_out = case.spec.weights == "in_out"
    if is_in_out:
        gate_up_EHD, down_EDF = gate_up_EHD.mT, down_EDF.mT
    b1_EH = biases.get("gate_up_bias_E2F", gate_up_EHD.new_zeros(gate_up_EHD.shape[:2]))
    b2_ED = biases.get("down_bias_ED", down_EDF.new_zeros(down_EDF.shape[:2]))
    used_N = case.expert_N < down_EDF.shape[0]
    token_R, expert_R = case.token_N[used_N], case.expert_N[used_N]
    weight_R1, x_RD, dy_RD = weight_N[used_N, None], x_TD[token_R], case.dy_TD.double()[token_R]
    h_RH = stored(torch.einsum("rhd,rd->rh", gate_up_EHD[expert_R], x_RD) + b1_EH[expert_R]).requires_grad_()
    a_RF = reference.activation(h_RH, case.spec)
    y_RD = stored(torch.einsum("rdf,rf->rd", down_EDF[expert_R], stored(a_RF.detach())) + b2_ED[expert_R])
    da_RF = torch.einsum("rdf,rd->rf", down_EDF[expert_R], dy_RD)
    da_RF = stored(da_RF) if rounds_da else da_RF
    dh_RH = stored(torch.autograd.grad(a_RF, h_RH, weight_R1 * da_RF)[0])
    a_RF = a_RF.detach()
    dx_RD = stored(torch.einsum("rh,rhd->rd", dh_RH, gate_up_EHD[expert_R]))
    dweight_R = (da_RF * a_RF).sum(1) + (dy_RD * b2_ED[expert_R]).sum(1)
    dgate_up_EHD = sum_by(expert_R, dh_RH[:, :, None] * x_RD[:, None, :], gate_up_EHD)
    ddown_EDF = sum_by(expert_R, dy_RD[:, :, None] * stored(weight_R1 * a_RF)[:, None, :], down_EDF)
    return Result(
        sum_by(token_R, weight_R1 * y_RD, x_TD),
        sum_by(token_R, dx_RD, x_TD),
        torch.zeros_like(weight_N).masked_scatter(used_N, dweight_R),
        dgate_up_EHD.mT if is_in_out else dgate_up_EHD,
        ddown_EDF.mT if is_in_out else ddown_EDF,
        sum_by(expert_R, dh_RH, b1_EH) if "gate_up_bias_E2F" in biases else None,
        sum_by(expert_R, weight_R1 * dy_RD, b2_ED) if "down_bias_ED" in biases else None,
    )


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """Return rms(actual - expected) / rms(expected) in float64; 0 or infinity where expected is all zero."""
    error = (actual.double() - expected.double()).square().sum().sqrt().item()
    size = expected.double().square().sum().sqrt().item()
    if size == 0:
        return 0.0 if error == 0 else float("inf")
    return error / size


def _pairs(actual: Result, expected: Result) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield what both results hold, by name. Raises AssertionError if only one of them has a bias's gradient."""
    for field in fields(Result):
        got, want = getattr(actual, field.name), getattr(expected, field.name)
        assert (got is None) == (want is None), f"{field.name} is there in one result and not in the other"
        if got is not None:
            yield field.name, got, want


def assert_close(actual: Result, expected: Result, *, tolerance: float) -> None:
    """Raise AssertionError unless y and every gradient are within `tolerance` of `expected` by RMS ratio.

    Shapes must match; a NaN never passes; what is expected to be zero throughout must be exactly that.
    """
    for name, got, want in _pairs(actual, expected):
        assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, expected {tuple(want.shape)}"
        ratio = rms_ratio(got, want)
        assert ratio <= tolerance, f"{name}: RMS ratio {ratio:.2e}, tolerance {tolerance:.0e}"


def assert_same(actual: Result, expected: Result) -> None:
    """Raise AssertionError unless y and every gradient are equal to the bit."""
    for name, got, want in _pairs(actual, expected):
        assert torch.equal(got, want), f"{name} differs by RMS ratio {rms_ratio(got, want):.2e}"


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
    leaves = leaves_of(case)
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
