"""What every backend promises, on every routing. The registry is walked: a new file is tested without an edit."""

import functools
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_kernels.backends import BACKENDS
from moe_kernels.testing import (
    ROUTINGS,
    Case,
    Result,
    assert_close,
    assert_same,
    call,
    leaves_of,
    make_case,
    poison_unused,
    poisoned_memory,
    rms_ratio,
    run,
    run_reference,
    runs_on_cpu,
)

# torch only warns when an out= buffer is too small and gets reallocated
pytestmark = pytest.mark.filterwarnings("error")

# RMS ratio to the reference in float64: 20 times what rounding gives, far below one wrong row
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}
SHAPES = {  # T, D, F, E, K
    "no_token": (0, 8, 4, 3, 2),
    "one_token": (1, 8, 12, 3, 2),
    "odd_widths": (29, 17, 13, 5, 3),
    "widths_of_one": (7, 1, 1, 2, 1),
    "one_expert": (6, 8, 12, 1, 1),
    "every_expert": (9, 16, 8, 4, 4),
    "more_experts_than_rows": (11, 24, 8, 64, 3),
    "long_segments": (130, 40, 24, 3, 2),
}


FLOAT64 = [name for name in BACKENDS if runs_on_cpu(name, torch.float64)]
FLOAT32 = [name for name in BACKENDS if runs_on_cpu(name, torch.float32)]
BFLOAT16 = [name for name in BACKENDS if runs_on_cpu(name, torch.bfloat16)]
TRAINED = [(name, torch.float32) for name in FLOAT32] + [(name, torch.bfloat16) for name in BFLOAT16]


def case_of(routing: str, shape: str, dtype: torch.dtype) -> Case:
    T, D, F, E, K = SHAPES[shape]
    return make_case(routing, T=T, D=D, F=F, E=E, K=K, dtype=dtype)


@functools.cache
def truth(routing: str, shape: str, dtype: torch.dtype) -> Result:
    return run_reference(case_of(routing, shape, dtype))


def test_the_registry_holds_the_backends_of_the_house() -> None:
    assert {"naive", "segments", "torch_grouped"} <= set(BACKENDS)
    assert {"naive", "segments"} <= set(FLOAT64)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", BACKENDS)  # those that refuse too: it must be the call itself that does
def test_output_and_every_gradient_equal_the_reference(name: str, dtype: torch.dtype, shape: str, routing: str) -> None:
    case = case_of(routing, shape, dtype)
    if not runs_on_cpu(name, dtype, tuple(case.down_EDF.shape[1:])):
        with pytest.raises(ValueError):
            run(BACKENDS[name], case)
        return
    result = run(BACKENDS[name], case)
    assert_close(result, truth(routing, shape, dtype), tolerance=TOLERANCE[dtype])
    assert result.y_TD.dtype == dtype
    assert result.dweight_N.dtype == case.weight_N.dtype


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=24), st.integers(0, 2**31))
def test_any_list_of_pairs_equals_the_reference(pairs: list[tuple[int, int]], seed: int) -> None:
    case = make_case(T=5, D=6, F=4, E=3, K=1, dtype=torch.float64, seed=seed)
    token_N, expert_N = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
    weight_N = torch.linspace(0.1, 1, len(pairs), dtype=torch.float64)
    case = replace(case, token_N=token_N, expert_N=expert_N, weight_N=weight_N, fan_out=None)
    for name in FLOAT64:
        assert_close(run(BACKENDS[name], case), run_reference(case), tolerance=1e-12)


@pytest.mark.parametrize("routing", ["random", "ragged", "some_unused", "repeated"])
@pytest.mark.parametrize("name", ["naive", "segments"])  # hundreds of calls: nothing for an interpreted kernel
def test_gradients_equal_finite_differences(name: str, routing: str) -> None:
    case = make_case(routing, T=5, D=4, F=3, E=3, K=2, dtype=torch.float64)
    leaves = leaves_of(case)
    assert torch.autograd.gradcheck(lambda *leaves: call(BACKENDS[name], case, leaves), leaves)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_is_as_exact_as_the_plain_loop(name: str, routing: str) -> None:
    # 1e-2: a chain of four bfloat16 roundings; 1.2 times naive: no rounding point more than the plain loop has
    case = make_case(routing, T=130, D=40, F=24, E=3, K=2, dtype=torch.bfloat16)
    exact, result, plain = run_reference(case), run(BACKENDS[name], case), run(BACKENDS["naive"], case)
    assert_close(result, exact, tolerance=1e-2)
    for name in [field.name for field in fields(Result) if getattr(exact, field.name) is not None]:
        got, loop, want = (getattr(r, name) for r in (result, plain, exact))
        assert rms_ratio(got, want) <= 1.2 * rms_ratio(loop, want) + 1e-6, name
    assert result.y_TD.dtype == torch.bfloat16
    assert result.dweight_N.dtype == torch.float32


