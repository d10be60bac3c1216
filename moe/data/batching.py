"""How a global batch is cut into micro-batches and spread over ranks.

The batch is set globally; accumulation is derived. Sequence i of a step is the same text on every layout: rank r of W
takes, in its j-th micro-batch, the sequences (j*W + r)*micro .. (j*W + r + 1)*micro - 1.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The global batch, in sequences."""

    __pydantic_config__ = {"extra": "forbid"}

    global_sequences: int
    micro_sequences: int
    sequence_length: int

    def validate(self, *, world_size: int, max_position_embeddings: int) -> None:
        """Raise ValueError for a batch that `world_size` ranks cannot share evenly."""
        for name in ("global_sequences", "micro_sequences", "sequence_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"batch.{name} = {getattr(self, name)} must be at least 1")
        unit = self.micro_sequences * world_size
        if self.global_sequences % unit:
            below = self.global_sequences // unit * unit
            nearest = " or ".join(str(value) for value in (below, below + unit) if value)
            raise ValueError(
                f"batch.global_sequences = {self.global_sequences} is no multiple of batch.micro_sequences = "
                f"{self.micro_sequences} times {world_size} ranks = {unit}; the nearest that fit: {nearest}"
            )
        if self.sequence_length > max_position_embeddings:
            raise ValueError(
                f"batch.sequence_length = {self.sequence_length} exceeds model.max_position_embeddings = "
                f"{max_position_embeddings}; shorten the sequences or raise the limit"
            )

    @property
    def tokens(self) -> int:
        """Tokens of one global batch, padding included."""
        return self.global_sequences * self.sequence_length

    def accumulation(self, world_size: int) -> int:
        """Return the number of micro-batches of each rank in one step."""
        return self.global_sequences // (self.micro_sequences * world_size)

    def micro_batches(self, *, rank: int, world_size: int) -> list[range]:
        """Return the sequences of each of this rank's micro-batches, as numbers within the global batch."""
        starts = [(j * world_size + rank) * self.micro_sequences for j in range(self.accumulation(world_size))]
        return [range(start, start + self.micro_sequences) for start in starts]
