"""Sequential tests that bet: they may be looked at after every example, for ever, and keep their error rate exactly.

Somebody bets on each example before it is seen, at odds that are fair, or worse, if what is tested holds. What such bets have
won then exceeds 1 / (1 - confidence) at any time at all with a probability of at most 1 - confidence (Ville 1939). Nothing is
asymptotic, and nothing need be known of the distribution.

What changes does so in the middle of a sequence, and a bet that has run since its beginning has lost too much by then. So a
part 1 / (j (j + 1)) of the stake waits for each example j and is bet from there on; the parts sum to 1, so all holds as before.

Source   Waudby-Smith & Ramdas 2024, "Estimating means of bounded random variables by betting", J. R. Statist. Soc. B 86;
         Shin, Ramdas & Rinaldo 2024, "E-detectors: a nonparametric framework for sequential change detection", N. Engl. J.
         Stat. Data Sci. 2 (mixtures over the time of the change); Vovk, Gammerman & Shafer 2022, "Algorithmic Learning in a
         Random World", chapter 8 (conformal test martingales).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_PARTS = (1.0, 0.5, 0.25, 0.125, 0.0625)
"""Of what may be lost at once, the parts that are bet side by side: large ones find large changes sooner."""
_HEAVIEST = 4.0
"""Times the mean weight of those before it, at which the weight of an example ends: one long answer is one answer."""
_BINS = 10
_MEMORIES = (100.0, 1000.0)
"""Values by which the next one is foretold: few find large changes soon, many find small ones at all."""
_PRIOR = 2.0
"""Values that each bin is taken to have held before the first: who has seen little bets little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the bets have come to."""

    won: float
    """The most that a stake of 1 was worth at any time: the evidence against what is tested."""
    needed: float
    """What establishes that it does not hold: 1 / (1 - confidence)."""
    number: int
    """Examples."""
    at: int | None = None
    """After which example, from 1, it was established."""
    since: int | None = None
    """From which example a stake of 1 would have won most by then: about there the change was."""

    @property
    def is_established(self) -> bool:
        return self.at is not None


def mean_exceeds(values: Sequence[float], weights: Sequence[float], limit: float, *, confidence: float) -> Found:
    """Whether the weighted mean of values of at least 0 has come to exceed `limit`, from any example on.

    What is tested: given all before it, each example has E[weight (value - limit)] <= 0. Values have no upper bound. A weight
    counts for at most 4 times the mean of those before it, and for at most the greatest of them; the first example has none
    before it, and nothing is bet on it.
    """
    needed = 1 / (1 - confidence)
    values_N, weights_N = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    number = len(values_N)
    if number < 2 or limit <= 0:
        return Found(won=1.0, needed=needed, number=number)
    before = np.arange(1, number)
    most_N = np.minimum(_HEAVIEST * np.cumsum(weights_N)[:-1] / before, np.maximum.accumulate(weights_N)[:-1])
    share_N = np.minimum(weights_N[1:], most_N) / np.where(most_N > 0, most_N, 1.0)
    gain_N = share_N * (values_N[1:] / limit - 1)
    # A part of all of the stake is lost only by a value of 0 at full weight; a little is kept, and logarithms stay finite.
    logs_PN = np.log1p(np.maximum(np.outer(_PARTS, gain_N), -1 + 1e-12))
    sums_PN = np.cumsum(logs_PN, axis=1)
    starts_N = -np.log(before * (before + 1.0))
    until_PN = np.concatenate([np.zeros((len(_PARTS), 1)), sums_PN[:, :-1]], axis=1)
    won_PN = sums_PN + np.logaddexp.accumulate(starts_N - until_PN, axis=1)
    won_N = np.logaddexp.reduce(won_PN, axis=0) - math.log(len(_PARTS))
    won_N = np.logaddexp(won_N, -np.log(before + 1.0))  # what waits yet
    best = float(np.max(won_N))
    over = np.flatnonzero(won_N >= math.log(needed))
    if not len(over):
        return Found(won=_exp(best), needed=needed, number=number)
    first = int(over[0])
    since = int(np.argmax(np.logaddexp.reduce(sums_PN[:, first : first + 1] - until_PN[:, : first + 1], axis=0)))
    return Found(won=_exp(best), needed=needed, number=number, at=first + 2, since=since + 2)


class RankWatch:
    """Ranks of values among those before them, and a bet on which tenth the next rank lies in.

    Where values are exchangeable (the first ones, and all that follow, come from one population in any order), ranks are uniform
    and independent, exactly, and no bet on them gains. A population that has moved fills some tenths more than others: it is the
    population stability index with a memory and an error rate.
    """

    def __init__(self, reference: Sequence[float]) -> None:
        self._seen = sorted(reference)
        self._counts = [[_PRIOR] * _BINS for _ in _MEMORIES]
        self._won = [-math.inf] * len(_MEMORIES)
        self._number = 0
        self.won = 1.0
        """What a stake of 1 is worth now."""

    def add(self, value: float, *, tie: float) -> None:
        """See the next value.

        tie   uniform on [0, 1) and independent of the value: its place among those that are equal to it
        """
        low, high = bisect.bisect_left(self._seen, value), bisect.bisect_right(self._seen, value)
        rank = (low + tie * (high - low + 1)) / (len(self._seen) + 1)
        self._seen.insert(high, value)
        self._number += 1
        k, start = min(int(rank * _BINS), _BINS - 1), -math.log(self._number * (self._number + 1.0))
        worth = 1 / (self._number + 1)  # what waits yet
        for i, (memory, counts) in enumerate(zip(_MEMORIES, self._counts, strict=True)):
            foretold = counts[k] / sum(counts)
            self._won[i] = float(np.logaddexp(self._won[i], start)) + math.log(_BINS * foretold)
            worth += _exp(self._won[i]) / len(_MEMORIES)
            for b in range(_BINS):
                counts[b] = _PRIOR + (counts[b] - _PRIOR) * (1 - 1 / memory)
            counts[k] += 1
        self.won = worth


def _exp(log: float) -> float:
    """Finite, so that it can be written down."""
    return math.exp(min(log, 700.0))
