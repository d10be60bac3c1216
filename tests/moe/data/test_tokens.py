"""Batches: one global order on every layout, every sequence once per epoch, resumable at any step."""

from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch

from moe.data.store import PreparedData
from moe.data.tokens import Batch, BatchStream, validation_batches

EOS = 0
MakeData = Callable[..., PreparedData]
LENGTHS = {"a": [40, 11, 130, 7], "b": [300, 20], "c": [90]}
WEIGHTS = {"a": 2.0, "c": 0.5}


def _stream(data: PreparedData, *, seed: int = 0, global_sequences: int = 12, sequence_length: int = 8) -> BatchStream:
    return BatchStream(data=data, seed=seed, global_sequences=global_sequences, sequence_length=sequence_length)


def _equal(left: Batch, right: Batch) -> bool:
    return all(torch.equal(getattr(left, field.name), getattr(right, field.name)) for field in fields(Batch))


def _rows(batch: Batch, rows: list[int]) -> Batch:
    return Batch(**{field.name: getattr(batch, field.name)[rows] for field in fields(Batch)})


@pytest.mark.parametrize("packing", ["concatenate", "pad"])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 4, 6, 12])
def test_any_split_of_a_step_gives_the_same_rows(make_data: MakeData, packing: str, num_parts: int) -> None:
    stream = _stream(make_data(LENGTHS, weights=WEIGHTS, packing=packing))
    for step in (0, 7, 10_000_000_000):
        whole = stream.batch(step, range(12))
        size = 12 // num_parts
        for part in range(num_parts):
            contiguous = list(range(part * size, (part + 1) * size))
            interleaved = list(range(part, 12, num_parts))
            assert _equal(stream.batch(step, contiguous), _rows(whole, contiguous))
            assert _equal(stream.batch(step, interleaved[::-1]), _rows(whole, interleaved[::-1]))


def test_new_stream_continues_anywhere(make_data: MakeData) -> None:
    data = make_data(LENGTHS, weights=WEIGHTS)
    running = _stream(data)
    batches = [running.batch(step, range(12)) for step in range(20)]
    resumed = _stream(data)
    for step in (13, 19, 0):
        assert _equal(resumed.batch(step, range(12)), batches[step])


def test_order_belongs_to_the_sequence_and_not_to_the_size_of_the_step(make_data: MakeData) -> None:
    data = make_data(LENGTHS, weights=WEIGHTS)
    small, large = _stream(data, global_sequences=6), _stream(data, global_sequences=12)
    tokens = torch.cat([small.batch(step, range(6)).token_BS for step in range(4)])
    assert torch.equal(tokens, torch.cat([large.batch(step, range(12)).token_BS for step in range(2)]))


def test_seed_changes_the_order(make_data: MakeData) -> None:
    """Of the sequences within a domain, too: with one domain there is nothing else to change."""
    data = make_data({"a": [300]})
    first, again, other = (_stream(data, seed=seed).batch(0, range(12)) for seed in (0, 0, 1))
    assert _equal(first, again)
    assert not torch.equal(first.token_BS, other.token_BS)


@pytest.mark.parametrize("packing", ["concatenate", "pad"])
def test_every_epoch_of_a_domain_visits_every_sequence_once(make_data: MakeData, packing: str) -> None:
    stream = _stream(make_data(LENGTHS, weights=WEIGHTS, packing=packing))
    batch = stream.batch(0, range(12))
    batches = [stream.batch(step, range(12)) for step in range(60)]
    firsts = torch.cat([batch.token_BS for batch in batches])
    domains = torch.cat([batch.domain_B for batch in batches])
    for domain, (_, size) in enumerate(stream.num_sequences.items()):
        rows = [tuple(row) for row in firsts[domains == domain].tolist()]
        epochs = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
        assert len(epochs) >= 2
        assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == size for epoch in epochs)
        assert size == 1 or len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert batch.num_valid == int(batch.valid_BS.sum())


def test_domains_come_in_the_proportion_of_their_weights(make_data: MakeData) -> None:
    stream = _stream(make_data(LENGTHS, weights=WEIGHTS), global_sequences=70)
    for steps in (1, 10):
        seen = torch.cat([stream.batch(step, range(70)).domain_B for step in range(steps)])
        shares = torch.bincount(seen) / (70 * steps)
        assert (shares - torch.tensor([4, 2, 1]) / 7).abs().max() <= 2 / (70 * steps)


