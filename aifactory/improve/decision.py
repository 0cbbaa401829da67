"""Decisions: from what was observed to `Wait` or `Retrain`, with reasons. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from aifactory.config import Improve


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What is known when it is decided."""

    release: str | None
    """The release in production."""
    standard: float | None
    """What it needs for answers about rows that it was taught, bits per byte; none if that is not known."""
    num_scored: int
    """Its answers of which it is known what they should have been."""
    live: float
    """What it needs for those, bits per byte."""
    excess_low: float
    """Lower end of the confidence sequence of what that is above the tolerated standard, bits per byte."""
    new_batches: Sequence[str]
    """Sealed feedback batches on which no cycle has trained yet."""
    running: str | None
    """The cycle that runs now, or whose release is on trial, and may still change what is in production."""
    seconds_since_cycle: float = math.inf
    """Since the last cycle ended."""
    seconds_since_withdrawal: float = math.inf
    """Since the last release was withdrawn, or rolled back, for cause."""


Awaited = Literal["release", "cycle", "standard", "scores", "drift", "feedback", "cooldown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Nothing is to be done now."""

    awaited: Awaited
    """What must come before anything is done; the same for as long as the reasons differ in their numbers alone."""
    reasons: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        return {"decision": "wait", "awaited": self.awaited, "reasons": list(self.reasons)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrain:
    """A cycle is to begin, on these batches beside what its parent was trained on."""

    batches: Sequence[str]
    reasons: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        return {"decision": "retrain", "reasons": list(self.reasons), "batches": list(self.batches)}


Decision = Wait | Retrain


def decide(policy: Improve, seen: Observation) -> Decision:
    """Retrain if answers are below the standard, beyond doubt, and there is new feedback to learn from."""
    if seen.release is None:
        return Wait(awaited="release", reasons=("there is no release in production",))
    if seen.running is not None:
        return Wait(awaited="cycle", reasons=(f"the cycle {seen.running} is running",))
    if seen.standard is None:
        return Wait(awaited="standard", reasons=(f"the scorecard of {seen.release} states no standard",))
    if seen.num_scored < policy.min_scored:
        return Wait(
            awaited="scores",
            reasons=(
                f"{seen.num_scored} answers of {seen.release} were scored, at least {policy.min_scored} are needed",
            ),
        )
    limit = seen.standard * (1 + policy.tolerance)
    found = (
        f"live answers of {seen.release} need {seen.live:.3f} bits per byte over {seen.num_scored} answers; the standard "
        f"is {seen.standard:.3f}, tolerated {limit:.3f}; with {policy.confidence:.0%} confidence they exceed that by more "
        f"than {seen.excess_low:.3f}"
    )
    if not seen.excess_low > 0:  # nor if it is no number
        return Wait(awaited="drift", reasons=(found, "that is not established to be below the standard"))
    if not seen.new_batches:
        return Wait(awaited="feedback", reasons=(found, "no feedback batch is sealed that no cycle has read"))
    if seen.seconds_since_cycle < policy.cooldown_s:
        return Wait(
            awaited="cooldown",
            reasons=(
                found,
                f"the last cycle ended {seen.seconds_since_cycle:.0f} s ago, cool-down {policy.cooldown_s:g} s",
            ),
        )
    if policy.trial is not None and seen.seconds_since_withdrawal < policy.trial.cooldown_s:
        return Wait(
            awaited="cooldown",
            reasons=(
                found,
                f"a release was taken back for cause {seen.seconds_since_withdrawal:.0f} s ago, cool-down "
                f"{policy.trial.cooldown_s:g} s",
            ),
        )
    return Retrain(
        batches=tuple(seen.new_batches),
        reasons=(found, f"{len(seen.new_batches)} new feedback batch(es) to learn from"),
    )
