"""The budget: whether a retrain that there is reason for pays, and how much of it there is room for. Pure.

Gain     of a retrain, before any was tried: what answers are below the standard. Each one before counts as one more such guess: by
         what its candidate gained on held-out corrections if it was promoted, by nothing if it was not.
Cost     the mean of those before, the training by its steps; before any, that of the cycle over the sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aifactory.config import Budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What something took."""

    cpu_hours: float = 0.0
    gpu_hours: float = 0.0
    joules: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            cpu_hours=self.cpu_hours + other.cpu_hours,
            gpu_hours=self.gpu_hours + other.gpu_hours,
            joules=self.joules + other.joules,
        )

    def times(self, factor: float) -> Usage:
        return Usage(cpu_hours=self.cpu_hours * factor, gpu_hours=self.gpu_hours * factor, joules=self.joules * factor)

    def money(self, budget: Budget) -> float:
        return (
            self.cpu_hours * budget.price_per_cpu_hour
            + self.gpu_hours * budget.price_per_gpu_hour
            + self.joules / 3.6e6 * budget.price_per_kwh
        )

    def said(self, budget: Budget) -> str:
        parts = [f"{self.cpu_hours:.3g} CPU-hours"] if self.cpu_hours else []
        parts += [f"{self.gpu_hours:.3g} GPU-hours"] if self.gpu_hours else []
        parts += [f"{self.joules:,.0f} J"]
        parts += [f"{self.money(budget):.3g} of money"] if budget.has_prices else []
        return ", ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """A retrain, or the cycle over the sources, and what came of it."""

    gain: float
    """On held-out corrections, bits per byte; 0 where nothing was promoted."""
    steps: int
    """That were trained; 0 where it did not come to that, or the model was there already."""
    training: Usage
    rest: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """What is known when it is asked whether a retrain pays."""

    spent: Usage
    """By retrains in the window until now."""
    retrains: Sequence[Tried]
    """That have ended, oldest first."""
    first: Tried | None
    """The cycle over the sources, if it is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Afforded:
    """What there is room for."""

    steps: int
    """Optimiser steps; 0: none now, or it does not pay."""
    reasons: Sequence[str]


def afford(budget: Budget, seen: Spending, *, max_steps: int, lost: float | None) -> Afforded:
    """How many steps of a retrain are paid for.

    lost    what live answers are below the standard, bits per byte; None where that is not known
    """
    gain, why = _expected_gain(seen, lost)
    costs = _expected_cost(seen)
    if costs is None:
        return Afforded(steps=max_steps, reasons=(f"budget: {why}; what a retrain costs is not known yet",))
    per_step, rest = costs
    whole = rest + per_step.times(max_steps)
    said = f"budget: {why}; {max_steps} steps are expected to cost {whole.said(budget)}"
    if gain is not None and gain < budget.min_gain:
        return Afforded(steps=0, reasons=(said, f"refused: it must bring {budget.min_gain:g} bits per byte or more"))
    if gain is not None and budget.worth_per_bit is not None and gain * budget.worth_per_bit < whole.money(budget):
        worth = f"refused: that is worth {gain * budget.worth_per_bit:.3g}, less than it costs"
        return Afforded(steps=0, reasons=(said, worth))
    room, limit = _room(budget, seen.spent, per_step.times(max_steps), rest)
    if room >= 1:
        return Afforded(steps=max_steps, reasons=(said,))
    steps = int(room * max_steps)
    if room >= budget.least_steps_share and steps >= 1:
        return Afforded(steps=steps, reasons=(said, f"shrunk: {limit}; there is room for {steps} steps"))
    fits, _ = _room(budget, Usage(), per_step.times(max_steps), rest)
    if fits < budget.least_steps_share:
        return Afforded(steps=0, reasons=(said, f"refused: {limit}; that is too little for it at any time"))
    return Afforded(steps=0, reasons=(said, f"deferred: {limit}; there is room again as that becomes older"))


def _expected_gain(seen: Spending, lost: float | None) -> tuple[float | None, str]:
    gains = [tried.gain for tried in seen.retrains]
    guesses = [*gains, max(0.0, lost)] if lost is not None else gains
    if not guesses:
        return None, "what a retrain brings is not known yet"
    gain = sum(guesses) / len(guesses)
    promoted = sum(each > 0 for each in gains)
    of = [f"answers are {lost:.3g} below the standard"] if lost is not None else []
    of += [f"{promoted} of {len(gains)} retrains before it gained, {sum(gains):.3g} in all"] if gains else []
    return gain, f"a gain of {gain:.3g} bits per byte is expected ({'; '.join(of)})"


def _expected_cost(seen: Spending) -> tuple[Usage, Usage] | None:
    """Of a step, and of all beside training."""
    trained = [tried for tried in seen.retrains if tried.steps] or (
        [seen.first] if seen.first and seen.first.steps else []
    )
    if not trained:
        return None
    steps = sum(tried.steps for tried in trained)
    training, rest = Usage(), Usage()
    for tried in trained:
        training, rest = training + tried.training, rest + tried.rest
    return training.times(1 / steps), rest.times(1 / len(trained))


def _room(budget: Budget, spent: Usage, training: Usage, rest: Usage) -> tuple[float, str]:
    """The share of the training for which there is room, and the limit that leaves the least."""
    found = (float("inf"), "")
    for name, words in (("cpu_hours", "CPU-hours"), ("gpu_hours", "GPU-hours"), ("joules", "J"), ("money", "of money")):
        limit = getattr(budget, name)
        if limit is None:
            continue
        used, beside, trains = (
            usage.money(budget) if name == "money" else getattr(usage, name) for usage in (spent, rest, training)
        )
        left = limit - used - beside
        share = float("inf") if left >= trains else max(0.0, left) / trains
        text = f"{used:.3g} of {limit:g} {words} are spent in {budget.window_s:g} s"
        found = min(found, (share, text))
    return found
