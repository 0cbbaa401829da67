"""Laws of the schedules."""

import math

import pytest

from aifactory.config import Train
from aifactory.train.schedule import learning_rate

SCHEDULES = ("cosine", "linear", "wsd")


def rates(**recipe):
    made = Train(**{"max_steps": 100, "warmup_steps": 10, "learning_rate": 2.0, "final_lr_share": 0.1, **recipe})
    return [learning_rate(made, step) for step in range(made.max_steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_warms_up_to_the_peak_never_rises_again_and_ends_at_its_share(schedule):
    found = rates(schedule=schedule)

    assert found[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert found[10] == pytest.approx(2.0)
    assert found[10:] == sorted(found[10:], reverse=True)
    assert found[-1] == pytest.approx(0.2)


def test_half_way_down_a_cosine_and_a_line_are_at_the_mean():
    for schedule in ("cosine", "linear"):
        found = rates(schedule=schedule, warmup_steps=0, max_steps=101)
        assert found[50] == pytest.approx(1.1)
    assert rates(schedule="cosine", warmup_steps=0, max_steps=101)[25] == pytest.approx(
        0.2 + 0.9 * (1 + math.sqrt(0.5))
    )
    assert rates(schedule="linear", warmup_steps=0, max_steps=101)[25] == pytest.approx(1.55)


def test_wsd_is_stable_up_to_its_last_share():
    found = rates(schedule="wsd", decay_share=0.3)

    assert set(found[10:70]) == {2.0}
    assert found[70] == pytest.approx(2.0)
    assert found[71] < 2.0


def test_a_longer_wsd_run_begins_as_a_shorter_one():
    short, long = rates(schedule="wsd"), rates(schedule="wsd", max_steps=1000)

    assert short[:80] == long[:80]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("max_steps", "warmup_steps"), [(1, 0), (1, 5), (2, 1), (3, 3), (5, 4)])
def test_a_short_run_has_a_rate_for_every_step(schedule, max_steps, warmup_steps):
    found = rates(schedule=schedule, max_steps=max_steps, warmup_steps=warmup_steps, learning_rate=1.0)

    assert all(0 < rate <= 1 for rate in found)
