"""Length of a run, what happens how often, and the learning rate as a pure function of the step."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Length of a run, and what happens how often. An interval of 0 means only at the end."""

    __pydantic_config__ = {"extra": "forbid"}

    steps: int
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    eval_sequences: int = 64  # of each domain
    keep_checkpoints: int = 3
    max_skipped_steps: int = 5
    """In a row: so many steps without a finite loss and gradient end the run."""
    debug: bool = False
    """After each step compare the copies of parameters over ranks; after the first, see that every one moved."""

    def validate(self) -> None:
        """Raise ValueError with the field that cannot be used."""
        for name, least in (("steps", 1), ("log_every", 1), ("eval_every", 0), ("save_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"trainer.{name} = {getattr(self, name)} must be at least {least}")
        for name in ("eval_sequences", "keep_checkpoints", "max_skipped_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name} = {getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over a run: linear warm-up, then cosine, or warm-up, stable, decay (WSD, arXiv 2404.06395)."""

    __pydantic_config__ = {"extra": "forbid"}

    kind: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 100
    min_ratio: float = 0.1  # of the peak, at the end
    decay_share: float = 0.2  # wsd: the last share of the run, over which the rate falls linearly

    def validate(self, *, steps: int) -> None:
        """Raise ValueError with the field that cannot be used in a run of `steps` steps."""
        if not 0 <= self.warmup_steps <= steps:
            raise ValueError(
                f"schedule.warmup_steps = {self.warmup_steps} must lie in 0..trainer.steps = {steps}; "
                "lower it or train longer"
            )
        for name in ("min_ratio", "decay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"schedule.{name} = {getattr(self, name)} must lie in [0, 1]")

    def factor(self, step: int, *, steps: int) -> float:
        """Return the share of the peak learning rate at `step` (0-based) of a run of `steps` steps.

        A pure function of the step: a resumed run needs no schedule state.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "cosine":
            done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
            return self.min_ratio + (1 - self.min_ratio) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        decay_start = max(self.warmup_steps, steps - round(self.decay_share * steps))
        if step < decay_start:
            return 1.0
        return 1.0 - (1.0 - self.min_ratio) * min(1.0, (step - decay_start) / max(1, steps - decay_start))
