"""Decisions about a release on trial: it goes on, takes more, takes production or is withdrawn, with reasons. Pure.

All that came since the trial began is looked at, again and again. Each of the three comparisons holds at every look with
1 - (1 - confidence) / 3, so that a release that is no worse is withdrawn with at most 1 - confidence, however long it takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from aifactory.evaluate.statistics import Interval, confidence_sequence, rate_sequence

if TYPE_CHECKING:
    from aifactory.config import ReleaseTrial

_COMPARISONS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """How requests went on one of the two, since the trial began."""

    asked: int = 0
    """Requests that it answered or failed."""
    failed: int = 0
    log_seconds: Sequence[float] = field(default=())
    """Of each answer, in order: the logarithm of its seconds by its tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSeen:
    """What is known of a trial when it is decided about."""

    release: str
    kind: Literal["shadow", "canary"]
    share: float
    candidate: Side
    production: Side
    asked_in_step: int
    """Of the candidate's, those since its kind and share are what they are."""
    seconds_in_step: float
    excess: Sequence[float] = field(default=())
    """Of each correction, in order: what the candidate needs above production, bits per byte, weighted by bytes."""
    refused: Sequence[str] = field(default=())
    """Why replicas did not load it."""
    loaded: bool = True
    """Whether any did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepTrying:
    """It goes on as it is."""

    reasons: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        return {"decision": "keep trying", "reasons": list(self.reasons)}


@dataclass(frozen=True, slots=True, kw_only=True)
class NextStep:
    """It takes more."""

    kind: Literal["shadow", "canary"]
    share: float
    reasons: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        return {"decision": "next step", "kind": self.kind, "share": self.share, "reasons": list(self.reasons)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeProduction:
    """It has passed."""

    reasons: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        return {"decision": "promote", "reasons": list(self.reasons)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdraw:
    """It ends."""

    quarantine: bool
    """For cause: it is not tried again."""
    reasons: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        return {"decision": "withdraw", "quarantine": self.quarantine, "reasons": list(self.reasons)}


TrialDecision = KeepTrying | NextStep | TakeProduction | Withdraw


def decide_trial(policy: ReleaseTrial, seen: TrialSeen) -> TrialDecision:
    """Withdraw if it is established to be worse; else the next step once this one has seen enough."""
    errors, times, scores = _errors(policy, seen), _times(policy, seen), _scores(policy, seen)
    checks = [errors, times, scores]
    reasons = tuple(("failed: " if check.is_worse else "passed: ") + check.text for check in checks if check.is_known)
    if any(check.is_worse for check in checks):
        return Withdraw(quarantine=True, reasons=reasons)
    if seen.refused and not seen.loaded:
        return Withdraw(quarantine=False, reasons=(f"failed: no replica has loaded it: {seen.refused[-1]}",))
    step = f"{seen.kind} of {seen.share:.3g}: {seen.asked_in_step} requests, {policy.min_answers} are needed"
    following = next_step(policy, seen.kind, seen.share)
    waits = [f"waits: {step}"] if seen.asked_in_step < policy.min_answers else []
    if following is None and policy.wait_for_scores and not scores.is_established:
        waits.append(f"waits: {scores.text}")
    if not waits and following is not None:
        kind, share = following
        return NextStep(kind=kind, share=share, reasons=(*reasons, f"passed: {step}"))
    if not waits:
        return TakeProduction(reasons=(*reasons, f"passed: {step}"))
    if seen.seconds_in_step >= policy.longest_s:
        late = f"failed: the step took {seen.seconds_in_step:.0f} s, {policy.longest_s:g} s are the longest"
        return Withdraw(quarantine=False, reasons=(*reasons, *waits, late))
    return KeepTrying(reasons=(*reasons, *waits))


def next_step(
    policy: ReleaseTrial, kind: Literal["shadow", "canary"], share: float
) -> tuple[Literal["shadow", "canary"], float] | None:
    """The step after the one that a trial is at, also where somebody has given it a share of their own; None: the end."""
    canaries = [step for step in policy.steps if step[0] == "canary"]
    return next((step for step in canaries if kind == "shadow" or step[1] > share), None)


@dataclass(frozen=True, slots=True)
class _Check:
    text: str
    is_known: bool = True
    is_worse: bool = False
    is_established: bool = False
    """Whether it is shown to be no worse than is tolerated."""


def _confidence(policy: ReleaseTrial, intervals: int) -> float:
    """Of each interval of a comparison."""
    return 1 - (1 - policy.confidence) / (_COMPARISONS * intervals)


def _errors(policy: ReleaseTrial, seen: TrialSeen) -> _Check:
    each = _confidence(policy, 2)
    mine, other = (
        rate_sequence(side.failed, side.asked, confidence=each) for side in (seen.candidate, seen.production)
    )
    more = _difference(mine, other)
    return _Check(
        f"errors: {seen.candidate.failed} of {seen.candidate.asked} requests failed, {seen.production.failed} of "
        f"{seen.production.asked} in production; at least {more.low:.3f} more is established, {policy.fails_more:g} is "
        "tolerated",
        is_worse=more.low > policy.fails_more,
    )


def _times(policy: ReleaseTrial, seen: TrialSeen) -> _Check:
    mine, other = seen.candidate.log_seconds, seen.production.log_seconds
    if min(len(mine), len(other)) < policy.min_answers:
        return _Check("", is_known=False)
    each = _confidence(policy, 2)
    over = _difference(
        *(confidence_sequence(side, confidence=each, tightest_at=policy.min_answers) for side in (mine, other))
    )
    return _Check(
        f"latency: a token takes {math.exp(over.estimate):.2f} [{math.exp(over.low):.2f}, {math.exp(min(over.high, 700)):.2f}] "
        f"times as long as in production over {len(mine)} and {len(other)} answers, {1 + policy.slower:g} is tolerated",
        is_worse=over.low > math.log1p(policy.slower),
    )


def _scores(policy: ReleaseTrial, seen: TrialSeen) -> _Check:
    number = len(seen.excess)
    if number < policy.min_scored:
        text = f"score: {number} corrections since the trial began, {policy.min_scored} are needed"
        return _Check(text, is_known=False)
    found = confidence_sequence(seen.excess, confidence=_confidence(policy, 1), tightest_at=policy.min_scored)
    return _Check(
        f"score: candidate minus production on {number} corrections is {found} bits per byte, {policy.worse:g} is tolerated",
        is_worse=found.low > policy.worse,
        is_established=found.high <= policy.worse,
    )


def _difference(mine: Interval, other: Interval) -> Interval:
    """Of two intervals that hold each by itself."""
    return Interval(
        estimate=mine.estimate - other.estimate,
        low=mine.low - other.high,
        high=mine.high - other.low,
        confidence=1 - (1 - mine.confidence) - (1 - other.confidence),
        num_examples=mine.num_examples + other.num_examples,
        num_clusters=mine.num_clusters + other.num_clusters,
    )
