"""Every backend in every form of expert: activations, layouts, biases, what is saved. The registry is walked."""

import functools
from dataclasses import replace
from itertools import product

import pytest
import torch

from moe_kernels.backends import BACKENDS, resolve_backend
from moe_kernels.spec import ExpertSpec
from moe_kernels.testing import (
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

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}
SPECS = [
    ExpertSpec(activation=activation, gate_up=gate_up, weights=weights, saved=saved)
    for activation, gate_up, weights, saved in product(
        ("swiglu", "geglu", "gpt_oss", "relu2"), ("concatenated", "interleaved"), ("out_in", "in_out"), ("H", "X")
    )
    if (activation, gate_up) != ("relu2", "interleaved")  # without a gate there is no order of halves
]
FORMS = list(product(SPECS, (False, True)))  # with and without biases
# five, so that walking them beside forms that differ in twos brings each to each value of each choice
HARD_ROUTINGS = ("some_unused", "ragged", "half_empty", "all_to_last", "repeated")
# T, D, F, 2F and E differ, so that no tensor fits in another's place; the second for what wants aligned rows
SHAPES = ({"T": 11, "D": 7, "F": 5, "E": 3, "K": 2}, {"T": 11, "D": 12, "F": 8, "E": 3, "K": 2})
MIXED = ExpertSpec(activation="gpt_oss", gate_up="interleaved", weights="in_out")  # GPT-OSS as it is stored


def named(form: tuple[ExpertSpec, bool]) -> str:
    spec, biases = form
    parts = (spec.activation, spec.gate_up, spec.weights, spec.saved, "biases" if biases else "plain")
    return "-".join(parts)


@functools.cache
def case_of(form: int, shape: int, dtype: torch.dtype) -> tuple[Case, Result]:
    spec, biases = FORMS[form]
    routing = HARD_ROUTINGS[form % len(HARD_ROUTINGS)]
    case = make_case(routing, **SHAPES[shape], dtype=dtype, spec=spec, biases=biases)
    return case, run_reference(case)


def shape_for(name: str, dtype: torch.dtype, spec: ExpertSpec) -> int:
    """Return the first of SHAPES that the backend runs, or skip the test."""
    for place, shape in enumerate(SHAPES):
        if runs_on_cpu(name, dtype, (shape["D"], shape["F"]), spec):
            return place
    pytest.skip(f"{name} does not run this on a CPU")


@pytest.mark.parametrize("form", range(len(FORMS)), ids=[named(form) for form in FORMS])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", BACKENDS)
def test_output_and_every_gradient_equal_the_reference(name: str, dtype: torch.dtype, form: int) -> None:
    case, truth = case_of(form, shape_for(name, dtype, FORMS[form][0]), dtype)
    result = run(BACKENDS[name], case)
    assert_close(result, truth, tolerance=TOLERANCE[dtype])
    assert {t.dtype for t in (result.y_TD, result.dgate_up_bias_E2F, result.ddown_bias_ED) if t is not None} == {dtype}


@pytest.mark.parametrize("spec", SPECS, ids=[named((spec, True)) for spec in SPECS])
@pytest.mark.parametrize("name", ["naive", "segments"])
def test_gradients_equal_finite_differences(name: str, spec: ExpertSpec) -> None:
    case = make_case(T=4, D=3, F=2, E=2, K=1, dtype=torch.float64, spec=spec, biases=True)
    assert torch.autograd.gradcheck(lambda *leaves: call(BACKENDS[name], case, leaves), leaves_of(case))


@pytest.mark.parametrize("name", BACKENDS)
def test_bfloat16_is_as_exact_as_the_plain_loop(name: str) -> None:
    # 1e-2 and 1.2 as for plain experts; 1.5 because grouped_mm takes no bias, so that H is rounded twice there.
    # gpt_oss is left out: one rounding moves a value across a limit.
    ratio = 1.5 if name == "torch_grouped" else 1.2
    for spec in (ExpertSpec(activation="geglu", weights="in_out"), ExpertSpec(activation="relu2", saved="X")):
        if not runs_on_cpu(name, torch.bfloat16, (40, 24), spec):
            pytest.skip(f"{name} does not run this on a CPU")
        case = make_case(T=65, D=40, F=24, E=3, K=2, dtype=torch.bfloat16, spec=spec, biases=True)
        exact, result, plain = run_reference(case), run(BACKENDS[name], case), run(BACKENDS["naive"], case)
        assert_close(result, exact, tolerance=1e-2)
        for field in Result.__dataclass_fields__:
            got, loop, want = (getattr(r, field) for r in (result, plain, exact))
            assert rms_ratio(got, want) <= ratio * rms_ratio(loop, want) + 1e-6, field


@pytest.mark.parametrize("saved", ["H", "X"])
@pytest.mark.parametrize("name", BACKENDS)
def test_empty_expert_gets_zero_gradient_in_its_biases_too(name: str, saved) -> None:
    spec = replace(MIXED, saved=saved)
    shape = SHAPES[shape_for(name, torch.float32, spec)]
    case = make_case("half_empty", **shape, spec=spec, biases=True)
    with poisoned_memory():
        result = run(BACKENDS[name], case)
    for gradient_E in (result.dgate_up_E2FD, result.ddown_EDF, result.dgate_up_bias_E2F, result.ddown_bias_ED):
        assert gradient_E is not None
        assert gradient_E[1].count_nonzero() == 0
        assert gradient_E[[0, 2]].count_nonzero() > 0


