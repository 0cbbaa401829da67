"""The drift of prompts: what users ask now beside what they asked of the same release at first. Pure but for its memory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aifactory.evaluate.sequential import RankWatch

_BUCKETS = 1 << 14
_LOOKED_AT = 4096
"""Characters of a prompt, its end, where what is new in a long conversation stands."""
_RECENT = 500
_BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptDrift:
    """Prompts that are established to be others than they were at first."""

    won: float
    """What a stake of 1 that they are the same was worth when it was lost."""
    at: int
    """After how many prompts beyond the first ones."""
    stability: dict[str, float]
    """By what is watched: the population stability index of the most recent prompts beside the first, which says how large the
    change is (below 0.1 is usually called small, above 0.25 large) and establishes nothing by itself."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        index = ", ".join(f"{name} {value:.2f}" for name, value in self.stability.items())
        return f"evidence {self.won:.3g} to 1 after {self.at} prompts; population stability index of the last: {index}"


class PromptSequence:
    """Prompts of one release in their order: the first are the reference, and all others are bet on."""

    def __init__(self, *, reference: int, confidence: float) -> None:
        self._needed = 1 / (1 - confidence)
        self._first: list[str] = []
        self._reference = reference
        self._trigrams: npt.NDArray[np.float64] | None = None
        self._base: dict[str, list[float]] = {}
        self._recent: dict[str, list[float]] = {}
        self._watches: dict[str, RankWatch] = {}
        self.number = 0
        """Prompts beyond the first ones."""
        self.drift: PromptDrift | None = None
        """Once it is established."""

    @property
    def has_reference(self) -> bool:
        return self._trigrams is not None

    @property
    def won(self) -> float:
        """What a stake of 1 is worth now. It is shared equally among what is watched."""
        worth = [watch.won for watch in self._watches.values()]
        return sum(worth) / len(worth) if worth else 1.0

    def add(self, name: str, prompt: str) -> None:
        """See the next prompt; `name` is its completion's id, which is chance."""
        if self.drift is not None:
            return
        if self._trigrams is None:
            self._first.append(prompt)
            if len(self._first) == self._reference:
                self._learn()
            return
        self.number += 1
        for of, value in self._features(prompt).items():
            self._watches[of].add(value, tie=_chance(f"{of} {name}"))
            self._recent[of] = [*self._recent[of][1 - _RECENT :], value]
        if self.won >= self._needed:
            index = {of: stability_index(self._base[of], recent) for of, recent in self._recent.items()}
            self.drift = PromptDrift(won=self.won, at=self.number, stability=index)

    def _learn(self) -> None:
        # What is known of trigrams comes from other prompts than the ranks start from: all that is ranked is then a fixed
        # function of its prompt alone, and ranks of one population are exchangeable.
        learnt, compared = self._first[::2], self._first[1::2]
        counts = np.ones(_BUCKETS)
        for prompt in learnt:
            np.add.at(counts, _trigrams(prompt), 1.0)
        self._trigrams = -np.log2(counts / counts.sum())
        found = [self._features(prompt) for prompt in compared]
        self._base = {of: [each[of] for each in found] for of in found[0]}
        self._watches = {of: RankWatch(values) for of, values in self._base.items()}
        self._recent = {of: [] for of in self._base}
        self._first = []

    def _features(self, prompt: str) -> dict[str, float]:
        assert self._trigrams is not None
        found = _trigrams(prompt)
        surprise = float(self._trigrams[found].mean()) if len(found) else 0.0
        return {"length": float(len(prompt)), "trigrams": surprise}


def stability_index(base: Sequence[float], now: Sequence[float]) -> float:
    """The population stability index of values beside others, over tenths of those.

    Source   Siddiqi 2006, "Credit Risk Scorecards"; half a value more in each bin, so that an empty one is finite.
    """
    edges = np.quantile(np.asarray(base), np.linspace(0, 1, _BINS + 1)[1:-1])
    # By whole values (lengths) many may be equal to an edge: a bin may then be empty on both sides, and says nothing.
    shares = []
    for values in (base, now):
        counts = np.bincount(np.searchsorted(edges, np.asarray(values), side="right"), minlength=_BINS) + 0.5
        shares.append(counts / counts.sum())
    return float(((shares[1] - shares[0]) * np.log(shares[1] / shares[0])).sum())


def _trigrams(prompt: str) -> npt.NDArray[np.int64]:
    """Buckets of the trigrams of characters."""
    text = " ".join(prompt[-_LOOKED_AT:].lower().split())
    codes = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32).astype(np.uint64)
    if len(codes) < 3:
        return np.zeros(0, np.int64)
    mixed: npt.NDArray[np.uint64] = codes[:-2] * np.uint64(0x9E3779B1)
    mixed = mixed ^ (codes[1:-1] * np.uint64(0x85EBCA6B)) ^ (codes[2:] * np.uint64(0xC2B2AE35))
    return ((mixed ^ (mixed >> np.uint64(15))) % np.uint64(_BUCKETS)).astype(np.int64)


def _chance(name: str) -> float:
    """Uniform on [0, 1), by a hash."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:7], "big") / math.ldexp(1, 56)
