"""Decisions: from what was observed to `Wait` or `Retrain`, with reasons. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from aifactory.evaluate.sequential import Found
from aifactory.improve.budget import Spending, afford

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
    below: Found
    """The bets that they are within the tolerated standard."""
    new_batches: Sequence[str]
    """Sealed feedback batches on which no cycle has trained yet."""
    running: str | None
    """The cycle that runs now, or whose release is on trial, and may still change what is in production."""
    seconds_since_cycle: float = math.inf
    """Since the last cycle ended."""
    seconds_since_withdrawal: float = math.inf
    """Since the last release was withdrawn, or rolled back, for cause."""
    retrains_today: int = 0
    """That were begun in the 24 hours until now."""
    spending: Spending | None = None
    """What retrains have cost and brought; none where no budget is set."""
    prompts: str | None = None
    """What has established that prompts are others than they were; none where nothing has."""


Awaited = Literal["release", "cycle", "standard", "scores", "drift", "feedback", "cooldown", "budget"]


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
    max_steps: int | None = None
    """Optimiser steps, where the budget has no room for those of the configuration."""

    def to_json(self) -> dict[str, Any]:
        shrunk = {} if self.max_steps is None else {"max_steps": self.max_steps}
        return {"decision": "retrain", "reasons": list(self.reasons), "batches": list(self.batches), **shrunk}


Decision = Wait | Retrain


def decide(policy: Improve, seen: Observation) -> Decision:
    """Retrain if answers are below the standard, beyond doubt, and there is new feedback to learn from."""
    if seen.release is None:
        return Wait(awaited="release", reasons=("there is no release in production",))
    if seen.running is not None:
        return Wait(awaited="cycle", reasons=(f"the cycle {seen.running} is running",))
    scores = _scores(policy, seen)
    moved = [f"prompts are others than they were at first: {seen.prompts}"] if seen.prompts is not None else []
    counts = policy.prompts is not None and policy.prompts.retrain
    if isinstance(scores, Wait) and not (moved and counts):
        return Wait(awaited=scores.awaited, reasons=(*moved, *scores.reasons))
    found = (*moved, *scores.reasons) if isinstance(scores, Wait) else (*moved, scores)
    held_up = _held_up(policy, seen, found)
    if held_up is not None:
        return held_up
    found = (*found, f"{len(seen.new_batches)} new feedback batch(es) to learn from")
    if policy.budget is None or seen.spending is None:
        return Retrain(batches=tuple(seen.new_batches), reasons=found)
    lost = seen.live - seen.standard if seen.standard is not None and seen.num_scored else None
    afforded = afford(policy.budget, seen.spending, max_steps=policy.retrain.max_steps, lost=lost)
    reasons = (*found, *afforded.reasons)
    if not afforded.steps:
        return Wait(awaited="budget", reasons=reasons)
    steps = None if afforded.steps == policy.retrain.max_steps else afforded.steps
    return Retrain(batches=tuple(seen.new_batches), reasons=reasons, max_steps=steps)


def _scores(policy: Improve, seen: Observation) -> Wait | str:
    """What scores establish, or what must come before they do."""
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
        f"is {seen.standard:.3f}, tolerated {limit:.3f}; the evidence that they exceed that came to {seen.below.won:.3g} to 1, "
        f"{seen.below.needed:.3g} to 1 establishes it at {policy.confidence:.0%}"
    )
    if not seen.below.is_established:
        return Wait(awaited="drift", reasons=(found, "that is not established to be below the standard"))
    return f"{found}, which was so after {seen.below.at} answers, most of it since answer {seen.below.since}"


def _held_up(policy: Improve, seen: Observation, found: Sequence[str]) -> Wait | None:
    """Why a retrain for which there is reason must wait."""
    if not seen.new_batches:
        return Wait(awaited="feedback", reasons=(*found, "no feedback batch is sealed that no cycle has read"))
    if seen.seconds_since_cycle < policy.cooldown_s:
        since = f"the last cycle ended {seen.seconds_since_cycle:.0f} s ago, cool-down {policy.cooldown_s:g} s"
        return Wait(awaited="cooldown", reasons=(*found, since))
    if policy.trial is not None and seen.seconds_since_withdrawal < policy.trial.cooldown_s:
        since = (
            f"a release was taken back for cause {seen.seconds_since_withdrawal:.0f} s ago, cool-down "
            f"{policy.trial.cooldown_s:g} s"
        )
        return Wait(awaited="cooldown", reasons=(*found, since))
    if seen.retrains_today >= policy.max_retrains_per_day:
        today = f"{seen.retrains_today} retrains began in the last 24 hours, {policy.max_retrains_per_day} are the most"
        return Wait(awaited="cooldown", reasons=(*found, today))
    return None
