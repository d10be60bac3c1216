"""Collecting shards: they own what they need and nothing more."""

import torch

from moe.checkpoint import Shard
from moe.checkpoint.shards import collect


def test_a_piece_of_a_large_tensor_does_not_keep_all_of_it_in_memory():
    def shards():
        for index in range(3):
            whole = torch.full((1000, 2), float(index))
            yield Shard(name=f"w{index}", tensor=whole[10:12], logical_shape=(1000, 2), offset=10)

    tensors = collect(shards()).tensors
    assert [tensor.untyped_storage().nbytes() for tensor in tensors.values()] == [16, 16, 16]
    assert [tensor[0, 0].item() for tensor in tensors.values()] == [0, 1, 2]


def test_a_whole_tensor_is_not_copied():
    whole = torch.ones(5, 2, requires_grad=True)
    tensors = collect([Shard(name="w", tensor=whole, logical_shape=(5, 2))]).tensors
    assert tensors["w"].data_ptr() == whole.data_ptr()
    assert not tensors["w"].requires_grad


def test_pieces_of_one_tensor_on_one_rank_have_keys_of_their_own():
    w = torch.arange(4.0)
    shards = [
        Shard(name="w", tensor=w[2:], logical_shape=(4,), offset=2),
        Shard(name="w", tensor=w[:2], logical_shape=(4,)),
    ]
    pieces = collect(shards)
    assert pieces.tensors["w"].tolist() == [0, 1]
    assert pieces.tensors["w@2"].tolist() == [2, 3]
    assert [(entry["offset"], entry["rows"]) for entry in pieces.index] == [(2, 2), (0, 2)]
