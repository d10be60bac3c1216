"""The reference against numbers worked out with the math module alone."""

import math

import pytest
import torch

from moe_kernels import reference
from moe_kernels.spec import ExpertSpec


def silu(value: float) -> float:
    return value / (1 + math.exp(-value))


def geglu(gate: float, up: float) -> float:
    return gate * 0.5 * (1 + math.erf(gate / math.sqrt(2))) * up


def gpt_oss(gate: float, up: float) -> float:
    gate, up = min(gate, 7.0), min(max(up, -7.0), 7.0)
    return (up + 1) * gate / (1 + math.exp(-1.702 * gate))


def test_reference_equals_the_formula_worked_by_hand() -> None:
    # two tokens of width 1, two experts of hidden width 2; token 0 owns three rows, one of them unused
    x_TD = torch.tensor([[0.5], [-2.0]], dtype=torch.float64)
    gate_up_E2FD = torch.tensor([[[1.0], [2.0], [3.0], [4.0]], [[-1.0], [0.5], [0.25], [-3.0]]], dtype=torch.float64)
    down_EDF = torch.tensor([[[5.0, 6.0]], [[7.0, -8.0]]], dtype=torch.float64)
    token_N, expert_N = torch.tensor([0, 1, 0, 0]), torch.tensor([1, 0, 2, 0])
    weight_N = torch.tensor([0.3, 0.9, 0.7, 0.2], dtype=torch.float64)

    y_TD = reference.experts(x_TD, token_N, expert_N, weight_N, gate_up_E2FD, down_EDF)

    first = 5 * silu(0.5) * 1.5 + 6 * silu(1.0) * 2.0  # expert 0 on 0.5
    second = 7 * silu(-0.5) * 0.125 + -8 * silu(0.25) * -1.5  # expert 1 on 0.5
    other = 5 * silu(-2.0) * -6.0 + 6 * silu(-4.0) * -8.0  # expert 0 on -2
    expected_TD = torch.tensor([[0.3 * second + 0.2 * first], [0.9 * other]], dtype=torch.float64)
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("activation", "formula"), [("geglu", geglu), ("gpt_oss", gpt_oss)])
@pytest.mark.parametrize("gate_up", ["concatenated", "interleaved"])
@pytest.mark.parametrize("gate", [-3.0, 0.4, 6.5, 30.0])
def test_activation_equals_the_formula_worked_by_hand(activation, formula, gate_up: str, gate: float) -> None:
    ups = [-20.0, -7.0, -0.3, 7.5]
    gates = [gate + 0.1 * place for place in range(4)]
    in_turns = [value for pair in zip(gates, ups, strict=True) for value in pair]
    h_H = torch.tensor(in_turns if gate_up == "interleaved" else gates + ups, dtype=torch.float64)
    a_F = reference.activation(h_H, ExpertSpec(activation=activation, gate_up=gate_up))
    expected = [formula(*pair) for pair in zip(gates, ups, strict=True)]
    torch.testing.assert_close(a_F, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


def test_squared_relu_with_biases_and_transposed_weights_equals_the_formula_worked_by_hand() -> None:
    # one token of width 2, one expert of hidden width 3
    x_TD, weight_N = torch.tensor([[0.5, -2.0]], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    up_EDF = torch.tensor([[[1.0, 2.0, 3.0], [-1.0, 0.5, 0.0]]], dtype=torch.float64)
    down_EFD = torch.tensor([[[5.0, 6.0], [7.0, -8.0], [0.5, 0.25]]], dtype=torch.float64)
    b1_EF = torch.tensor([[0.5, -1.0, 1.0]], dtype=torch.float64)
    b2_ED = torch.tensor([[10.0, -20.0]], dtype=torch.float64)
    zero_N = torch.tensor([0])
    spec = ExpertSpec(activation="relu2", weights="in_out")
    biases = {"gate_up_bias_E2F": b1_EF, "down_bias_ED": b2_ED}
    y_TD = reference.experts(x_TD, zero_N, zero_N, weight_N, up_EDF, down_EFD, spec=spec, **biases)
    # the first products are 0.5 + 2 + 0.5, 1 - 1 - 1 and 1.5 + 1
    expected = [0.3 * (5 * 9 + 0.5 * 6.25 + 10), 0.3 * (6 * 9 + 0.25 * 6.25 - 20)]
    torch.testing.assert_close(y_TD, torch.tensor([expected], dtype=torch.float64), rtol=1e-14, atol=0)


def test_token_without_rows_gets_zero() -> None:
    weights = torch.ones(1, 2, 3, dtype=torch.float64), torch.ones(1, 3, 1, dtype=torch.float64)
    y_TD = reference.experts(
        torch.ones(2, 3, dtype=torch.float64), torch.tensor([1]), torch.tensor([0]), torch.ones(1), *weights
    )
    assert y_TD[0].tolist() == [0, 0, 0]
    assert y_TD[1].tolist() != [0, 0, 0]


def test_no_token_gives_no_output() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    y_TD = reference.experts(torch.ones(0, 3), none, none, torch.ones(0), torch.ones(1, 2, 3), torch.ones(1, 3, 1))
    assert y_TD.shape == (0, 3)
