"""Sampling: the cache changes nothing, the seed decides, filters keep what they say."""

from collections import Counter

import pytest
import torch

from moe.sample import generate
from tiny import tiny_config, tiny_model


def greedy_without_cache(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        logits, _ = model(torch.tensor([ids]))
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("prompt", [[3], [5, 1, 0, 36, 7]])
@pytest.mark.parametrize("qk_norm", ["none", "full"])
def test_greedy_with_the_cache_equals_greedy_without(prompt, qk_norm):
    model = tiny_model(tiny_config(qk_norm=qk_norm), dtype=torch.float64)
    expected = greedy_without_cache(model, prompt, 20)
    assert len(set(expected)) > 1
    assert generate(model, prompt, max_new_tokens=20, temperature=0.0) == expected


def test_the_same_seed_gives_the_same_ids_and_global_random_state_is_left_alone():
    model = tiny_model()
    state = torch.get_rng_state()
    first = generate(model, [1, 2], max_new_tokens=20, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(11)
    assert generate(model, [1, 2], max_new_tokens=20, seed=3) == first
    assert generate(model, [1, 2], max_new_tokens=20, seed=4) != first


def test_drawn_tokens_follow_the_probabilities():
    model = tiny_model(dtype=torch.float64)
    probs = torch.softmax(model(torch.tensor([[4, 9]]))[0][0, -1] / 3.0, dim=-1)
    counts = Counter(generate(model, [4, 9], max_new_tokens=1, temperature=3.0, seed=s)[0] for s in range(400))
    for token_id, p in enumerate(probs.tolist()):
        # five standard deviations of a count
        assert abs(counts[token_id] - 400 * p) <= 5 * (400 * p * (1 - p)) ** 0.5 + 1


@pytest.mark.parametrize(
    ("filters", "num_kept"), [({"top_k": 3}, 3), ({"top_p": 0.5}, None), ({"top_k": 5, "top_p": 1e-9}, 1)]
)
def test_filters_keep_the_likeliest_tokens_only(filters, num_kept):
    model = tiny_model(dtype=torch.float64)
    probs, ids = torch.softmax(model(torch.tensor([[4, 9]]))[0][0, -1] / 3.0, dim=-1).sort(descending=True)
    if num_kept is None:
        num_kept = int((probs.cumsum(0) < 0.5).sum()) + 1
    drawn = {generate(model, [4, 9], max_new_tokens=1, temperature=3.0, seed=s, **filters)[0] for s in range(150)}
    assert drawn == set(ids[:num_kept].tolist())


def test_generation_stops_at_the_end_token_and_leaves_it_out():
    model = tiny_model(dtype=torch.float64)
    ids = generate(model, [3], max_new_tokens=12, temperature=0.0)
    end = ids[6]
    stopped = generate(model, [3], max_new_tokens=12, temperature=0.0, eos_token_id=end)
    assert stopped == ids[: ids.index(end)]
    assert generate(model, [3], max_new_tokens=0) == []


@pytest.mark.parametrize("is_training", [True, False])
def test_training_mode_is_put_back_and_no_graph_is_kept(is_training):
    model = tiny_model().train(is_training)
    modes = []
    model.norm.register_forward_pre_hook(lambda module, args: modes.append((module.training, args[0].requires_grad)))
    generate(model, [3], max_new_tokens=2)
    assert modes == [(False, False)] * 2
    assert all(module.training is is_training for module in model.modules())


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        ([], {}, "the prompt holds no token"),
        ([37], {}, "do not fit vocab_size = 37"),
        ([-1], {}, "do not fit vocab_size = 37"),
        ([1], {"max_new_tokens": 64}, "exceed the model's 64 positions"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens = -1"),
        ([1], {"temperature": -0.1}, "temperature = -0.1"),
        ([1], {"temperature": float("nan")}, "temperature = nan"),
        ([1], {"top_k": -1}, "top_k = -1"),
        ([1], {"top_p": 0.0}, "top_p = 0.0"),
        ([1], {"top_p": 1.1}, "top_p = 1.1"),
    ],
)
def test_arguments_out_of_range_are_refused(prompt, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model(), prompt, **{"max_new_tokens": 2, **arguments})
