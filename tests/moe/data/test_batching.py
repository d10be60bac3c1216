"""Every sequence of the global batch is taken exactly once, on every layout."""

import pytest

from moe.data.batching import BatchConfig


@pytest.mark.parametrize(("world_size", "micro"), [(1, 1), (1, 12), (2, 3), (3, 2), (4, 3), (12, 1)])
def test_ranks_and_micro_batches_partition_the_global_batch(world_size, micro):
    batch = BatchConfig(global_sequences=12, micro_sequences=micro, sequence_length=8)
    taken = [
        index
        for rank in range(world_size)
        for indices in batch.micro_batches(rank=rank, world_size=world_size)
        for index in indices
    ]
    assert sorted(taken) == list(range(12))
    assert batch.accumulation(world_size) == 12 // (micro * world_size)


def test_a_step_of_micro_batches_is_the_same_text_on_every_layout():
    """The j-th micro-batches of all ranks together are the j-th piece of the global batch."""
    batch = BatchConfig(global_sequences=12, micro_sequences=2, sequence_length=8)
    for j in range(2):
        piece = [i for rank in range(3) for i in batch.micro_batches(rank=rank, world_size=3)[j]]
        assert piece == list(range(6 * j, 6 * j + 6))


@pytest.mark.parametrize("field", ["global_sequences", "micro_sequences", "sequence_length"])
def test_zero_is_refused(field):
    sizes = {"global_sequences": 4, "micro_sequences": 2, "sequence_length": 8, field: 0}
    with pytest.raises(ValueError, match=f"batch.{field} = 0 must be at least 1"):
        BatchConfig(**sizes).validate(world_size=1, max_position_embeddings=8)
