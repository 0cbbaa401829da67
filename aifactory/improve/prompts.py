"""The drift of prompts: what users ask now beside what they asked of the same release at first. Pure but for its memory."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from aifactory.evaluate.sequential import RankWatch

LENGTH, TRIGRAMS, DISTANCE, LANGUAGE = WATCHED = ("length", "trigrams", "distance", "language")
_BUCKETS = 1 << 14
_WORD_BUCKETS = 1 << 12
_MOST_NEIGHBOURS = 1000
_SHOWN_LANGUAGES = 5
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
    evidence: dict[str, float] = field(default_factory=dict)
    """By what is watched: what a stake of 1 on that alone was worth."""
    languages: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Where they are watched: the share of the commonest ones among the first prompts, and among the most recent."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        index = ", ".join(f"{name} {value:.2f}" for name, value in self.stability.items())
        said = f"evidence {self.won:.3g} to 1 after {self.at} prompts; population stability index of the last: {index}"
        if self.evidence:
            most = max(self.evidence, key=self.evidence.__getitem__)
            said += f"; most of the evidence is by {most}, {self.evidence[most]:.3g} to 1"
        if self.languages:
            shares = ", ".join(f"{code} {then:.0%} then, {now:.0%} now" for code, (then, now) in self.languages.items())
            said += f"; languages: {shares}"
        return said


class PromptSequence:
    """Prompts of one release in their order: the first are the reference, and all others are bet on.

    length     characters
    trigrams   how much its character trigrams surprise who knows those of half of the first prompts, bits each
    distance   from the nearest of those, by words and pairs of words (1 - cosine of TF-IDF)
    language   how rare its language is among those; watched where a language is said with each prompt
    """

    def __init__(self, *, reference: int, confidence: float, of: Sequence[str] = WATCHED) -> None:
        self._needed = 1 / (1 - confidence)
        self._of = of
        self._first: list[tuple[str, str | None]] = []
        self._nearest: _Nearest | None = None
        self._rarity: dict[str, float] = {}
        self._languages: tuple[list[str], list[str]] = [], []
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

    def add(self, name: str, prompt: str, language: str | None = None) -> None:
        """See the next prompt; `name` is its completion's id, which is chance."""
        if self.drift is not None:
            return
        if self._trigrams is None:
            self._first.append((prompt, language))
            if len(self._first) == self._reference:
                self._learn()
            return
        self.number += 1
        if language is not None:
            self._languages[1].append(language)
            del self._languages[1][:-_RECENT]
        for of, value in self._features(prompt, language).items():
            self._watches[of].add(value, tie=_chance(f"{of} {name}"))
            self._recent[of] = [*self._recent[of][1 - _RECENT :], value]
        if self.won >= self._needed:
            index = {
                of: share_index(*self._languages) if of == LANGUAGE else stability_index(self._base[of], recent)
                for of, recent in self._recent.items()
            }
            self.drift = PromptDrift(
                won=self.won,
                at=self.number,
                stability=index,
                evidence={of: watch.won for of, watch in self._watches.items()},
                languages=_shares(*self._languages) if LANGUAGE in self._watches else {},
            )

    def _learn(self) -> None:
        # What is known of trigrams comes from other prompts than the ranks start from: all that is ranked is then a fixed
        # function of its prompt alone, and ranks of one population are exchangeable.
        learnt, compared = self._first[::2], self._first[1::2]
        counts = np.ones(_BUCKETS)
        for prompt, _ in learnt:
            np.add.at(counts, _trigrams(prompt), 1.0)
        self._trigrams = -np.log2(counts / counts.sum())
        if DISTANCE in self._of:
            self._nearest = _Nearest([prompt for prompt, _ in learnt][:_MOST_NEIGHBOURS])
        told = [language for _, language in self._first if language is not None]
        if LANGUAGE not in self._of or len(told) < len(self._first):
            self._of = [of for of in self._of if of != LANGUAGE]
        else:
            seen = Counter(told[::2])
            self._rarity = {language: -math.log2(number / len(learnt)) for language, number in seen.items()}
            self._languages = (told, [])
        found = [self._features(prompt, language) for prompt, language in compared]
        self._base = {of: [each[of] for each in found] for of in found[0]}
        self._watches = {of: RankWatch(values) for of, values in self._base.items()}
        self._recent = {of: [] for of in self._base}
        self._first = []

    def _features(self, prompt: str, language: str | None) -> dict[str, float]:
        values = {}
        if LENGTH in self._of:
            values[LENGTH] = float(len(prompt))
        if TRIGRAMS in self._of:
            assert self._trigrams is not None
            found = _trigrams(prompt)
            values[TRIGRAMS] = float(self._trigrams[found].mean()) if len(found) else 0.0
        if DISTANCE in self._of:
            assert self._nearest is not None
            values[DISTANCE] = self._nearest.distance(prompt)
        if LANGUAGE in self._of:
            # One that nobody used is rarer than any that somebody did.
            values[LANGUAGE] = self._rarity.get(language or "", math.inf)
        return values


class _Nearest:
    """How far a text is from the nearest of some, by its words and pairs of words."""

    def __init__(self, texts: Sequence[str]) -> None:
        found = [_words(text) for text in texts]
        self._idf = np.ones(_WORD_BUCKETS)
        texts_with = np.zeros(_WORD_BUCKETS)
        for words in found:
            texts_with[np.unique(words)] += 1
        self._idf = np.log((1 + len(texts)) / (1 + texts_with)) + 1
        self._vectors_NW = np.zeros((len(texts), _WORD_BUCKETS), np.float32)
        for row, words in zip(self._vectors_NW, found, strict=True):
            used, values = self._vector(words)
            row[used] = values

    def distance(self, text: str) -> float:
        """1 - the largest cosine; 1 for a text without words, or far from all."""
        used, values = self._vector(_words(text))
        if not len(used):
            return 1.0
        return 1.0 - float((self._vectors_NW[:, used] @ values).max(initial=0.0))

    def _vector(self, words: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        used, times = np.unique(words, return_counts=True)
        values = (1 + np.log(times)) * self._idf[used]
        return used, (values / max(1e-12, float(np.linalg.norm(values)))).astype(np.float32)


def share_index(then: Sequence[str], now: Sequence[str]) -> float:
    """The population stability index of names beside others; half of one more of each, so that one that is new is finite."""
    names = sorted({*then, *now})
    counted = [Counter(then), Counter(now)]
    shares = [np.array([count[name] + 0.5 for name in names]) for count in counted]
    before, after = (share / share.sum() for share in shares)
    return float(((after - before) * np.log(after / before)).sum())


def _shares(then: Sequence[str], now: Sequence[str]) -> dict[str, tuple[float, float]]:
    before, after = Counter(then), Counter(now)
    most = sorted({*then, *now}, key=lambda name: (-before[name] / len(then) - after[name] / max(1, len(now)), name))
    return {name: (before[name] / len(then), after[name] / max(1, len(now))) for name in most[:_SHOWN_LANGUAGES]}


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


def _words(prompt: str) -> npt.NDArray[np.int64]:
    """Buckets of the words of a prompt and of its pairs of words; the same in every process."""
    words = re.findall(r"\w+", prompt[-_LOOKED_AT:].lower())
    named = [*words, *(f"{one} {other}" for one, other in itertools.pairwise(words))]
    return np.array([zlib.crc32(name.encode("utf-8", "replace")) % _WORD_BUCKETS for name in named], np.int64)


def _chance(name: str) -> float:
    """Uniform on [0, 1), by a hash."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:7], "big") / math.ldexp(1, 56)
