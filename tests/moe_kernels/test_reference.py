"""The reference against numbers worked out with the math module alone."""

import math

import torch

from moe_kernels import reference


def silu(value: float) -> float:
    return value / (1 + math.exp(-value))


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
