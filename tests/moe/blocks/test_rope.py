"""Rotary embedding against multiplication of complex numbers in float64."""

from dataclasses import replace

import pytest
import torch
from transformers import GptOssConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from formulas import turn
from moe.blocks.rope import RopeScaling, rotate, rotation
from tiny import assert_near


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (1, 1, 1, 2), (2, 2, 0, 6)])
def test_rotation_and_its_gradient_equal_complex_multiplication(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    position = torch.randint(0, 500, (shape[0], shape[2]))
    cos, sin = rotation(position, head_dim=shape[-1], theta=1e4)
    y = rotate(x, cos, sin)
    x64 = x.detach().double().requires_grad_()
    expected = turn(x64, position, 1e4)
    assert_near(y, expected, 2e-5)  # float32 angles of some hundred radians
    grad = torch.randn(shape)
    assert_near(torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(expected, x64, grad.double())[0], 2e-5)


def test_score_of_two_turned_vectors_depends_on_their_distance_only():
    query, key = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(i, j):
        turned = [rotate(x, *rotation(torch.tensor([p]), head_dim=16, theta=100.0)) for x, p in ((query, i), (key, j))]
        return (turned[0] * turned[1]).sum()

    assert_near(score(3, 1), score(12, 10), 1e-5)
    assert abs(score(3, 1) - score(3, 2)) > 1e-2


def test_bfloat16_is_turned_in_float32_and_rounded_once():
    x = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = rotation(torch.arange(9), head_dim=8, theta=1e4)
    y = rotate(x, cos, sin)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rotate(x.float(), cos, sin).bfloat16())


def test_float64_is_turned_in_float64():
    x = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cos, sin = (table.double() for table in rotation(torch.arange(9), head_dim=8, theta=1e4))
    expected = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin)
    assert_near(rotate(x, cos.float(), sin.float()), torch.cat((expected.real, expected.imag), dim=-1), 1e-15)


GPT_OSS = RopeScaling(factor=32.0, original_max_position_embeddings=4096, truncate=False)
DEEPSEEK = RopeScaling(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)
LLAMA3 = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=8192)


@pytest.mark.parametrize(
    ("scaling", "theta", "head_dim"),
    [
        (GPT_OSS, 150000.0, 64),
        (DEEPSEEK, 10000.0, 64),
        (RopeScaling(factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=0.3), 100.0, 6),
        # both bounds on one pair, and beyond the last
        (RopeScaling(factor=4.0, original_max_position_embeddings=8, beta_fast=1.01), 100.0, 8),
        (RopeScaling(factor=4.0, original_max_position_embeddings=10**6, beta_slow=1e-4), 100.0, 8),
        (LLAMA3, 500000.0, 128),
        (replace(LLAMA3, factor=32.0, low_freq_factor=1.5, high_freq_factor=3.0), 500000.0, 64),
        # every pair keeps its frequency, and every pair gets the whole factor
        (replace(LLAMA3, original_max_position_embeddings=10**6), 100.0, 8),
        (replace(LLAMA3, original_max_position_embeddings=6), 100.0, 8),
    ],
    ids=[
        *("gpt_oss", "deepseek_v3", "two_magnitudes", "one_bound", "far_bound"),
        *("llama_3_1", "llama3_other_bounds", "llama3_all_fast", "llama3_all_slow"),
    ],
)
def test_scaled_positions_turn_as_in_transformers(scaling, theta, head_dim):
    fields = {name: value for name, value in vars(scaling).items() if value or name == "truncate"}
    theirs = GptOssConfig(head_dim=head_dim, rope_parameters={"rope_theta": theta, **fields}, num_hidden_layers=1)
    frequency_c, amplitude = ROPE_INIT_FUNCTIONS[scaling.rope_type](theirs, torch.device("cpu"))
    position = torch.tensor([0, 1, 7, 100, 5000])
    angle = position.float()[:, None] * frequency_c
    cos, sin = rotation(position, head_dim=head_dim, theta=theta, scaling=scaling)
    # float32 angles of 5000 radians are known to 2e-4
    assert_near(cos, angle.cos() * amplitude, 3e-4)
    assert_near(sin, angle.sin() * amplitude, 3e-4)
    assert_near(cos[:4], (angle.cos() * amplitude)[:4], 1e-5)


def test_a_factor_of_one_changes_no_bit():
    unscaled = RopeScaling(original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=0.5)
    for plain, scaled in zip(
        rotation(torch.arange(9), head_dim=8, theta=1e4),
        rotation(torch.arange(9), head_dim=8, theta=1e4, scaling=unscaled),
        strict=True,
    ):
        assert torch.equal(plain, scaled)
    assert unscaled.score_factor == 1


def test_deepseek_multiplies_scores_and_not_the_turned():
    assert DEEPSEEK.amplitude == 1
    assert DEEPSEEK.score_factor == pytest.approx(1.3688879**2)
    assert GPT_OSS.score_factor == LLAMA3.score_factor == LLAMA3.amplitude == 1


def test_fields_that_a_scaling_does_not_read_are_no_part_of_its_meaning():
    assert RopeScaling(original_max_position_embeddings=16, beta_fast=9.0).meaning() == RopeScaling()
    assert replace(LLAMA3, beta_fast=9.0, truncate=False).meaning() == LLAMA3
    assert replace(DEEPSEEK, low_freq_factor=0.5).meaning() == DEEPSEEK
    assert replace(LLAMA3, low_freq_factor=0.5).meaning() != LLAMA3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"factor": 0.5}, "rope_scaling.factor = 0.5 must be at least 1"),
        ({"factor": 4.0}, "stretches the range model.rope_scaling.original_max_position_embeddings"),
        ({"beta_fast": 1.0}, "beta_slow = 1.0 and beta_fast = 1.0 must be positive, the second larger"),
        ({"low_freq_factor": 4.0}, "low_freq_factor = 4.0 and high_freq_factor = 4.0 must be positive"),
    ],
)
def test_bad_scalings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**fields).validate()