@pytest.mark.parametrize("name", FLOAT64)
def test_renumbering_tokens_renumbers_the_output(name: str) -> None:
    case = make_case(T=31, D=17, F=13, E=5, K=2, dtype=torch.float64)
    new_T = torch.randperm(31, generator=torch.Generator().manual_seed(3))
    old_T = new_T.argsort()
    moved = replace(case, x_TD=case.x_TD[old_T], dy_TD=case.dy_TD[old_T], token_N=new_T[case.token_N], fan_out=None)
    plain, result = run(BACKENDS[name], case), run(BACKENDS[name], moved)
    result = replace(result, y_TD=result.y_TD[new_T], dx_TD=result.dx_TD[new_T])
    assert_close(result, plain, tolerance=1e-13)


@pytest.mark.parametrize("name", FLOAT64)
def test_renumbering_experts_changes_nothing_but_their_gradients_order(name: str) -> None:
    case = make_case("some_unused", T=31, D=17, F=13, E=5, K=2, dtype=torch.float64)
    new_E1 = torch.tensor([3, 0, 4, 2, 1, 5])  # 5 marks unused rows and stays
    old_E = new_E1[:5].argsort()
    moved = replace(
        case,
        expert_N=new_E1[case.expert_N],
        gate_up_E2FD=case.gate_up_E2FD[old_E],
        down_EDF=case.down_EDF[old_E],
    )
    plain, result = run(BACKENDS[name], case), run(BACKENDS[name], moved)
    result = replace(result, dgate_up_E2FD=result.dgate_up_E2FD[new_E1[:5]], ddown_EDF=result.ddown_EDF[new_E1[:5]])
    assert_close(result, plain, tolerance=1e-13)


@pytest.mark.parametrize("name", FLOAT64)
def test_order_of_the_rows_does_not_matter(name: str) -> None:
    case = make_case("some_unused", T=31, D=17, F=13, E=5, K=2, dtype=torch.float64)
    shuffle_N = torch.randperm(62, generator=torch.Generator().manual_seed(4))
    rows = {field: getattr(case, field)[shuffle_N] for field in ("token_N", "expert_N", "weight_N")}
    plain, result = run(BACKENDS[name], case), run(BACKENDS[name], replace(case, **rows, fan_out=None))
    assert_close(result, replace(plain, dweight_N=plain.dweight_N[shuffle_N]), tolerance=1e-13)


@pytest.mark.parametrize("name", FLOAT32)
def test_doubling_the_weights_doubles_the_output_exactly(name: str) -> None:
    case = make_case(T=31, D=16, F=8, E=5, K=2)
    plain = run(BACKENDS[name], case)
    doubled = run(BACKENDS[name], replace(case, weight_N=2 * case.weight_N))
    assert torch.equal(doubled.y_TD, 2 * plain.y_TD)
    assert torch.equal(doubled.dx_TD, 2 * plain.dx_TD)
    assert torch.equal(doubled.dweight_N, plain.dweight_N)


@pytest.mark.parametrize(("name", "dtype"), TRAINED)
def test_empty_expert_gets_zero_gradient(name: str, dtype: torch.dtype) -> None:
    case = make_case("half_empty", T=40, D=16, F=8, E=5, K=2, dtype=dtype)
    with poisoned_memory():
        result = run(BACKENDS[name], case)
    for gradient_E in (result.dgate_up_E2FD, result.ddown_EDF):
        assert gradient_E[[1, 3]].count_nonzero() == 0
        assert gradient_E[[0, 2, 4]].count_nonzero() > 0


@pytest.mark.parametrize("routing", ["some_unused", "all_unused"])
@pytest.mark.parametrize(("name", "dtype"), TRAINED)
def test_unused_rows_and_fresh_memory_never_matter(name: str, routing: str, dtype: torch.dtype) -> None:
    case = make_case(routing, T=40, D=16, F=8, E=5, K=2, dtype=dtype)
    plain = run(BACKENDS[name], case)
    with poisoned_memory():
        poisoned = run(BACKENDS[name], poison_unused(case))
    assert_same(poisoned, plain)
    assert poisoned.dweight_N[case.expert_N == 5].count_nonzero() == 0


@pytest.mark.parametrize("where", ["x_TD", "dy_TD"])
@pytest.mark.parametrize(("name", "dtype"), TRAINED)
def test_nan_of_one_token_reaches_only_what_depends_on_it(name: str, where: str, dtype: torch.dtype) -> None:
    case = make_case("some_unused", T=40, D=16, F=8, E=7, K=2, dtype=dtype)
    clean = run(BACKENDS[name], case)
    token = int(case.token_N[case.expert_N == 3][0])
    tainted = getattr(case, where).clone()
    tainted[token] = float("nan")
    result = run(BACKENDS[name], replace(case, **{where: tainted}))

    is_other_T = torch.arange(40) != token
    assert torch.equal(result.y_TD[is_other_T], clean.y_TD[is_other_T])
    assert torch.equal(result.dx_TD[is_other_T], clean.dx_TD[is_other_T])
    assert torch.equal(result.dweight_N[case.token_N != token], clean.dweight_N[case.token_N != token])
    visited = case.expert_N[case.token_N == token].tolist()
    others = [expert for expert in range(7) if expert not in visited]
    assert torch.equal(result.dgate_up_E2FD[others], clean.dgate_up_E2FD[others])
    assert torch.equal(result.ddown_EDF[others], clean.ddown_EDF[others])
    assert result.dgate_up_E2FD[3].isnan().any()


