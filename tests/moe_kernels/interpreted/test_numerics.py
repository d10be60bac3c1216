"""Numbers of single kernels: componentwise error bounds, the same A in both passes, finite differences in float64."""

import pytest
import torch
from torch import Tensor

from kernel_runs import Tiled, embedded, guarded_memory
from moe_kernels import combine
from moe_kernels.combine import TokenRows
from moe_kernels.experts import first_weights, second_weights
from moe_kernels.experts_down_bwd import down_bwd
from moe_kernels.experts_up import up
from moe_kernels.grouped_gemm import Weights, grouped_matmul, grouped_matmul_bwd_weight, segment_sum
from moe_kernels.route import schedule_rows
from moe_kernels.spec import ExpertSpec
from moe_kernels.testing import call, leaves_of, make_case
from moe_kernels.tiles import table

# half a unit in the last place of what is stored
ROUNDING = {torch.float16: 2.0**-11, torch.float32: 2.0**-24}
# three experts with 17, 0 and 33 of 55 rows; the others are in no expert
COUNTS = torch.tensor([17, 0, 33, 5])


def assert_within_rounding(actual: Tensor, left: Tensor, right: Tensor, *, bias: Tensor | float = 0.0) -> None:
    """Hold left @ right, summed in float32 and rounded once, to the bound of every element of the product."""
    left, right = left.double(), right.double()
    exact = left @ right + bias
    # 8 sqrt(K) 2^-24 of the sum of absolute values: what float32 sums of K products may be off, with a margin
    noise = 8 * left.shape[-1] ** 0.5 * 2.0**-24 * (left.abs() @ right.abs() + abs(bias))
    bound = ROUNDING[actual.dtype] * exact.abs() + noise + torch.finfo(actual.dtype).tiny
    worst = ((actual.double() - exact).abs() / bound).max().item() if actual.numel() else 0.0
    assert worst <= 1, f"{worst:.2f} times the bound"


def rows_of_counts() -> tuple[Tensor, Tensor]:
    """Return token_N and expert_N of 55 rows for 3 experts, shuffled; the token of row n is n * 7 mod 29."""
    expert_N = torch.arange(4).repeat_interleave(COUNTS)
    return torch.arange(55) * 7 % 29, expert_N[torch.randperm(55, generator=torch.Generator().manual_seed(3))]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("layout", ["k_inner", "n_inner", "halves"])