def test_epochs_say_how_often_a_domain_was_read(make_data: MakeData) -> None:
    stream = _stream(make_data(LENGTHS, weights=WEIGHTS), global_sequences=7)
    assert stream.num_sequences == {"a": 23, "b": 39, "c": 11}  # (188 - 1) // 8, (320 - 1) // 8, (90 - 1) // 8
    assert stream.epochs(10) == {"a": 40 / 23, "b": 20 / 39, "c": 10 / 11}


def test_positions_count_tokens_of_the_step_and_labels_are_the_next_tokens(make_data: MakeData) -> None:
    batch = _stream(make_data(LENGTHS)).batch(3, [5, 11, 0])
    assert torch.equal(batch.position_BS, torch.tensor([5, 11, 0])[:, None] * 8 + torch.arange(8))
    assert torch.equal(batch.token_BS[:, 1:], batch.label_BS[:, :-1])
    assert batch.valid_BS.all()
    for field in fields(Batch):
        value = getattr(batch, field.name)
        assert value.dtype == (torch.bool if field.name == "valid_BS" else torch.int64)
        assert len(value) == 3


def test_documents_number_those_of_the_domain(make_data: MakeData) -> None:
    data = make_data({"a": [5, 9, 3, 40]})
    stream = _stream(data, sequence_length=8)
    batch = stream.batch(0, range(12))
    of_token = np.repeat(np.arange(4), [5, 9, 3, 40])
    position_of = {token: index for index, token in enumerate(data.domains[0].train.tokens.tolist()) if token != EOS}
    for tokens, documents in zip(batch.token_BS.tolist(), batch.document_BS.tolist(), strict=True):
        for token, document in zip(tokens, documents, strict=True):
            if token != EOS:
                assert document == of_token[position_of[token]]


def test_batch_moves_to_another_device(make_data: MakeData) -> None:
    batch = _stream(make_data(LENGTHS)).batch(0, range(4)).to("meta")
    assert all(getattr(batch, field.name).device.type == "meta" for field in fields(Batch))


def test_indices_beyond_the_step_are_an_error(make_data: MakeData) -> None:
    stream = _stream(make_data(LENGTHS))
    with pytest.raises(AssertionError):
        stream.batch(0, [12])
    with pytest.raises(AssertionError):
        stream.batch(-1, [0])


def test_domain_shorter_than_a_sequence_is_refused_with_the_remedy(make_data: MakeData) -> None:
    data = make_data({"long": [200], "short": [40]})
    with pytest.raises(ValueError, match=r"'short' has 40 tokens .* fewer than the 41 .* lower batch.sequence_length"):
        _stream(data, sequence_length=40)
    _stream(data, sequence_length=39)


def _validation(data: PreparedData, **sizes: int) -> list[Batch]:
    return list(validation_batches(data.domains[0], **sizes))


@pytest.mark.parametrize("packing", ["concatenate", "pad"])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 50])
def test_validation_sees_every_token_once_in_batches_of_one_shape(
    make_data: MakeData, packing: str, batch_size: int
) -> None:
    data = make_data({"a": [500]}, validation={"a": [30, 3, 17]}, packing=packing)
    batches = _validation(data, sequence_length=8, batch_size=batch_size, max_sequences=1000)
    assert all(batch.token_BS.shape == (batch_size, 8) for batch in batches)
    labels = torch.cat([batch.label_BS[batch.valid_BS] for batch in batches])
    tokens = data.domains[0].validation.tokens
    assert labels.tolist() == tokens[0 if packing == "pad" else 1 :].tolist()
    last = batches[-1]
    blank = ~last.valid_BS.any(dim=1)
    assert (last.token_BS[blank] == EOS).all()
    assert (last.document_BS[~last.valid_BS] == -1).all()


def test_validation_takes_sequences_at_even_distances(make_data: MakeData) -> None:
    data = make_data({"a": [500]}, validation={"a": [801]})
    batches = _validation(data, sequence_length=8, batch_size=2, max_sequences=4)
    assert torch.cat([batch.token_BS[:, 0] for batch in batches]).tolist() == [1, 201, 401, 601]
    again = _validation(data, sequence_length=8, batch_size=2, max_sequences=4)
    assert all(_equal(left, right) for left, right in zip(batches, again, strict=True))


def test_validation_text_shorter_than_a_sequence_is_padded(make_data: MakeData) -> None:
    data = make_data({"a": [500]}, validation={"a": [5]})
    (batch,) = _validation(data, sequence_length=16, batch_size=2, max_sequences=10)
    assert batch.num_valid == 4
    assert batch.valid_BS.tolist() == [[True] * 4 + [False] * 12, [False] * 16]