@pytest.mark.parametrize("routing", ["some_unused", "all_unused"])
@pytest.mark.parametrize("saved", ["H", "X"])
@pytest.mark.parametrize("name", BACKENDS)
def test_unused_rows_and_fresh_memory_never_matter(name: str, saved, routing: str) -> None:
    spec = replace(MIXED, saved=saved)
    shape = SHAPES[shape_for(name, torch.float32, spec)]
    case = make_case(routing, **shape, spec=spec, biases=True)
    plain = run(BACKENDS[name], case)
    with poisoned_memory():
        assert_same(run(BACKENDS[name], poison_unused(case)), plain)


@pytest.mark.parametrize("name", BACKENDS)
def test_one_bias_may_stand_alone_and_want_no_gradient(name: str) -> None:
    shape = SHAPES[shape_for(name, torch.float32, MIXED)]
    case = make_case("some_unused", **shape, spec=MIXED, biases=True)
    for absent in ("gate_up_bias_E2F", "down_bias_ED"):
        alone = replace(case, **{absent: None})
        assert_close(run(BACKENDS[name], alone), run_reference(alone), tolerance=TOLERANCE[torch.float32])
    whole = run(BACKENDS[name], case)
    leaves = [leaf.detach() for leaf in leaves_of(case)]
    leaves[-1].requires_grad_()
    y_TD = call(BACKENDS[name], case, leaves)
    (alone_ED,) = torch.autograd.grad(y_TD, leaves[-1], case.dy_TD)
    assert torch.equal(alone_ED, whole.ddown_bias_ED)
    frozen_TD = call(BACKENDS[name], case, [leaf.detach() for leaf in leaves])
    assert frozen_TD.grad_fn is None and torch.equal(frozen_TD, whole.y_TD)


def wrong_shapes(case: Case) -> list[tuple[dict, str]]:
    """Return changes to a case of T=11, D=12, F=8, E=3 that no longer fit, and the words they are refused with."""
    gate_up_ED2F, down_EFD = case.gate_up_E2FD.mT.contiguous(), case.down_EDF.mT.contiguous()
    long_ED, in_out, relu2 = torch.zeros(3, 13), ExpertSpec(weights="in_out"), ExpertSpec(activation="relu2")
    return [
        ({"gate_up_E2FD": gate_up_ED2F}, r"gate_up is \[3, 12, 16\], not \[3, 16, 12\], .*weights='out_in' ask"),
        ({"down_EDF": down_EFD}, r"down is \[3, 8, 12\], not \[E, 12, F\], .*change weights in the spec"),
        ({"spec": in_out}, r"down is \[3, 12, 8\], not \[E, F, 12\], .*weights='in_out'"),
        ({"spec": relu2}, r"gate_up is \[3, 16, 12\], not \[3, 8, 12\], .*'relu2'.*change the spec"),
        ({"down_EDF": case.down_EDF[:2]}, r"gate_up is \[3, 16, 12\], not \[2, 16, 12\], as E=2 and F=8 \(from down\)"),
        ({"down_EDF": case.down_EDF[0]}, r"down is \[12, 8\], not \[E, 12, F\]"),
        ({"gate_up_bias_E2F": long_ED}, r"gate_up_bias is \[3, 13\], not \[3, 16\]"),
        ({"down_bias_ED": long_ED}, r"down_bias is \[3, 13\], not \[3, 12\]"),
        ({"x_TD": case.x_TD[:, :4]}, r"down is \[3, 12, 8\], not \[E, 4, F\], as tokens of width 4"),
        ({"x_TD": case.x_TD[None]}, r"x is \[1, 11, 12\], not \[T, D\]; flatten"),
    ]


@pytest.mark.parametrize("name", BACKENDS)
def test_wrong_shapes_are_refused_with_value_limit_and_remedy(name: str) -> None:
    if not runs_on_cpu(name, torch.float32, (12, 8)):
        pytest.skip(f"{name} does not run on a CPU")
    case = make_case(**SHAPES[1], biases=True)
    for wrong, words in wrong_shapes(case):
        with pytest.raises(ValueError, match=words):
            run(BACKENDS[name], replace(case, **wrong))


def test_resolve_hands_the_spec_to_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    class Particular:
        def refusal(self, *, spec: ExpertSpec, **_: object) -> str | None:
            return None if spec.activation == "swiglu" else f"no {spec.activation}; use backend 'naive'"

    monkeypatch.setitem(BACKENDS._load(), "particular", Particular())
    device = torch.device("cpu")
    assert resolve_backend("particular", device, torch.float32)[0] == "particular"
    with pytest.raises(ValueError, match="'particular' cannot run on cpu .*no relu2; use backend 'naive'"):
        resolve_backend("particular", device, torch.float32, spec=ExpertSpec(activation="relu2"))


@pytest.mark.parametrize("name", [name for name in BACKENDS if runs_on_cpu(name, torch.float64)])
def test_ranges_of_experts_and_of_tokens_sum_to_the_whole(name: str) -> None:
    T, E, K = 9, 5, 2
    case = make_case("some_unused", T=T, D=6, F=4, E=E, K=K, dtype=torch.float64)
    whole = run(BACKENDS[name], case)
    y_TD = torch.zeros_like(whole.y_TD)
    for first, last in ((0, 2), (2, 5)):
        for start, stop in ((0, 4), (4, 9)):
            rows = slice(start * K, stop * K)
            expert_N = case.expert_N[rows] - first
            part = replace(
                case,
                x_TD=case.x_TD[start:stop],
                token_N=case.token_N[rows] - start,
                expert_N=expert_N.where((expert_N >= 0) & (expert_N < last - first), last - first),
                weight_N=case.weight_N[rows],
                gate_up_E2FD=case.gate_up_E2FD[first:last],
                down_EDF=case.down_EDF[first:last],
                dy_TD=case.dy_TD[start:stop],
            )
            y_TD[start:stop] += run(BACKENDS[name], part).y_TD
    assert rms_ratio(y_TD, whole.y_TD) < 1e-14
