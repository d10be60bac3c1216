"""Block: pre-norm residuals, and activation checkpointing that never recomputes the router."""

from collections import Counter

import pytest
import torch

from moe.blocks.cache import LayerCache
from moe.blocks.rope import rotation
from moe.routing import RouterContext
from tiny import assert_near, tiny_config, tiny_model, tiny_tokens

CONFIG = tiny_config(num_hidden_layers=2)  # layer 0 has experts, layer 1 is dense


def inputs(seed=0):
    x = torch.randn(2, 5, CONFIG.hidden_size, generator=torch.Generator().manual_seed(seed))
    return x, *rotation(torch.arange(5), head_dim=CONFIG.attention_head_dim, theta=1e4), RouterContext()


@pytest.mark.parametrize("index", [0, 1], ids=["moe", "dense"])
def test_block_adds_attention_then_feed_forward_to_the_residual(index):
    block = tiny_model(CONFIG).layers[index]
    x, cos, sin, context = inputs()
    y, routings = block(x, cos, sin, context)
    middle = x + block.attention(block.attention_norm(x), cos, sin)
    normed = block.feed_forward_norm(middle)
    if index == 0:
        added, expected_routings = block.moe(normed, context)
        assert torch.equal(routings[0].assignment.expert_N, expected_routings[0].assignment.expert_N)
    else:
        added = block.feed_forward(normed)
    assert len(routings) == (1 if index == 0 else 0)
    assert_near(y, middle + added, 1e-6)


def count_calls(model):
    calls = Counter()
    for name, module in model.named_modules():
        # before, not after: a recompute stops as soon as it has what backward needs
        module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    return calls


def test_checkpointing_gives_the_same_bits_and_runs_the_router_once():
    results = []
    for is_checkpointed in (False, True):
        model = tiny_model(CONFIG, activation_checkpointing=is_checkpointed)
        calls = count_calls(model)
        logits, routings = model(tiny_tokens(2, 7))
        (logits.square().sum() + routings[0].probs_TE.square().sum()).backward()
        results.append((logits, routings, [p.grad for p in model.parameters()], calls))
    (plain, plain_routings, plain_grads, plain_calls), (kept, kept_routings, kept_grads, kept_calls) = results
    assert torch.equal(plain, kept)
    assert torch.equal(plain_routings[0].logits_TE, kept_routings[0].logits_TE)
    for plain_grad, kept_grad in zip(plain_grads, kept_grads, strict=True):
        assert torch.equal(plain_grad, kept_grad)
    assert plain_calls["layers.0.attention"] == 1
    recomputed = ("layers.0.attention", "layers.1.attention", "layers.1.feed_forward", "layers.0.moe.experts")
    assert [kept_calls[name] for name in recomputed] == [2, 2, 2, 2]
    assert kept_calls["layers.0.moe.router"] == 1


def test_checkpointing_keeps_fewer_bytes_for_backward():
    kept_bytes = []
    for is_checkpointed in (False, True):
        model = tiny_model(CONFIG, activation_checkpointing=is_checkpointed)
        x, cos, sin, context = inputs()
        kept = {}

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.layers[1](x.requires_grad_(), cos, sin, context)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept_bytes.append(sum(size for pointer, size in kept.items() if pointer not in weights))
    assert kept_bytes[1] < kept_bytes[0] / 2


def test_a_cache_is_written_once_in_training_mode_with_checkpointing():
    block = tiny_model(CONFIG, activation_checkpointing=True).train().layers[0]
    cache = LayerCache(max_length=5)
    with torch.no_grad():
        block(*inputs(), [cache])
    assert cache.length == 5
