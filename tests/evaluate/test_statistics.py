"""Laws of the intervals: they hold the truth as often as they say, also where examples resemble one another."""

from __future__ import annotations

import math

import numpy as np
import pytest

from aifactory.evaluate.statistics import confidence_sequence, rate_sequence, ratio_interval

TRUTH = 0.5


def clustered(rng, num_clusters):
    """Bits and bytes of a few examples of each cluster, which share most of what makes them cost more or less."""
    cluster_of = np.repeat(np.arange(num_clusters), rng.integers(1, 10, num_clusters))
    num_bytes = rng.integers(200, 1200, len(cluster_of))
    shared, own = rng.normal(0, 0.3, num_clusters), rng.normal(0, 0.2, len(cluster_of))
    return (TRUTH + shared[cluster_of] + own) * num_bytes, num_bytes, cluster_of


def misses(num_clusters, *, names, runs, confidence=0.95):
    """How often the whole interval lies above the truth, and below it."""
    rng = np.random.default_rng(num_clusters)
    above = below = 0
    for run in range(runs):
        bits, num_bytes, cluster_of = clustered(rng, num_clusters)
        found = ratio_interval(bits, num_bytes, names(cluster_of), confidence=confidence, samples=400, seed=run)
        above += found.low > TRUTH
        below += found.high < TRUTH
    return above / runs, below / runs


@pytest.mark.parametrize(("num_clusters", "allowed"), [(5, 0.10), (12, 0.08), (40, 0.07)])
def test_the_interval_holds_the_truth_of_clustered_examples_as_often_as_it_says(num_clusters, allowed):
    above, below = misses(num_clusters, names=lambda cluster_of: cluster_of.astype(str), runs=500)

    print(f"{num_clusters} clusters: above {above:.3f}, below {below:.3f}")
    assert above + below < allowed
    assert max(above, below) < 0.6 * allowed


def test_an_interval_that_takes_the_examples_for_independent_does_not():
    above, below = misses(12, names=lambda cluster_of: np.arange(len(cluster_of)).astype(str), runs=150)

    assert above + below > 0.25


def test_a_wider_confidence_is_a_wider_interval_around_the_same_estimate():
    bits, num_bytes, cluster_of = clustered(np.random.default_rng(1), 30)
    options = {"clusters": cluster_of.astype(str), "samples": 500}
    narrow = ratio_interval(bits, num_bytes, confidence=0.8, **options)
    wide = ratio_interval(bits, num_bytes, confidence=0.99, **options)

    assert narrow.estimate == wide.estimate == pytest.approx(bits.sum() / num_bytes.sum())
    assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high
    assert (narrow.num_examples, narrow.num_clusters) == (len(bits), 30)


def test_the_interval_of_pairs_is_narrower_than_what_the_two_have_in_common():
    rng = np.random.default_rng(2)
    champion, num_bytes, cluster_of = clustered(rng, 30)
    candidate = champion - (0.02 + rng.normal(0, 0.02, len(champion))) * num_bytes
    options = {"clusters": cluster_of.astype(str), "confidence": 0.95, "samples": 500}

    alone = ratio_interval(candidate, num_bytes, **options)
    paired = ratio_interval(candidate - champion, num_bytes, **options)

    assert paired.high < 0
    assert paired.low < -0.02 < paired.high
    assert paired.high - paired.low < 0.2 * (alone.high - alone.low)


def test_the_order_of_the_examples_does_not_matter():
    bits, num_bytes, cluster_of = clustered(np.random.default_rng(3), 20)
    order = np.random.default_rng(4).permutation(len(bits))
    options = {"confidence": 0.95, "samples": 500}

    one = ratio_interval(bits, num_bytes, cluster_of.astype(str), **options)
    two = ratio_interval(bits[order], num_bytes[order], cluster_of[order].astype(str), **options)

    assert (two.low, two.estimate, two.high) == pytest.approx((one.low, one.estimate, one.high))
    assert ratio_interval(bits, num_bytes, cluster_of.astype(str), **options) == one


