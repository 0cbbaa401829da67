"""Intervals: of a ratio over clustered examples, and of a mean that is looked at after every example."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate and the two-sided interval around it."""

    estimate: float
    low: float
    high: float
    confidence: float
    num_examples: int
    num_clusters: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio_interval(
    numerators: Sequence[float],
    denominators: Sequence[float],
    clusters: Sequence[str],
    *,
    confidence: float,
    samples: int,
    seed: int = 0,
) -> Interval:
    """The ratio of two sums, with a percentile bootstrap that resamples whole clusters.

    Examples of one cluster (a user, a file) resemble one another; resampling examples would give intervals that are
    too narrow. For a paired comparison the numerators are the differences of the pairs.
    Source   Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapters 8 and 13.
    """
    names, cluster_of = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    tops_C = np.bincount(cluster_of, weights=np.asarray(numerators, np.float64), minlength=len(names))
    bottoms_C = np.bincount(cluster_of, weights=np.asarray(denominators, np.float64), minlength=len(names))
    generator = np.random.Generator(np.random.Philox(key=seed))
    counts_SC = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=samples)
    ratios_S = (counts_SC @ tops_C) / (counts_SC @ bottoms_C)
    low, high = np.quantile(ratios_S, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(
        estimate=float(tops_C.sum() / bottoms_C.sum()),
        low=float(low),
        high=float(high),
        confidence=confidence,
        num_examples=len(numerators),
        num_clusters=len(names),
    )


def confidence_sequence(values: Sequence[float], *, confidence: float, tightest_at: int) -> Interval:
    """The mean of `values` with an interval that holds at every look at once, asymptotically.

    It may be looked at after every example without losing its error rate; it is narrowest, relative to what is
    possible, after about `tightest_at` examples.
    Source   Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas 2021, "Time-uniform central limit theory and asymptotic
             confidence sequences", arXiv:2103.06476, theorem 2.2 and the choice of rho in its appendix.
    """
    values_N: npt.NDArray[np.float64] = np.asarray(values, np.float64)
    n, alpha = len(values_N), 1 - confidence
    if n < 2:
        return Interval(
            estimate=float(values_N.sum()),
            low=-math.inf,
            high=math.inf,
            confidence=confidence,
            num_examples=n,
            num_clusters=n,
        )
    rho2 = (-2 * math.log(alpha) + math.log(-2 * math.log(alpha) + 1)) / tightest_at
    spread = float(values_N.std(ddof=1))
    half = spread * math.sqrt(2 * (n * rho2 + 1) / (n**2 * rho2) * math.log(math.sqrt(n * rho2 + 1) / alpha))
    mean = float(values_N.mean())
    return Interval(
        estimate=mean, low=mean - half, high=mean + half, confidence=confidence, num_examples=n, num_clusters=n
    )
