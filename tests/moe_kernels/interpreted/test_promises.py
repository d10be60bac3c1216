"""What the fused experts promise beyond numbers: equal bits, untouched memory, any strides, exact zeros, few bytes."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from kernel_runs import Tiled, embedded, guarded_memory, routed_of
from moe_kernels import launch
from moe_kernels.spec import ExpertSpec
from moe_kernels.testing import (
    Case,
    assert_close,
    assert_same,
    call,
    leaves_of,
    make_case,
    poison_unused,
    run,
    run_reference,
    saved_bytes,
)
from moe_kernels.tiles import table

MIXED = ExpertSpec(activation="gpt_oss", gate_up="interleaved", weights="in_out")  # GPT-OSS as it is stored
SPLIT = ExpertSpec(activation="geglu", gate_up="interleaved", saved="X")
WEIGHTS = ("gate_up_E2FD", "down_EDF", "gate_up_bias_E2F", "down_bias_ED")


def test_renumbering_tokens_renumbers_the_output_to_the_bit(dtype, tiles) -> None:
    case = make_case("some_unused", T=19, D=24, F=8, E=3, K=2, dtype=dtype)
    order_T = torch.randperm(19)

    def moved_N(tensor_N: Tensor) -> Tensor:
        return tensor_N.view(19, 2)[order_T].flatten()

    rows = {"expert_N": moved_N(case.expert_N), "weight_N": moved_N(case.weight_N)}
    moved = run(Tiled(tiles), replace(case, x_TD=case.x_TD[order_T], dy_TD=case.dy_TD[order_T], **rows))
    plain = run(Tiled(tiles), case)
    assert torch.equal(moved.y_TD, plain.y_TD[order_T])
    assert torch.equal(moved.dx_TD, plain.dx_TD[order_T])
    assert torch.equal(moved.dweight_N, moved_N(plain.dweight_N))


def test_renumbering_experts_renumbers_their_gradients_to_the_bit(tiles) -> None:
    case = make_case("some_unused", T=19, D=24, F=8, E=5, K=2, spec=MIXED, biases=True)
    new_E1 = torch.tensor([3, 0, 4, 2, 1, 5])  # 5 marks unused rows and stays
    old_E = new_E1[:5].argsort()
    weights = {name: getattr(case, name)[old_E] for name in WEIGHTS}
    moved, plain = run(Tiled(tiles), replace(case, expert_N=new_E1[case.expert_N], **weights)), run(Tiled(tiles), case)
    back = {f"d{name}": getattr(moved, f"d{name}")[new_E1[:5]] for name in WEIGHTS}
    assert_same(replace(moved, **back), plain)


def test_a_token_gets_the_same_bits_alone_and_in_a_batch(dtype, tiles) -> None:
    case = make_case("random", T=19, D=24, F=8, E=3, K=2, dtype=dtype, spec=SPLIT)
    batch = run(Tiled(tiles), case)
    for token in (0, 18):
        rows = slice(2 * token, 2 * token + 2)
        alone = replace(
            case,
            x_TD=case.x_TD[[token]],
            dy_TD=case.dy_TD[[token]],
            token_N=case.token_N[:2],
            expert_N=case.expert_N[rows],
            weight_N=case.weight_N[rows],
        )
        result = run(Tiled(tiles), alone)
        assert torch.equal(result.y_TD[0], batch.y_TD[token])
        assert torch.equal(result.dx_TD[0], batch.dx_TD[token])
        assert torch.equal(result.dweight_N, batch.dweight_N[rows])


@pytest.mark.parametrize(("spec", "tiles"), [(MIXED, "interpreter"), (ExpertSpec(), "interpreter_tma")])
def test_results_do_not_depend_on_the_number_of_programs(spec, tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    # nine row tiles of two columns each: one more than share their columns
    case = make_case("balanced", T=18, D=8, F=24, E=9, K=2, spec=spec, biases=True)
    results = []
    for programs in (1, 3, 7):
        monkeypatch.setattr(launch, "INTERPRETED_PROGRAMS", programs)
        results.append(run(Tiled(tiles), case))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])
    assert_close(results[0], run_reference(case), tolerance=3e-6)


@pytest.mark.parametrize("spec", [MIXED, SPLIT, ExpertSpec(activation="relu2")])
def test_epilogues_may_take_any_number_of_pieces(spec, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("some_unused", T=9, D=24, F=24, E=2, K=2, spec=spec, biases=True)
    whole, results = table()["interpreter"], []
    for pieces in (1, 2, 4, 8):
        kernels = ("up", "matmul", "down_bwd")
        tiles = {kernel: replace(whole.tiles[kernel], block_n=32, sub_tiles=pieces) for kernel in kernels}
        monkeypatch.setitem(table(), "pieces", replace(whole, tiles={**whole.tiles, **tiles}))
        results.append(run(Tiled("pieces"), case))
    assert_close(results[0], run_reference(case), tolerance=3e-6)
    for result in results[1:]:
        # the gradient of the weights is summed piece by piece
        assert_close(result, results[0], tolerance=1e-6)
        assert_same(replace(result, dweight_N=results[0].dweight_N), results[0])


def guarded_case(case: Case) -> Case:
    """Return the case with every tensor of numbers inside a larger one that is NaN, and NaN in its unused rows."""
    case = poison_unused(case)
    names = ("x_TD", "weight_N", "dy_TD", *WEIGHTS)
    return replace(case, **{name: embedded(t) for name in names if (t := getattr(case, name)) is not None})


def keep_rows_apart(tensor: Tensor) -> Tensor:
    """Stand in for Tensor.contiguous: leave dy, which kernels take with any row stride, in its guards."""
    is_dy = tensor.shape == (11, tensor.stride(0) - 32) if tensor.ndim == 2 else False
    return tensor if is_dy else tensor.clone(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("routing", ["some_unused", "half_empty"])
@pytest.mark.parametrize("spec", [MIXED, SPLIT, ExpertSpec(activation="relu2")])
def test_nothing_outside_is_read_or_written_and_fresh_memory_never_matters(routing, spec, tiles) -> None:
    D, F = (24, 24) if tiles == "interpreter_tma" else (19, 13)  # no descriptor can be made of these
    case = make_case(routing, T=11, D=D, F=F, E=3, K=2, spec=spec, biases=True)
    plain = run(Tiled(tiles), case)
    with guarded_memory(), mock.patch.object(Tensor, "contiguous", keep_rows_apart):
        guarded = run(Tiled(tiles), guarded_case(case))
    assert_same(guarded, plain)
    if routing == "half_empty":
        for gradient in (guarded.dgate_up_E2FD, guarded.ddown_EDF, guarded.dgate_up_bias_E2F, guarded.ddown_bias_ED):
            assert gradient is not None
            assert gradient[1].count_nonzero() == 0 and gradient[0].count_nonzero() > 0


def test_nan_of_one_expert_reaches_only_the_tokens_it_serves(tiles) -> None:
    case = make_case("some_unused", T=23, D=24, F=8, E=4, K=2, spec=SPLIT, biases=True)
    clean = run(Tiled(tiles), case)
    tainted = {name: getattr(case, name).clone() for name in WEIGHTS}
    for tensor_E in tainted.values():
        tensor_E[2] = float("nan")
    result = run(Tiled(tiles), replace(case, **tainted))
    is_served_T = torch.zeros(23, dtype=torch.bool).index_fill(0, case.token_N[case.expert_N == 2], True)
    assert 0 < is_served_T.sum() < 23
    assert torch.equal(result.y_TD.isnan().any(1), is_served_T)
    assert torch.equal(result.y_TD[~is_served_T], clean.y_TD[~is_served_T])
    assert torch.equal(result.dx_TD[~is_served_T], clean.dx_TD[~is_served_T])
    for name in WEIGHTS:
        assert torch.equal(getattr(result, f"d{name}")[[0, 1, 3]], getattr(clean, f"d{name}")[[0, 1, 3]])


@pytest.mark.parametrize("spec", [MIXED, SPLIT])
def test_nothing_given_or_saved_is_written_to_and_a_second_backward_pass_agrees(spec, tiles) -> None:
    case = make_case("some_unused", T=19, D=24, F=8, E=3, K=2, spec=spec, biases=True)
    leaves, saved = leaves_of(case), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y_TD = call(Tiled(tiles), case, leaves)
    given = [*leaves, *saved, case.token_N, case.expert_N, case.dy_TD, y_TD]
    before = [tensor.detach().clone() for tensor in given]
    first = torch.autograd.grad(y_TD, leaves, case.dy_TD, retain_graph=True)
    second = torch.autograd.grad(y_TD, leaves, case.dy_TD)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # NaN, as rows that are not in use may hold, is not equal to itself
    assert all(
        torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) if a.dtype.is_floating_point else torch.equal(a, b)
        for a, b in zip(given, before, strict=True)
    )


def aside(tensor: Tensor) -> Tensor:
    """Return the same numbers one element past an aligned address."""
    return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)


def turned(tensor: Tensor) -> Tensor:
    """Return the same numbers with the last two dimensions the other way round in memory."""
    return tensor.mT.contiguous().mT


def thinned(tensor: Tensor) -> Tensor:
    """Return the same numbers as every second one of a larger tensor, and not from its start."""
    return torch.stack((tensor, tensor + 1), -1).flatten(-2)[..., ::2]


@pytest.mark.parametrize("change", [aside, turned, thinned])
def test_strides_and_addresses_do_not_matter(change, dtype, tiles) -> None:
    case = make_case("some_unused", T=19, D=24, F=8, E=3, K=2, dtype=dtype)
    names = ("x_TD", "gate_up_E2FD", "down_EDF", "dy_TD")
    changed = replace(case, **{name: change(getattr(case, name)) for name in names})
    rows = {name: thinned(getattr(case, name)) for name in ("token_N", "expert_N", "weight_N")}
    result = run(Tiled(tiles), replace(changed, **rows))
    assert_close(result, run(Tiled(tiles), case), tolerance=1e-6 if dtype == torch.float32 else 3e-4)


def test_incoming_gradient_may_be_one_number_expanded(tiles) -> None:
    case = make_case(T=9, D=24, F=8, E=3, K=2)
    one = torch.tensor([[0.7]]).expand(9, 24)
    assert_same(run(Tiled(tiles), replace(case, dy_TD=one)), run(Tiled(tiles), replace(case, dy_TD=one.contiguous())))


@pytest.mark.parametrize(("saved", "routing"), [("H", "some_unused"), ("H", "ragged"), ("X", "ragged")])
def test_forward_pass_keeps_the_first_product_and_the_schedule_and_nothing_else(saved, routing, dtype, tiles) -> None:
    T, D, F, E, K = 19, 24, 8, 3, 2
    case = make_case(routing, T=T, D=D, F=F, E=E, K=K, dtype=dtype, spec=ExpertSpec(saved=saved), biases=True)
    N, M = case.expert_N.numel(), routed_of(case, tiles).schedule.tile_expert_M.numel()
    integers = (E + 1) + 3 * N + 2 * M + 1 + (N + T + 1 if routing == "ragged" else 0)
    hidden = N * 2 * F * dtype.itemsize if saved == "H" else 0
    assert saved_bytes(Tiled(tiles), case) == hidden + 4 * integers
