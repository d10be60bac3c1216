"""The torch operations around the kernels: sums into buffers, opcheck, torch.compile, checkpoints, autocast."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from kernel_runs import Tiled, embedded, routed_of
from moe_kernels.backends import BACKENDS
from moe_kernels.experts import experts_bwd, experts_fwd, schedule_rows
from moe_kernels.spec import ExpertSpec
from moe_kernels.testing import (
    Case,
    Result,
    assert_close,
    assert_same,
    call,
    leaves_of,
    make_case,
    poisoned_memory,
    rms_ratio,
    run,
)

MIXED = ExpertSpec(activation="gpt_oss", gate_up="interleaved", weights="in_out")  # GPT-OSS as it is stored
EVERY_GRADIENT = [True] * 6


def forward_arguments(case: Case, tiles: str) -> tuple[Any, ...]:
    """Return the arguments of experts_fwd."""
    routed = routed_of(case, tiles)
    rows = (routed.schedule.tensors(), routed.rows.first_T1, routed.rows.row_N, routed.rows.fan_out)
    biases = (case.gate_up_bias_E2F, case.down_bias_ED)
    given = (case.x_TD, case.weight_N, case.gate_up_E2FD, case.down_EDF, *biases)
    return (*given, *rows, case.spec.name, tiles, True)


def backward_arguments(case: Case, tiles: str, *, sums: tuple[Tensor | None, Tensor | None]) -> tuple[Any, ...]:
    """Return the arguments of experts_bwd, H among them."""
    *given, _ = forward_arguments(case, tiles)
    _, h_NH = experts_fwd(*given, True)
    return (case.dy_TD, *given[:6], h_NH, *given[6:], EVERY_GRADIENT, *sums)


@pytest.mark.parametrize("weights", ["out_in", "in_out"])
@pytest.mark.parametrize("gate_up", ["concatenated", "interleaved"])
def test_weight_gradients_are_added_to_the_buffers_given(dtype, weights, gate_up, tiles) -> None:
    case = make_case(
        "half_empty", T=19, D=24, F=8, E=3, K=2, dtype=dtype, spec=ExpertSpec(weights=weights, gate_up=gate_up)
    )
    plain = experts_bwd(*backward_arguments(case, tiles, sums=(None, None)))
    sums = [embedded(torch.randn(weight.shape)) for weight in (case.gate_up_E2FD, case.down_EDF)]
    before = [total._base.clone() for total in sums]
    given = backward_arguments(case, tiles, sums=tuple(sums))
    added = experts_bwd(*given)
    inner = (slice(16, -16),) * 3
    for position, (total, base) in enumerate(zip(sums, before, strict=True), start=2):
        assert added[position].numel() == 0
        # the gradient itself is rounded to the dtype of the weight where it is returned, not where it is added
        difference = total - base[inner]
        assert rms_ratio(difference, plain[position]) < (1e-6 if dtype == torch.float32 else 3e-4)
        assert torch.equal(total[1], base[inner][1]) and not torch.equal(total[0], base[inner][0])
        base[inner] = total
        assert torch.allclose(total._base, base, rtol=0, atol=0, equal_nan=True)
    for position in (0, 1):
        assert torch.equal(added[position], plain[position])
    experts_bwd(*given)
    twice = [total - base[inner] for total, base in zip(sums, before, strict=True)]
    assert all(rms_ratio(got, want) < 1e-3 for got, want in zip(twice, plain[2:4], strict=True))


def test_opcheck_finds_nothing() -> None:
    # every row is in use, or the rows past the last one would hold whatever their memory held
    case = make_case("ragged", T=5, D=8, F=4, E=3, K=2, spec=MIXED, biases=True)
    with poisoned_memory():  # tiles past the last one too would differ from run to run
        torch.library.opcheck(schedule_rows, (case.token_N, case.expert_N, 3, 16))
    given = forward_arguments(case, "interpreter")
    leaves = [tensor.requires_grad_() if isinstance(tensor, Tensor) else tensor for tensor in given[:6]]
    torch.library.opcheck(experts_fwd, (*leaves, *given[6:]))
    case = make_case("ragged", T=5, D=8, F=4, E=3, K=2, spec=MIXED, biases=True)
    sums = (torch.randn(case.gate_up_E2FD.shape), None)
    torch.library.opcheck(experts_bwd, backward_arguments(case, "interpreter", sums=sums))


def test_compiled_layer_equals_the_plain_one_in_one_graph_for_any_number_of_tokens() -> None:
    def layer(case: Case, *leaves: Tensor) -> Tensor:
        return call(BACKENDS["triton"], case, [2 * leaf for leaf in leaves])

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    before = counters["stats"]["unique_graphs"]
    for T in (5, 9):
        case = make_case("some_unused", T=T, D=8, F=4, E=3, K=2, spec=MIXED, biases=True)
        leaves, results = leaves_of(case), []
        for function in (layer, compiled):
            y_TD = function(case, *leaves)
            results.append(Result(y_TD.detach(), *torch.autograd.grad(y_TD, leaves, case.dy_TD)))
        assert_same(results[1], results[0])
    assert counters["stats"]["unique_graphs"] == before + 1


def test_checkpointed_layer_gives_the_same_gradients(tiles) -> None:
    case = make_case("some_unused", T=9, D=24, F=8, E=3, K=2, spec=MIXED, biases=True)
    leaves = leaves_of(case)
    y_TD = checkpoint(lambda *leaves: call(Tiled(tiles), case, leaves), *leaves, use_reentrant=False)
    assert_same(Result(y_TD.detach(), *torch.autograd.grad(y_TD, leaves, case.dy_TD)), run(Tiled(tiles), case))


def test_autocast_casts_tokens_and_expert_weights_and_leaves_row_weights(tiles) -> None:
    # float16, which torch's autocast takes on a CPU too: the interpreter computes wrongly in bfloat16
    case = make_case("some_unused", T=9, D=24, F=8, E=3, K=2, spec=MIXED, biases=True)
    names = ("x_TD", "gate_up_E2FD", "down_EDF", "gate_up_bias_E2F", "down_bias_ED", "dy_TD")
    half = replace(case, **{name: getattr(case, name).half() for name in names})
    leaves = leaves_of(case)
    with torch.autocast("cpu", torch.float16):
        y_TD = call(Tiled(tiles), case, leaves)
    assert y_TD.dtype == torch.float16
    gradients = torch.autograd.grad(y_TD, leaves, half.dy_TD)
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert_close(Result(y_TD.detach(), *gradients), run(Tiled(tiles), half), tolerance=0)
