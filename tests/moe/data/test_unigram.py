"""The unigram baseline against a slow count, token by token."""

import math
from collections import Counter
from collections.abc import Callable

import pytest

from moe.data.store import PreparedData
from moe.data.unigram import unigram_losses

MakeData = Callable[..., PreparedData]


def test_loss_equals_a_slow_count(make_data: MakeData) -> None:
    data = make_data({"a": [9, 30], "b": [5]}, weights={"a": 3.0}, validation={"a": [12, 3], "b": [70]})
    num_tokens = 39 + 5
    smoothed: dict[int, float] = {}
    frequency = [Counter(domain.train.tokens.tolist()) for domain in data.domains]
    for token in {token for counter in frequency for token in counter}:
        smoothed[token] = 0.75 * frequency[0][token] / 39 + 0.25 * frequency[1][token] / 5
    total = num_tokens + data.vocab_size
    for domain in data.domains:
        losses = [
            -math.log((1 + num_tokens * smoothed.get(token, 0.0)) / total)
            for token in domain.validation.tokens.tolist()
        ]
        assert unigram_losses(data)[domain.name] == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def test_baseline_of_real_text_lies_below_a_uniform_guess(builtin_data: PreparedData) -> None:
    losses = unigram_losses(builtin_data)
    assert sorted(losses) == ["cpp", "maths", "prose", "python"]
    assert all(2.0 < loss < math.log(builtin_data.vocab_size) for loss in losses.values())
