"""The fused experts against the reference: every form, routing, shape and dtype, any two of them together."""

import pytest
import torch

from kernel_runs import Tiled, pairwise
from moe_kernels import launch
from moe_kernels.spec import ExpertSpec
from moe_kernels.testing import ROUTINGS, assert_close, make_case, run, run_mirrored, run_reference

# float16: a chain of four roundings of 2^-11; run_mirrored below holds it to far less
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 3e-3}
# T, D, F, E, K; a tile has 16 rows. Descriptors are made where D and F are multiples of 4 (float32) or 8 (float16)
SHAPES = {
    "no_token": (0, 8, 4, 3, 2),
    "one_token": (1, 8, 24, 3, 2),
    "block_less_one": (15, 24, 8, 2, 1),
    "block": (16, 40, 16, 2, 1),
    "block_and_one": (17, 16, 40, 2, 1),
    "every_expert": (9, 24, 8, 4, 4),
    "widths_of_one": (7, 1, 1, 2, 1),
    "odd_widths": (29, 17, 13, 5, 3),
    "odd_hidden_width": (11, 8, 17, 3, 2),
    "more_experts_than_rows": (5, 24, 8, 7, 1),
}
FORMS = pairwise(
    {
        "activation": ("swiglu", "geglu", "gpt_oss", "relu2"),
        "gate_up": ("concatenated", "interleaved"),
        "weights": ("out_in", "in_out"),
        "saved": ("H", "X"),
        "biases": (True, False),
        "tiles": ("interpreter", "interpreter_tma"),
        "dtype": tuple(TOLERANCE),
        "routing": ROUTINGS,
        "shape": tuple(SHAPES),
    },
    apart=("activation", "routing", "shape"),
)


def named(form: dict) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in form.values())


@pytest.mark.parametrize("form", FORMS, ids=named)
def test_output_and_every_gradient_equal_the_reference(form: dict) -> None:
    T, D, F, E, K = SHAPES[form["shape"]]
    spec = ExpertSpec(**{name: form[name] for name in ("activation", "gate_up", "weights", "saved")})
    options = {"dtype": form["dtype"], "spec": spec, "biases": form["biases"], "seed": 5}
    case = make_case(form["routing"], T=T, D=D, F=F, E=E, K=K, **options)
    result = run(Tiled(form["tiles"]), case)
    if spec.activation == "gpt_oss" and form["dtype"] == torch.float16:
        # a rounding moves a value across a limit, where the gradient jumps; so the reference must round too
        assert_close(result, run_mirrored(case, rounds_da=False), tolerance=1e-3)
    else:
        assert_close(result, run_reference(case), tolerance=TOLERANCE[form["dtype"]])
    assert result.y_TD.dtype == result.dx_TD.dtype == result.ddown_EDF.dtype == form["dtype"]
    assert result.dweight_N.dtype == case.weight_N.dtype


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gpt_oss", "relu2"])
def test_float16_differs_from_exact_maths_by_the_roundings_of_what_is_stored(activation, tiles) -> None:
    biases = (tiles == "interpreter") == (activation in ("swiglu", "gpt_oss"))
    weights, gate_up = ("out_in", "interleaved") if biases else ("in_out", "concatenated")
    spec = ExpertSpec(activation=activation, weights=weights, gate_up=gate_up)
    case = make_case("some_unused", T=23, D=24, F=40, E=3, K=2, dtype=torch.float16, spec=spec, biases=biases)
    assert_close(run(Tiled(tiles), case), run_mirrored(case, rounds_da=False), tolerance=6e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_descriptors_are_read_where_memory_is_aligned_and_only_there(dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    described: list[int] = []
    original = launch.describe
    monkeypatch.setattr(launch, "describe", lambda *given: described.append(1) or original(*given))
    for weights in ("out_in", "in_out"):
        for gate_up in ("concatenated", "interleaved"):
            spec = ExpertSpec(weights=weights, gate_up=gate_up)
            case = make_case(T=5, D=24, F=8, E=2, K=1, dtype=dtype, spec=spec)
            described.clear()
            run(Tiled("interpreter_tma"), case)
            # up 1, down 2 (rows, weights), down_bwd 1, dx 2, and the operand that is not gathered of dW1 and of dW2
            assert len(described) == 8, spec
            described.clear()
            run(Tiled("interpreter"), case)
            run(Tiled("interpreter_tma"), make_case(T=5, D=9, F=7, E=2, K=1, dtype=dtype, spec=spec))
            assert not described
