"""Decisions: what is observed and what follows, reason by reason."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from aifactory.config import Improve, PromptWatch
from aifactory.evaluate.sequential import Found
from aifactory.improve.decision import Observation, Retrain, Wait, decide

POLICY = Improve(min_scored=100, tolerance=0.1, cooldown_s=60, confidence=0.95)
ESTABLISHED = Found(won=20.0, needed=20.0, number=100, at=60, since=20)
BELOW = Observation(
    release="small-r1",
    standard=1.0,
    num_scored=100,
    live=2.0,
    below=ESTABLISHED,
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
        ({"below": Found(won=19.9, needed=20.0, number=100)}, "drift", "not established"),
        ({"new_batches": ()}, "feedback", "no feedback batch is sealed"),
        ({"seconds_since_cycle": 59.9}, "cooldown", "cool-down 60 s"),
        ({"retrains_today": 24}, "cooldown", "24 retrains began in the last 24 hours, 24 are the most"),
    ],
)
def test_each_reason_to_wait_is_named(changes: dict[str, Any], awaited: str, reason: str) -> None:
    decision = decide(POLICY, seen(**changes))

    assert isinstance(decision, Wait)
    assert decision.awaited == awaited
    assert reason in decision.reasons[-1]
    assert decision.to_json() == {"decision": "wait", "awaited": awaited, "reasons": list(decision.reasons)}


def test_at_every_limit_at_once_it_retrains_on_the_new_batches_with_the_figures_as_reason() -> None:
    decision = decide(POLICY, seen())

    assert isinstance(decision, Retrain)
    assert decision.batches == ("batch/1", "batch/2")
    assert (
        "2.000 bits per byte over 100 answers; the standard is 1.000, tolerated 1.100; the evidence that they exceed that "
        "came to 20 to 1, 20 to 1 establishes it at 95%, which was so after 60 answers, most of it since answer 20"
    ) in decision.reasons[0]
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
            below=generator.choice([ESTABLISHED, Found(won=1.0, needed=20.0, number=100)]),
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
            assert given.below.is_established and given.num_scored >= 100 and given.seconds_since_cycle >= 60
    assert found > 50


MOVED = "evidence 300 to 1 after 70 prompts"


def test_other_prompts_are_said_and_are_no_reason_to_retrain_by_default() -> None:
    decision = decide(POLICY, seen(below=Found(won=1.0, needed=20.0, number=100), prompts=MOVED))

    assert isinstance(decision, Wait)
    assert decision.awaited == "drift"
    assert decision.reasons[0] == f"prompts are others than they were at first: {MOVED}"


@pytest.mark.parametrize("changes", [{"below": Found(won=1.0, needed=20.0, number=100)}, {"num_scored": 3}])
def test_other_prompts_are_a_reason_to_retrain_where_that_is_asked_for_and_nothing_else_holds_it_up(
    changes: dict[str, Any],
) -> None:
    policy = POLICY.model_copy(update={"prompts": PromptWatch(retrain=True)})

    decision = decide(policy, seen(prompts=MOVED, **changes))
    assert isinstance(decision, Retrain)
    assert MOVED in decision.reasons[0]
    assert decide(policy, seen(prompts=MOVED, new_batches=(), **changes)).to_json()["awaited"] == "feedback"
    assert decide(policy, seen(prompts=MOVED, seconds_since_cycle=1, **changes)).to_json()["awaited"] == "cooldown"
