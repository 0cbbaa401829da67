"""Intervals: of a ratio over clustered examples, and of a mean or a rate that is looked at after every example."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_FARTHEST = 100.0
"""Standard errors; reached by intervals over two or three clusters alone."""


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
    """The ratio of two sums, with a bootstrap-t that resamples whole clusters.

    Examples of one cluster (a user, a file) resemble one another; resampling examples would give intervals that are
    too narrow. For a paired comparison the numerators are the differences of the pairs. From one cluster nothing can be
    said: its interval has no width, and whoever decides looks at `num_clusters`.
    Source   Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 12, with the standard error of the
             linearised ratio. Percentiles of the ratio itself cover 83 % instead of 95 with 5 clusters, this 93 %.
    """
    names, cluster_of = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    tops_C = _sum_by(cluster_of, numerators, len(names))
    bottoms_C = _sum_by(cluster_of, denominators, len(names))
    generator = np.random.Generator(np.random.Philox(key=seed))
    counts_SC = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=samples)
    estimate, error = _ratio_and_error(np.ones((1, len(names))), tops_C, bottoms_C)
    ratios_S, errors_S = _ratio_and_error(counts_SC.astype(np.float64), tops_C, bottoms_C)
    with np.errstate(divide="ignore", invalid="ignore"):
        distances_S = (ratios_S - estimate) / errors_S
    # A resample of one cluster alone has no error of its own: what it says is as far away as can be.
    distances_S = np.clip(np.nan_to_num(distances_S), -_FARTHEST, _FARTHEST)
    near, far = np.quantile(distances_S, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(
        estimate=float(estimate[0]),
        low=float(estimate[0] - far * error[0]),
        high=float(estimate[0] - near * error[0]),
        confidence=confidence,
        num_examples=len(numerators),
        num_clusters=len(names),
    )


def _sum_by(cluster_of: npt.NDArray[np.intp], values: Sequence[float], num_clusters: int) -> npt.NDArray[np.float64]:
    sums = np.bincount(cluster_of, weights=np.asarray(values, np.float64), minlength=num_clusters)
    return np.asarray(sums, np.float64)


def _ratio_and_error(
    counts_SC: npt.NDArray[np.float64], tops_C: npt.NDArray[np.float64], bottoms_C: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The ratio of each resample and its standard error over clusters."""
    num_clusters = len(tops_C)
    sums_S5 = counts_SC @ np.stack([tops_C, bottoms_C, tops_C**2, tops_C * bottoms_C, bottoms_C**2], axis=1)
    top_S, bottom_S, top2_S, both_S, bottom2_S = sums_S5.T
    ratio_S = top_S / bottom_S
    residual2_S = np.maximum(top2_S - 2 * ratio_S * both_S + ratio_S**2 * bottom2_S, 0.0)
    return ratio_S, np.sqrt(residual2_S * num_clusters / max(1, num_clusters - 1)) / bottom_S


def confidence_sequence(values: Sequence[float], *, confidence: float, tightest_at: int) -> Interval:
    """The mean of `values` with an interval that holds at every look at once, asymptotically.

    It may be looked at after every example without losing its error rate; it is narrowest, relative to what is
    possible, after about `tightest_at` examples. It is asymptotic: begin to look at about a hundred examples. From
    there on exponentially distributed ones gave 5 % false alarms at a confidence of 0.95, from two on 20 %.
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


def rate_sequence(count: int, number: int, *, confidence: float) -> Interval:
    """The rate of what happened `count` times of `number`, with an interval that holds at every look at once, from the first.

    It is exact, however rare the event is: the rates against which a bet of uniform prior has not won 1 / (1 - confidence).
    Source   Robbins 1970, "Statistical Methods Related to the Law of the Iterated Logarithm", Ann. Math. Statist. 41; Howard,
             Ramdas, McAuliffe & Sekhon 2021, "Time-uniform, nonparametric, nonasymptotic confidence sequences", Ann. Statist.
             49, section 3.2 (beta-binomial mixture).
    """
    rest, threshold = number - count, -math.log(1 - confidence)
    won = math.lgamma(1 + count) + math.lgamma(1 + rest) - math.lgamma(2 + number)

    def is_refuted(rate: float) -> bool:
        """Whether the bet against it has won: it is not in the interval."""
        if rate <= 0 or rate >= 1:
            return (count if rate <= 0 else rest) > 0 or won > threshold
        return won - count * math.log(rate) - rest * math.log1p(-rate) > threshold

    estimate = count / number if number else 0.0

    def end(outside: float) -> float:
        """Where the interval ends on the way from the estimate to `outside`."""
        if not is_refuted(outside):
            return outside
        inside = estimate if number else 0.5
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if is_refuted(middle) else (middle, outside)
        return outside

    return Interval(
        estimate=estimate,
        low=end(0.0),
        high=end(1.0),
        confidence=confidence,
        num_examples=number,
        num_clusters=number,
    )