def test_of_no_difference_the_interval_is_zero():
    found = ratio_interval([0.0] * 6, [10] * 6, list("aabbcc"), confidence=0.95, samples=200)

    assert (found.low, found.estimate, found.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("num_clusters", [1, 2, 3])
def test_of_hardly_any_cluster_the_interval_is_finite_and_the_number_is_told(num_clusters):
    bits, num_bytes, cluster_of = clustered(np.random.default_rng(6), num_clusters)
    found = ratio_interval(bits, num_bytes, cluster_of.astype(str), confidence=0.95, samples=200)

    assert found.num_clusters == num_clusters
    assert math.isfinite(found.low)
    assert math.isfinite(found.high)
    if num_clusters > 1:
        ratios = [bits[cluster_of == c].sum() / num_bytes[cluster_of == c].sum() for c in range(num_clusters)]
        assert found.high - found.low > 10 * (max(ratios) - min(ratios))


# ── looking again and again ───────────────────────────────────────────────────────────────────────────────────────────

LOOKS = range(100, 1500, 15)


def false_alarms(streams, *, is_alarm):
    """How many streams without any effect raise an alarm at one look at least."""
    return sum(any(is_alarm(stream[:n]) for n in LOOKS) for stream in streams) / len(streams)


def normal(runs=300):
    return np.random.default_rng(7).normal(0, 1, (runs, LOOKS.stop))


def skewed(runs=300):
    return np.random.default_rng(7).exponential(1, (runs, LOOKS.stop)) - 1


@pytest.mark.parametrize(("streams", "allowed"), [(normal, 0.05), (skewed, 0.07)])
def test_a_confidence_sequence_may_be_looked_at_all_the_time(streams, allowed):
    def is_alarm(values):
        found = confidence_sequence(values, confidence=0.95, tightest_at=300)
        return not found.low <= 0 <= found.high

    rate = false_alarms(streams(), is_alarm=is_alarm)

    print(f"confidence sequence, {streams.__name__}: {rate:.3f}")
    assert rate < allowed


def test_a_test_for_a_fixed_number_may_not():
    def is_alarm(values):
        return abs(values.mean()) > 1.96 * values.std(ddof=1) / math.sqrt(len(values))

    rate = false_alarms(normal(), is_alarm=is_alarm)

    print(f"z-test at every look: {rate:.3f}")
    assert rate > 0.2


def test_the_confidence_sequence_is_that_of_the_theorem():
    values = np.random.default_rng(8).normal(0.3, 2.0, 500)
    alpha, rho, t = 0.1, 0.17, 500
    tightest_at = (-2 * math.log(alpha) + math.log(1 - 2 * math.log(alpha))) / rho**2
    found = confidence_sequence(values, confidence=1 - alpha, tightest_at=tightest_at)

    # arXiv:2103.06476, theorem 2.2.
    half = values.std(ddof=1) * math.sqrt(
        2 * (t * rho**2 + 1) / (t**2 * rho**2) * math.log(math.sqrt(t * rho**2 + 1) / alpha)
    )
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half))


def test_the_sequence_is_narrowest_where_it_is_asked_to_be():
    values = np.tile([-1.0, 1.0], 200)

    def width(tightest_at):
        found = confidence_sequence(values, confidence=0.95, tightest_at=tightest_at)
        return found.high - found.low

    assert width(400) < min(width(100), width(1600))
    assert width(400) == pytest.approx(min(width(n) for n in range(300, 500, 20)), rel=0.01)


def test_an_effect_is_found():
    values = np.random.default_rng(9).exponential(1, 1000) - 0.8

    assert confidence_sequence(values, confidence=0.95, tightest_at=300).low > 0


@pytest.mark.parametrize("values", [[], [1.0]])
def test_before_there_are_two_values_anything_is_possible(values):
    found = confidence_sequence(values, confidence=0.95, tightest_at=300)

    assert (found.low, found.high, found.num_examples) == (-math.inf, math.inf, len(values))


# ── rates ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rate", [0.0, 0.002, 0.05, 0.5, 0.98])
def test_the_interval_of_a_rate_holds_at_every_look_at_once(rate):
    generator = np.random.default_rng(11)
    missed = 0
    for _ in range(200):
        counts = np.cumsum(generator.random(300) < rate)
        looks = [rate_sequence(int(counts[n - 1]), n, confidence=0.9) for n in range(1, 301, 7)]
        missed += any(not look.low <= rate <= look.high for look in looks)
    print(f"rate {rate}: missed in {missed / 200:.3f} of sequences")
    assert missed / 200 <= 0.1


def test_the_interval_of_a_rate_ends_where_the_bet_against_it_has_won():
    found = rate_sequence(3, 40, confidence=0.95)

    for end in (found.low, found.high):
        # Of a uniform prior the bet has won B(1 + 3, 1 + 37) / (p^3 (1 - p)^37).
        won = math.gamma(4) * math.gamma(38) / math.gamma(42) / (end**3 * (1 - end) ** 37)
        assert won == pytest.approx(20)
    assert found.low < found.estimate == 3 / 40 < found.high


@pytest.mark.parametrize(("count", "number", "low", "high"), [(0, 0, 0, 1), (0, 50, 0, 0.2), (50, 50, 0.8, 1)])
def test_a_rate_of_which_nothing_or_all_has_happened(count, number, low, high):
    found = rate_sequence(count, number, confidence=0.95)

    assert found.low == low if low in (0, 1) else found.low > low
    assert found.high == high if high in (0, 1) else found.high < high
