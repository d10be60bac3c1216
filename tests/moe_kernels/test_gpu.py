"""What only a GPU can show of the kernels: bfloat16, races, syncs, graphs, sizes beyond 2^31. `pytest -m gpu`.

Three yardsticks for bfloat16: a float64 computation that rounds where the kernels store (1e-3), the reference in
float64 beside torch's own bfloat16 path (twice its error), and a bound per element for the plain product.
"""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_kernels.backends import BACKENDS
from moe_kernels.spec import PLAIN, ExpertSpec
from moe_kernels.testing import (
    Case,
    Result,
    assert_close,
    assert_same,
    call,
    leaves_of,
    make_case,
    rms_ratio,
    run,
    run_mirrored,
    run_reference,
    saved_bytes,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
TRITON = BACKENDS["triton"]
SHAPES = {  # T, D, F, E, K
    "aligned": (200, 256, 128, 8, 2),
    "block_edges": (129, 192, 320, 5, 3),
    "odd": (67, 97, 51, 7, 2),
    "one_token": (1, 64, 64, 4, 2),
    "more_experts_than_rows": (11, 64, 128, 127, 3),
    "every_expert": (65, 128, 64, 4, 4),
}
SPECS = (
    PLAIN,
    ExpertSpec(activation="geglu", gate_up="interleaved", saved="X"),
    ExpertSpec(activation="gpt_oss", gate_up="interleaved", weights="in_out"),
    ExpertSpec(activation="relu2", weights="in_out"),
)


def case_of(shape: str, routing: str = "random", dtype: torch.dtype = torch.bfloat16, **options) -> Case:
    T, D, F, E, K = SHAPES[shape]
    return make_case(routing, T=T, D=D, F=F, E=E, K=K, dtype=dtype, device="cuda", **options)


@pytest.mark.parametrize("routing", ["random", "skewed", "ragged", "some_unused", "all_to_last", "half_empty"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_equals_float64_that_rounds_where_the_kernels_store(shape, routing):
    case = case_of(shape, routing)
    assert_close(run(TRITON, case), run_mirrored(case, rounds_da=False), tolerance=1e-3)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_spec_equals_the_reference_and_is_no_worse_than_the_plain_loop(spec, dtype):
    case = case_of("aligned", dtype=dtype, spec=spec, biases=True)
    result, exact, plain = run(TRITON, case), run_reference(case), run(BACKENDS["naive"], case)
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 3e-6}[dtype]
    # a clamp's gradient jumps, and rounding carries a few products over the limit: the plain loop is as far off
    assert_close(result, exact, tolerance=tolerance * (2 if spec.activation == "gpt_oss" else 1))
    for field in fields(Result):
        got, loop, want = (getattr(r, field.name) for r in (result, plain, exact))
        assert rms_ratio(got, want) <= 2 * rms_ratio(loop, want) + 1e-5, field.name


def test_gradients_equal_differences_along_a_direction():
    case = case_of("block_edges", dtype=torch.float32)
    leaves = leaves_of(case)
    gradients = torch.autograd.grad(call(TRITON, case, leaves), leaves, case.dy_TD)
    draw = torch.Generator().manual_seed(5)
    for position, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        direction = torch.randn(leaf.shape, generator=draw).to(leaf)
        step = 1e-2 * leaf.norm() / direction.norm()

        def value(sign: int, position: int = position, shift: Tensor = step * direction) -> float:
            moved = [leaf + sign * shift if i == position else leaf for i, leaf in enumerate(leaves)]
            with torch.no_grad():
                return (call(TRITON, case, moved).double() * case.dy_TD.double()).sum().item()

        slope = (value(1) - value(-1)) / (2 * step.item())
        assert slope == pytest.approx((gradient.double() * direction.double()).sum().item(), rel=5e-3)


@pytest.mark.parametrize("routing", ["random", "ragged"])
def test_fifty_runs_are_equal_to_the_bit_beside_a_busy_stream(routing):
    case = case_of("block_edges", routing)
    first = run(TRITON, case)
    other = torch.cuda.Stream()
    hog = torch.randn(2048, 2048, device="cuda")
    for _ in range(50):
        with torch.cuda.stream(other):
            hog @ hog
        dirty = torch.full((1 << 20,), float("nan"), device="cuda")
        del dirty
        assert_same(run(TRITON, case), first)


def test_nothing_waits_for_the_device():
    case = case_of("aligned", "ragged")
    leaves = leaves_of(case)
    run(TRITON, case)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y_TD = call(TRITON, case, leaves)
        torch.autograd.grad(y_TD, leaves, case.dy_TD)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_is_replayed_with_other_routing():
    case = case_of("aligned")
    leaves = leaves_of(case)
    expert_N = case.expert_N.clone()
    static = replace(case, expert_N=expert_N)

    def step() -> tuple[Tensor, ...]:
        y_TD = call(TRITON, static, leaves)
        return (y_TD, *torch.autograd.grad(y_TD, leaves, static.dy_TD))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for routing in ("skewed", "all_to_last", "some_unused"):
        other = case_of("aligned", routing)
        expert_N.copy_(other.expert_N)
        graph.replay()
        expected = run(TRITON, replace(case, expert_N=other.expert_N.clone()))
        for got, field in zip(captured, fields(Result), strict=False):
            assert torch.equal(got, getattr(expected, field.name)), (routing, field.name)


def test_saved_bytes_are_h_and_the_schedule():
    case = case_of("aligned")
    N, H = case.expert_N.numel(), 2 * case.down_EDF.shape[2]
    kept = saved_bytes(TRITON, case)
    E = case.down_EDF.shape[0]
    schedule = 4 * (E + 1 + 3 * N + 2 * (-(-N // 64) + E) + 1)
    assert 2 * N * H <= kept <= 2 * N * H + schedule


@pytest.mark.parametrize("name", ["rows", "weights"])
def test_sizes_beyond_two_to_the_31(name):
    # R * 2F and E * 2F * D elements beyond 2^31; only sampled rows are compared
    T, D, F, E, K = {"rows": (140_000, 64, 1024, 8, 8), "weights": (512, 2112, 1024, 512, 2)}[name]
    need = 3 * (T * K * 2 * F + 3 * E * F * D) * 2
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of free GPU memory")
    draw = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=draw, device="cuda", dtype=torch.bfloat16).mul_(scale)

    x_TD, gate_up, down = normal(T, D), normal(E, 2 * F, D, scale=D**-0.5), normal(E, D, F, scale=F**-0.5)
    token_N = torch.arange(T, device="cuda").repeat_interleave(K)
    expert_N = (torch.arange(T * K, device="cuda") * 7919) % E
    weight_N = torch.rand(T * K, generator=draw, device="cuda")
    assert max(T * K * 2 * F, E * 2 * F * D) > 2**31
    leaves = [tensor.requires_grad_() for tensor in (x_TD, weight_N, gate_up, down)]
    y_TD = TRITON(x_TD, token_N, expert_N, *leaves[1:], fan_out=K)
    dy_TD = normal(T, D)
    dx_TD, *_ = torch.autograd.grad(y_TD, leaves, dy_TD)
    sample = torch.tensor([0, 1, T // 2, T - 2, T - 1], device="cuda")
    rows = (sample[:, None] * K + torch.arange(K, device="cuda")).flatten()
    small = Case(
        x_TD=x_TD.detach()[sample],
        token_N=torch.arange(len(sample), device="cuda").repeat_interleave(K),
        expert_N=expert_N[rows],
        weight_N=weight_N.detach()[rows],
        gate_up_E2FD=gate_up.detach(),
        down_EDF=down.detach(),
        dy_TD=dy_TD[sample],
        fan_out=K,
    )
    used_E = small.expert_N.unique()
    small = replace(
        small,
        expert_N=torch.searchsorted(used_E, small.expert_N),
        gate_up_E2FD=small.gate_up_E2FD[used_E],
        down_EDF=small.down_EDF[used_E],
    )
    expected = run_reference(small)
    assert rms_ratio(y_TD[sample], expected.y_TD) < 1e-2
    assert rms_ratio(dx_TD[sample], expected.dx_TD) < 1e-2


def test_compiled_and_checkpointed_layers_give_the_same_bits():
    case = case_of("aligned")
    plain, leaves = run(TRITON, case), leaves_of(case)
    compiled = torch.compile(lambda *leaves: call(TRITON, case, leaves), fullgraph=True)
    y_TD = compiled(*leaves)
    gradients = torch.autograd.grad(y_TD, leaves, case.dy_TD)
    assert torch.equal(y_TD, plain.y_TD)
    assert torch.equal(gradients[0], plain.dx_TD)
    again = checkpoint(lambda *leaves: call(TRITON, case, leaves), *leaves, use_reentrant=False)
    gradients = torch.autograd.grad(again, leaves, case.dy_TD)
    assert torch.equal(again, plain.y_TD)
    assert torch.equal(gradients[0], plain.dx_TD)


def test_autocast_runs_float32_layers_in_bfloat16():
    case = case_of("aligned", dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        y_TD = call(TRITON, case, leaves_of(case))
    assert y_TD.dtype == torch.bfloat16
    assert rms_ratio(y_TD, run_reference(case).y_TD) < 1e-2


def test_many_row_counts_compile_few_kernels():
    from moe_kernels.grouped_gemm import grouped_matmul_fwd_kernel

    def variants() -> int:
        return sum(len(cache[0]) for cache in grouped_matmul_fwd_kernel.device_caches.values())

    run(TRITON, make_case(T=300, D=64, F=96, E=4, K=2, dtype=torch.bfloat16, device="cuda"))
    before = variants()
    for T in range(301, 401):
        run(TRITON, make_case(T=T, D=64, F=96, E=4, K=2, dtype=torch.bfloat16, device="cuda"))
    assert variants() - before <= 2