@pytest.mark.parametrize("gathers", [False, True])
def test_grouped_matmul_keeps_the_error_bound_of_every_element(dtype, layout: str, gathers: bool, tiles: str) -> None:
    N, K = (24, 40) if tiles == "interpreter_tma" else (17, 33)
    halves = 2 if layout == "halves" else 1
    token_N, expert_N = rows_of_counts()
    a = embedded(torch.randn(29 if gathers else 55, halves * K).to(dtype))
    b_ENK = torch.randn(3, N, halves * K).to(dtype)
    bias_EN = torch.randn(3, N).to(dtype)
    with guarded_memory():
        schedule = schedule_rows(token_N, expert_N, 3, block_m=16)
        if layout == "n_inner":
            tensor = embedded(b_ENK.mT)
            e, k, n = tensor.stride()
        else:
            tensor = embedded(b_ENK)
            e, n, k = tensor.stride()
        weights = Weights(tensor, (3, halves, N, K), (e, K * k, n, k))
        gather_N = schedule.token_N if gathers else None
        tile = table()[tiles].tiles["matmul"]
        y_RN = grouped_matmul(a, weights, schedule, tile, gather_N=gather_N, bias_EN=bias_EN)
    assert y_RN.dtype == dtype
    offsets = schedule.offset_E1.tolist()
    for e in range(3):
        rows = slice(offsets[e], offsets[e + 1])
        a_RK = a[schedule.token_N[rows].long()] if gathers else a[rows]
        assert_within_rounding(y_RN[rows], a_RK, b_ENK[e].T, bias=bias_EN[e].double())


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("M", "N", "adds"), [(16, 32, False), (17, 24, True), (33, 16, False)])
@pytest.mark.parametrize("gathers", ["p", "q", "neither"])
def test_weight_gradients_keep_the_error_bound_of_every_element(dtype, M: int, N: int, adds, gathers: str) -> None:
    halves = 2 if gathers == "q" else 1
    token_N, expert_N = rows_of_counts()
    # rows past those in use are NaN: nothing of them may be read into a product
    p, q = torch.randn(55, halves * M).to(dtype), torch.randn(55, N).to(dtype)
    (q if gathers == "p" else p)[50:] = float("nan")
    if gathers == "neither":
        q[50:] = float("nan")
    p, q = embedded(p), embedded(q)
    before = torch.randn(3, halves * M, N)
    out = embedded(before) if adds else embedded(torch.full((3, halves * M, N), float("nan"), dtype=dtype))
    outside = out._base.clone()
    with guarded_memory():
        schedule = schedule_rows(token_N, expert_N, 3, block_m=16)
        e, m, _ = out.stride()
        weights, tile = Weights(out, (3, halves, M, N), (e, M * m, m, 1)), table()["interpreter"].tiles["weight_bwd"]
        gathered = {"gather_p": gathers == "p", "gather_q": gathers == "q"}
        grouped_matmul_bwd_weight(p, q, weights, schedule, tile, **gathered, accumulate=adds)
    offsets, token_R = schedule.offset_E1.tolist(), schedule.token_N.long()
    for e in range(3):
        rows = slice(offsets[e], offsets[e + 1])
        p_RM = p[token_R[rows]] if gathers == "p" else p[rows]
        q_RN = q[token_R[rows]] if gathers == "q" else q[rows]
        assert_within_rounding(out[e], p_RM.T, q_RN, bias=before[e].double() if adds else 0.0)
    assert torch.equal(out[1], before[1]) if adds else out[1].count_nonzero() == 0
    outside[16:-16, 16:-16, 16:-16] = out._base[16:-16, 16:-16, 16:-16]
    assert torch.equal(outside.isnan(), out._base.isnan())


@pytest.mark.parametrize("gathers", ["p", "q", "neither"])
def test_weight_gradients_end_with_the_segment_where_descriptors_read_and_programs_take_many_tiles(gathers) -> None:
    M, N, halves = 40, 24, 2 if gathers == "q" else 1
    token_N, expert_N = rows_of_counts()
    p, q = torch.randn(55, halves * M), torch.randn(55, N)
    tile = table()["interpreter_tma"].tiles["weight_bwd"]
    assert tile.use_tma and tile.flatten
    schedule = schedule_rows(token_N, expert_N, 3, block_m=16)
    offsets, token_R = schedule.offset_E1.tolist(), schedule.token_N.long()
    # the last expert's rows are NaN in what is read by descriptor: the first one's must not see them
    for rows in [rows for rows, name in ((p, "p"), (q, "q")) if name != gathers]:
        rows[offsets[2] :] = float("nan")
    out = torch.full((3, halves * M, N), float("nan"))
    weights = Weights(out, (3, halves, M, N), (halves * M * N, M * N, N, 1))
    gathered = {"gather_p": gathers == "p", "gather_q": gathers == "q"}
    grouped_matmul_bwd_weight(p, q, weights, schedule, tile, **gathered)
    rows = slice(offsets[0], offsets[1])
    p_RM = p[token_R[rows]] if gathers == "p" else p[rows]
    q_RN = q[token_R[rows]] if gathers == "q" else q[rows]
    assert_within_rounding(out[0], p_RM.T, q_RN)
    assert out[1].count_nonzero() == 0
    assert out[2].isnan().all()


