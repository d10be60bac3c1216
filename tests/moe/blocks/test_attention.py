"""Attention against loops over sequences, heads and tokens in float64; the cache against one pass."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from formulas import rms_norm, turn
from moe.blocks.attention import Attention, attend
from moe.blocks.cache import KeyValueCache, LayerCache
from moe.blocks.rope import rotation
from tiny import assert_near

THETA, EPS = 1e4, 1e-5


def make_attention(*, heads=4, key_heads=2, qk_norm="none", bias=False, output_bias=False, seed=0):
    attention = Attention(
        hidden_size=10,
        num_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=6,
        qk_norm=qk_norm,
        bias=bias,
        output_bias=output_bias,
        norm_eps=EPS,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return attention


def reference(attention, weights, x_BSD, heads, key_heads):
    def project(name):
        y = F.linear(x_BSD, weights[f"{name}_proj.weight"], weights.get(f"{name}_proj.bias"))
        count = heads if name == "q" else key_heads
        if name != "v" and attention.qk_norm == "full":
            y = rms_norm(y, weights[f"{name}_norm.weight"], EPS)
        y = y.reshape(*y.shape[:2], count, 6)
        if name != "v" and attention.qk_norm == "head":
            y = rms_norm(y, weights[f"{name}_norm.weight"], EPS)
        return y.transpose(1, 2)

    B, S, _ = x_BSD.shape
    position = torch.arange(S).expand(B, S)
    query, key, value = turn(project("q"), position, THETA), turn(project("k"), position, THETA), project("v")
    rows = []
    for b, t in itertools.product(range(B), range(S)):
        seen = []
        for h in range(heads):
            g = h // (heads // key_heads)
            scores = torch.stack([query[b, h, t] @ key[b, g, j] / 6**0.5 for j in range(t + 1)])
            seen.append(torch.softmax(scores, 0) @ value[b, g, : t + 1])
        rows.append(torch.cat(seen))
    mixed = torch.stack(rows).reshape(B, S, heads * 6)
    return F.linear(mixed, weights["o_proj.weight"], weights.get("o_proj.bias"))


@pytest.mark.parametrize("heads_and_key_heads", [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_attention_and_every_gradient_equal_the_loops(heads_and_key_heads, qk_norm, has_bias):
    heads, key_heads = heads_and_key_heads
    attention = make_attention(heads=heads, key_heads=key_heads, qk_norm=qk_norm, bias=has_bias, output_bias=has_bias)
    x = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(1), requires_grad=True)
    grad = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(2))
    y = attention(x, *rotation(torch.arange(5), head_dim=6, theta=THETA))

    weights = {name: p.detach().double().requires_grad_() for name, p in attention.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    expected = reference(attention, weights, x64, heads, key_heads)
    assert_near(y, expected, 1e-5)
    wanted_grads = torch.autograd.grad(expected, [x64, *weights.values()], grad.double())
    actual_grads = torch.autograd.grad(y, [x, *attention.parameters()], grad)
    for name, actual, wanted in zip(["x", *weights], actual_grads, wanted_grads, strict=True):
        if name == "k_proj.bias" and qk_norm == "none":
            # turned by its position, a common shift of the keys does not cancel
            assert wanted.norm() > 1e-3
        assert_near(actual, wanted, 2e-5)


@pytest.mark.parametrize("chunks", [(7,), (1,) * 7, (3, 1, 1, 2), (4, 3), (1, 6)])
@pytest.mark.parametrize("key_heads", [2, 4])
def test_tokens_fed_in_chunks_with_a_cache_equal_one_pass(chunks, key_heads):
    attention = make_attention(qk_norm="head", key_heads=key_heads).double()
    x = torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cos, sin = rotation(torch.arange(7), head_dim=6, theta=THETA)
    with torch.no_grad():
        expected = attention(x, cos, sin)
        cache, start, parts = LayerCache(max_length=7), 0, []
        for size in chunks:
            end = start + size
            parts.append(attention(x[:, start:end], cos[start:end], sin[start:end], cache))
            start = end
    assert cache.length == 7
    assert_near(torch.cat(parts, dim=1), expected, 1e-12)


def test_a_full_cache_refuses_more_tokens():
    attention = make_attention()
    cache = LayerCache(max_length=4)
    x = torch.zeros(1, 3, 10)
    cos, sin = rotation(torch.arange(3), head_dim=6, theta=THETA)
    with torch.no_grad():
        attention(x, cos, sin, cache)
        with pytest.raises(ValueError, match="6 tokens do not fit a cache of max_length = 4"):
            attention(x, cos, sin, cache)
    assert KeyValueCache(num_layers=2, max_length=4).length == 0


@pytest.mark.parametrize("shape", [(0, 5, 10), (2, 1, 10)])
def test_no_sequence_and_one_token_pass(shape):
    attention = make_attention(bias=True)
    x = torch.randn(shape, requires_grad=True)
    y = attention(x, *rotation(torch.arange(shape[1]), head_dim=6, theta=THETA))
    assert y.shape == shape
    y.sum().backward()
    assert attention.q_proj.weight.grad is not None
    if shape[1] == 1:  # a token that sees itself only: the value, whatever the scores
        value = attention.v_proj(x).reshape(2, 1, 2, 6).repeat_interleave(2, dim=2)
        assert_near(y, attention.o_proj(value.flatten(2)), 1e-6)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("num_past", [0, 2])
def test_nothing_before_the_first_token_is_seen_and_padding_sees_itself_alone(window, num_past):
    B, H, S, d = 3, 2, 7, 4
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(B, H, S, d, generator=generator) for _ in range(3))
    first_B, cache = torch.tensor([0, 4, 6]), None
    if num_past:
        cache = LayerCache(max_length=S)
        cache.append(key[:, :, :num_past], value[:, :, :num_past])
    new = [tensor[:, :, num_past:] for tensor in (query, key, value)]
    y_BSHd = attend(*new, cache, window=window, first_B=first_B).unflatten(2, (H, d))
    for b, s, h in itertools.product(range(B), range(num_past, S), range(H)):
        start = max(int(first_B[b]), s - window + 1 if window else 0)
        places = range(start, s + 1) if s >= first_B[b] else [s]
        scores = torch.stack([query[b, h, s] @ key[b, h, p] / d**0.5 for p in places])
        expected = torch.softmax(scores, 0) @ torch.stack([value[b, h, p] for p in places])
        torch.testing.assert_close(y_BSHd[b, s - num_past, h], expected)