@pytest.mark.parametrize(("name", "dtype"), TRAINED)
def test_nothing_given_is_written_to_and_a_second_backward_pass_agrees(name: str, dtype: torch.dtype) -> None:
    case = make_case("some_unused", T=40, D=16, F=8, E=5, K=2, dtype=dtype, biases=True)
    tensors = {field.name: getattr(case, field.name) for field in fields(Case)}
    before = {name: tensor.clone() for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    leaves = leaves_of(case)
    y_TD = call(BACKENDS[name], case, leaves)
    first = torch.autograd.grad(y_TD, leaves, case.dy_TD, retain_graph=True)
    second = torch.autograd.grad(y_TD, leaves, case.dy_TD)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("routing", ["random", "repeated", "ragged"])
@pytest.mark.parametrize("name", FLOAT32)
def test_repeated_runs_are_equal_to_the_bit(name: str, routing: str) -> None:
    case = make_case(routing, T=200, D=32, F=16, E=4, K=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = run(BACKENDS[name], case)
        for _ in range(5):
            assert_same(run(BACKENDS[name], case), first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", FLOAT32)
def test_strided_inputs_and_gradients_are_taken(name: str) -> None:
    case = make_case(T=20, D=16, F=8, E=5, K=2)
    x_T2D = torch.randn(21, 32)
    x_T2D[1:, ::2] = case.x_TD
    strided = replace(
        case,
        x_TD=x_T2D[1:, ::2],
        weight_N=torch.stack((case.weight_N, case.weight_N), 1)[:, 1],
        gate_up_E2FD=case.gate_up_E2FD.mT.contiguous().mT,
        down_EDF=case.down_EDF.mT.contiguous().mT,
        dy_TD=torch.tensor([[0.7]]).expand(20, 16),
    )
    plain = replace(case, dy_TD=torch.full((20, 16), 0.7))
    assert not any(t.is_contiguous() for t in (strided.x_TD, strided.weight_N, strided.gate_up_E2FD))
    assert_close(run(BACKENDS[name], strided), run_reference(plain), tolerance=TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", FLOAT32)
def test_gradient_of_one_input_does_not_need_the_others(name: str) -> None:
    case = make_case(T=20, D=16, F=8, E=5, K=2)
    all_grads = run(BACKENDS[name], case)
    wanted = (all_grads.dx_TD, all_grads.dweight_N, all_grads.dgate_up_E2FD, all_grads.ddown_EDF)
    for position, gradient in enumerate(wanted):
        leaves = [t.clone() for t in (case.x_TD, case.weight_N, case.gate_up_E2FD, case.down_EDF)]
        leaves[position].requires_grad_()
        y_TD = call(BACKENDS[name], case, leaves)
        (alone,) = torch.autograd.grad(y_TD, [leaves[position]], case.dy_TD)
        assert torch.equal(alone, gradient)


@pytest.mark.parametrize(("name", "dtype"), TRAINED)
def test_inference_gives_the_same_output_and_no_graph(name: str, dtype: torch.dtype) -> None:
    case = make_case(T=40, D=16, F=8, E=5, K=2, dtype=dtype)
    trained = run(BACKENDS[name], case)
    leaves = leaves_of(case)
    with torch.no_grad():
        y_TD = call(BACKENDS[name], case, leaves)
    assert y_TD.grad_fn is None
    assert torch.equal(y_TD, trained.y_TD)


@pytest.mark.parametrize("name", FLOAT32)
def test_recomputation_in_the_backward_pass_gives_the_same_gradients(name: str) -> None:
    case = make_case("some_unused", T=40, D=16, F=8, E=5, K=2)
    plain = run(BACKENDS[name], case)
    leaves = leaves_of(case)

    def layer(*leaves: Tensor) -> Tensor:
        return call(BACKENDS[name], case, leaves)

    y_TD = checkpoint(layer, *leaves, use_reentrant=False)
    assert_same(Result(y_TD.detach(), *torch.autograd.grad(y_TD, leaves, case.dy_TD)), plain)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("name", BACKENDS)
def test_cuda_result_equals_the_reference(name: str, dtype: torch.dtype, tolerance: float) -> None:
    reason = BACKENDS[name].refusal(device=torch.device("cuda"), dtype=dtype, widths=(40, 24))
    if reason is not None:
        pytest.skip(reason)
    for routing in ROUTINGS:
        case = make_case(routing, T=130, D=40, F=24, E=3, K=2, dtype=dtype, device="cuda")
        assert_close(run(BACKENDS[name], case), run_reference(case), tolerance=tolerance)