@pytest.mark.parametrize("dtype", ROUNDING)
def test_segment_sums_keep_the_error_bound_of_every_element(dtype) -> None:
    token_N, expert_N = rows_of_counts()
    a_RW, dy_TW = torch.randn(55, 19).to(dtype), embedded(torch.randn(29, 19).to(dtype))
    a_RW[50:] = float("nan")
    scale_N = torch.rand(55).masked_fill(expert_N == 3, float("nan"))
    with guarded_memory():
        schedule = schedule_rows(token_N, expert_N, 3, block_m=16)
        plain_EW, scaled_EW = segment_sum(a_RW, schedule), segment_sum(dy_TW, schedule, scale_N=scale_N)
    for e in range(3):
        row_R = (expert_N == e).nonzero()[:, 0]
        start, stop = schedule.offset_E1[e : e + 2].tolist()
        assert_within_rounding(plain_EW[e : e + 1], torch.ones(1, stop - start), a_RW[start:stop])
        assert_within_rounding(scaled_EW[e : e + 1], scale_N[None, row_R], dy_TW[token_N[row_R]])


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("fan_out", [3, 33])  # with the rows of a token unrolled, and in a loop
def test_combine_keeps_the_error_bound_of_every_element(dtype, fan_out: int) -> None:
    y_RD, weight_N = torch.randn(2 * fan_out, 19).to(dtype), torch.rand(2 * fan_out)
    position_N = torch.randperm(2 * fan_out).int()
    position_N[1], weight_N[1] = -1, float("nan")
    with guarded_memory():
        out_TD = combine.combine(y_RD, position_N, TokenRows(fan_out=fan_out), num_tokens=2, weight_N=weight_N)
    for token in range(2):
        row_K = [row for row in range(token * fan_out, (token + 1) * fan_out) if row != 1]
        assert_within_rounding(out_TD[None, token], weight_N[None, row_K], y_RD[position_N[row_K].long()])


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gpt_oss", "relu2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_backward_pass_makes_the_very_same_activation_as_the_forward_pass(activation, dtype, tiles) -> None:
    spec = ExpertSpec(activation=activation)
    case = make_case("some_unused", T=17, D=24, F=40, E=3, K=2, dtype=dtype, spec=spec)
    schedule, entry = schedule_rows(case.token_N, case.expert_N, 3, block_m=16), table()[tiles].tiles
    first, second = first_weights(case.gate_up_E2FD, spec), second_weights(case.down_EDF, spec)
    h_NH, a_NF = up(case.x_TD, first, schedule, entry["up"], spec=spec, bias_EH=None, keep_hidden=True)
    one_N = torch.ones_like(case.weight_N)
    _, again_NF, _ = down_bwd(
        case.dy_TD, second.transposed(), h_NH, one_N, schedule, entry["down_bwd"], spec=spec, bias_ED=None
    )
    R = int(schedule.offset_E1[-1])
    assert 0 < R < h_NH.shape[0] and torch.equal(a_NF[:R], again_NF[:R])


@pytest.mark.parametrize(
    ("form", "tiles"),
    [
        ("swiglu/concatenated/H", "interpreter"),
        ("geglu/interleaved/X", "interpreter_tma"),
        ("gpt_oss/interleaved/H", "interpreter_tma"),
        ("relu2/concatenated/H", "interpreter"),
    ],
)
def test_gradients_of_the_kernels_equal_finite_differences(form: str, tiles: str) -> None:
    activation, gate_up, saved = form.split("/")
    weights = "in_out" if activation in ("gpt_oss", "relu2") else "out_in"
    spec = ExpertSpec(activation=activation, gate_up=gate_up, weights=weights, saved=saved)
    case = make_case("some_unused", T=5, D=6, F=4, E=3, K=2, dtype=torch.float64, spec=spec, biases=True)
    # fast mode: the gradients are compared along random directions, for a few calls and not several hundred
    assert torch.autograd.gradcheck(
        lambda *leaves: call(Tiled(tiles), case, leaves), leaves_of(case), fast_mode=True, check_undefined_grad=False
    )
