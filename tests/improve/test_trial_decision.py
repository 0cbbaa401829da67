"""Decisions about a release on trial: each reason, the order of the steps, and how often they err, simulated."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from aifactory.config import ReleaseTrial
from aifactory.improve.trial_decision import (
    KeepTrying,
    NextStep,
    Side,
    TakeProduction,
    TrialSeen,
    Withdraw,
    decide_trial,
    next_step,
)

POLICY = ReleaseTrial(shadow_share=0.2, shares=(0.1, 0.5), min_answers=100, min_scored=100, longest_s=3600)
GOOD = Side(asked=1000, failed=2, log_seconds=[-4.0 + 0.1 * (i % 7) for i in range(998)])


def seen(**changes: Any) -> TrialSeen:
    values: dict[str, Any] = {
        "release": "small-r2",
        "kind": "canary",
        "share": 0.1,
        "candidate": GOOD,
        "production": GOOD,
        "asked_in_step": 100,
        "seconds_in_step": 60.0,
    }
    return TrialSeen(**values | changes)


def side(failed: int = 2, asked: int = 1000, slower: float = 1.0) -> Side:
    times = [value + math.log(slower) for value in GOOD.log_seconds]
    return Side(asked=asked, failed=failed, log_seconds=times[: asked - failed])


def test_the_steps_follow_one_another_to_production() -> None:
    steps: list[tuple[str, float]] = [POLICY.steps[0]]
    while True:
        kind, share = steps[-1]
        decision = decide_trial(POLICY, seen(kind=kind, share=share))
        if not isinstance(decision, NextStep):
            break
        steps.append((decision.kind, decision.share))
    assert steps == [("shadow", 0.2), ("canary", 0.1), ("canary", 0.5)]
    assert isinstance(decision, TakeProduction)
    assert decision.reasons[-1] == "passed: canary of 0.5: 100 requests, 100 are needed"
    assert [reason.split(":")[1].strip() for reason in decision.reasons] == ["errors", "latency", "canary of 0.5"]


@pytest.mark.parametrize(
    ("kind", "share", "following"),
    [
        ("shadow", 1.0, ("canary", 0.1)),
        ("canary", 0.05, ("canary", 0.1)),
        ("canary", 0.3, ("canary", 0.5)),
        ("canary", 0.7, None),
    ],
)
def test_a_share_that_somebody_has_set_is_gone_on_from(kind: Any, share: float, following: Any) -> None:
    assert next_step(POLICY, kind, share) == following


def test_a_step_that_has_seen_too_little_goes_on_and_not_for_ever() -> None:
    decision = decide_trial(POLICY, seen(asked_in_step=99))
    assert isinstance(decision, KeepTrying)
    assert decision.reasons[-1] == "waits: canary of 0.1: 99 requests, 100 are needed"

    late = decide_trial(POLICY, seen(asked_in_step=99, seconds_in_step=3600.0))
    assert isinstance(late, Withdraw)
    assert not late.quarantine
    assert "the step took 3600 s, 3600 s are the longest" in late.reasons[-1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"candidate": side(failed=100)}, "failed: errors: 100 of 1000 requests failed, 2 of 1000 in production"),
        ({"candidate": Side(asked=12, failed=12), "production": side(0)}, "failed: errors: 12 of 12 requests failed"),
        ({"candidate": side(slower=2.0)}, "failed: latency: a token takes 2.00"),
        ({"excess": [0.1, 0.3] * 100}, "failed: score: candidate minus production on 200 corrections is 0.200"),
    ],
)
def test_what_is_established_to_be_worse_is_withdrawn_for_cause_at_once(changes: dict[str, Any], reason: str) -> None:
    decision = decide_trial(POLICY, seen(asked_in_step=12, **changes))
    assert isinstance(decision, Withdraw)
    assert decision.quarantine
    assert any(each.startswith(reason) for each in decision.reasons), decision.reasons
    assert decision.to_json()["decision"] == "withdraw"


@pytest.mark.parametrize(
    "changes",
    [
        {"candidate": side(failed=8)},
        {"candidate": Side(asked=1, failed=1)},
        {"candidate": side(slower=1.4)},
        {"excess": [0.5] * 99},  # too few to look at
        {"excess": [-0.3, 0.3] * 100},
        {"candidate": side(failed=100), "production": side(failed=100)},
    ],
)
def test_what_is_tolerated_or_not_established_is_not_withdrawn(changes: dict[str, Any]) -> None:
    assert isinstance(decide_trial(POLICY, seen(**changes)), NextStep)


def test_a_release_that_no_replica_loads_is_withdrawn_and_may_be_tried_again() -> None:
    decision = decide_trial(POLICY, seen(refused=["ParityError: not what was trained"], loaded=False))
    assert isinstance(decision, Withdraw)
    assert not decision.quarantine
    assert "ParityError" in decision.reasons[-1]
    assert isinstance(decide_trial(POLICY, seen(refused=["CapacityError: full"], loaded=True)), NextStep)


def test_where_scores_are_waited_for_production_is_taken_only_when_they_show_that_it_is_no_worse() -> None:
    policy = POLICY.model_copy(update={"wait_for_scores": True})
    last = {"kind": "canary", "share": 0.5}
    assert isinstance(decide_trial(policy, seen(kind="canary", share=0.1)), NextStep)
    for excess in ([], [-0.5, 0.5] * 100):
        decision = decide_trial(policy, seen(**last, excess=excess))
        assert isinstance(decision, KeepTrying)
        assert decision.reasons[-1].startswith("waits: score")
    assert isinstance(decide_trial(policy, seen(**last, excess=[-0.2, -0.1] * 100)), TakeProduction)


def looked_at_often(generator: np.random.Generator, *, fails: float, slower: float, worse: float) -> str:
    """The end of a trial of 1200 requests and 600 corrections that is looked at after every twenty."""
    number = 1200
    failed = [generator.random(number) < rate for rate in (0.02 + fails, 0.02)]
    times = [generator.normal(math.log(factor), 0.7, number) for factor in (slower, 1.0)]
    excess = generator.normal(worse, 0.4, number // 2)
    for n in range(20, number + 1, 20):
        candidate, production = (
            Side(asked=n, failed=int(lost[:n].sum()), log_seconds=time[:n][~lost[:n]])
            for lost, time in zip(failed, times, strict=True)
        )
        decision = decide_trial(
            POLICY, seen(candidate=candidate, production=production, excess=excess[: n // 2], asked_in_step=0)
        )
        if isinstance(decision, Withdraw):
            return "withdrawn"
    return "kept"


def rate_of_withdrawal(**how: float) -> float:
    generator = np.random.default_rng(3)
    number = 100
    return sum(looked_at_often(generator, **how) == "withdrawn" for _ in range(number)) / number


def test_an_equal_release_is_seldom_withdrawn_however_often_it_is_looked_at() -> None:
    rate = rate_of_withdrawal(fails=0.0, slower=1.0, worse=0.0)
    print(f"withdrawn though equal: {rate:.1%} of trials")
    assert rate <= 0.05


@pytest.mark.parametrize("how", [{"fails": 0.10}, {"slower": 2.5}, {"worse": 0.15}], ids=["errors", "latency", "score"])
def test_a_release_that_is_clearly_worse_is_withdrawn(how: dict[str, float]) -> None:
    rate = rate_of_withdrawal(**{"fails": 0.0, "slower": 1.0, "worse": 0.0} | how)
    print(f"withdrawn for {how}: {rate:.1%} of trials")
    assert rate >= 0.95
