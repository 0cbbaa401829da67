"""Decisions: what is observed and what follows, reason by reason."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from aifactory.config import Improve
from aifactory.improve.decision import Observation, Retrain, Wait, decide

POLICY = Improve(min_scored=100, tolerance=0.1, cooldown_s=60, confidence=0.95)
BELOW = Observation(
    release="small-r1",
    standard=1.0,
    num_scored=100,
    live=2.0,
    excess_low=0.5,
    new_batches=("batch/1", "batch/2"),
    running=None,
    seconds_since_cycle=60,
)


def seen(**changes: Any) -> Observation:
    return Observation(**{name: getattr(BELOW, name) for name in Observation.__dataclass_fields__} | changes)


@pytest.mark.parametrize(
    ("changes", "awaited", "reason"),
    [
        ({"release": None}, "release", "no release in production"),
        ({"running": "drift-7"}, "cycle", "the cycle drift-7 is running"),
        ({"standard": None}, "standard", "small-r1 states no standard"),
        ({"num_scored": 99}, "scores", "99 answers of small-r1 were scored, at least 100 are needed"),
        ({"excess_low": 0.0}, "drift", "not established"),
        ({"excess_low": -1.0}, "drift", "not established"),
        ({"excess_low": -math.inf}, "drift", "not established"),
        ({"excess_low": math.nan}, "drift", "not established"),
        ({"new_batches": ()}, "feedback", "no feedback batch is sealed"),
        ({"seconds_since_cycle": 59.9}, "cooldown", "cool-down 60 s"),
    ],
)
def test_each_reason_to_wait_is_named(changes: dict[str, Any], awaited: str, reason: str) -> None:
    decision = decide(POLICY, seen(**changes))

    assert isinstance(decision, Wait)
    assert decision.awaited == awaited
    assert reason in decision.reasons[-1]
    assert decision.to_json() == {"decision": "wait", "awaited": awaited, "reasons": list(decision.reasons)}


def test_at_every_limit_at_once_it_retrains_on_the_new_batches_with_the_figures_as_reason() -> None:
    decision = decide(POLICY, seen(excess_low=1e-9))

    assert isinstance(decision, Retrain)
    assert decision.batches == ("batch/1", "batch/2")
    assert (
        "2.000 bits per byte over 100 answers; the standard is 1.000, tolerated 1.100; with 95%" in decision.reasons[0]
    )
    assert decision.to_json()["batches"] == ["batch/1", "batch/2"]


def test_without_an_earlier_cycle_there_is_no_cool_down() -> None:
    assert isinstance(decide(POLICY, seen(seconds_since_cycle=math.inf)), Retrain)


def test_it_never_retrains_while_a_cycle_runs_or_without_what_it_needs() -> None:
    generator = random.Random(0)
    found = 0
    for _ in range(5000):
        given = seen(
            release=generator.choice([None, "small-r1", "small-r1"]),
            standard=generator.choice([None, 1.0, 1.0]),
            num_scored=generator.randrange(80, 200),
            excess_low=generator.uniform(-1, 2),
            new_batches=generator.choice([(), ("batch/1",), ("batch/1", "batch/2")]),
            running=generator.choice([None, None, "drift-1"]),
            seconds_since_cycle=generator.uniform(0, 200),
        )
        decision = decide(POLICY, given)
        assert decision == decide(POLICY, given)
        assert decision.reasons
        if isinstance(decision, Retrain):
            found += 1
            assert given.running is None and given.release is not None and given.standard is not None
            assert decision.batches == given.new_batches != ()
            assert given.excess_low > 0 and given.num_scored >= 100 and given.seconds_since_cycle >= 60
    assert found > 50
