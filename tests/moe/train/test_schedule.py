"""Learning rate over a run, against values worked out by hand."""

import itertools
import math

import pytest

from moe.train.schedule import ScheduleConfig, TrainerConfig


def test_cosine_warms_up_linearly_and_falls_to_the_minimum():
    schedule = ScheduleConfig(kind="cosine", warmup_steps=4, min_ratio=0.1)
    factors = [schedule.factor(step, steps=24) for step in range(24)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert factors[4] == 1.0
    assert factors[14] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[9] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule.factor(24, steps=24) == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(factors[4:]))


def test_wsd_stays_at_the_peak_and_decays_over_the_last_share():
    schedule = ScheduleConfig(kind="wsd", warmup_steps=2, min_ratio=0.0, decay_share=0.25)
    factors = [schedule.factor(step, steps=40) for step in range(41)]
    assert factors[:2] == pytest.approx([0.5, 1.0])
    assert set(factors[2:31]) == {1.0}
    assert factors[35] == pytest.approx(0.5)
    assert factors[40] == pytest.approx(0.0)


def test_no_warm_up_starts_at_the_peak():
    assert ScheduleConfig(warmup_steps=0).factor(0, steps=10) == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup_steps": 11}, "warmup_steps = 11 must lie in 0..trainer.steps = 10"),
        ({"warmup_steps": 0, "min_ratio": 1.5}, "min_ratio = 1.5"),
        ({"warmup_steps": 0, "decay_share": -0.1}, "decay_share = -0.1"),
    ],
)
def test_impossible_schedules_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**fields).validate(steps=10)


@pytest.mark.parametrize("field", ["steps", "log_every", "eval_sequences", "keep_checkpoints"])
def test_impossible_intervals_are_refused(field):
    with pytest.raises(ValueError, match=f"trainer.{field} = 0 must be at least 1"):
        TrainerConfig(**{"steps": 5, field: 0}).validate()
