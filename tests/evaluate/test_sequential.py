"""Laws of the tests that bet: looked at after every example they err as seldom as they say, and they find what has changed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from aifactory.evaluate.sequential import RankWatch, mean_exceeds

LIMIT = 1.02


def answers(rng, mean, number, spread=0.5):
    """Bits per byte of answers: above 0, skewed, without an upper bound."""
    return rng.gamma((mean / spread) ** 2, spread**2 / mean, number)


def lengths(rng, number):
    return rng.lognormal(4, 1, number)


def looked_at(values, weights, *, confidence=0.95):
    return mean_exceeds(values, weights, LIMIT, confidence=confidence)


# ── the standard ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("spread", [0.2, 1.5])
def test_answers_at_the_tolerated_standard_raise_an_alarm_at_any_time_no_more_often_than_is_said(spread, confidence):
    rng = np.random.default_rng(1)
    runs = 250
    found = [
        looked_at(answers(rng, LIMIT, 1500, spread), lengths(rng, 1500), confidence=confidence) for _ in range(runs)
    ]
    rate = sum(each.is_established for each in found) / runs

    print(f"spread {spread}, confidence {confidence}: {rate:.3f} false alarms in 1,500 looks each")
    assert rate <= 1 - confidence


def test_the_first_answers_may_be_looked_at_too():
    rng = np.random.default_rng(2)
    # 1 of 50 answers costs 51 bits per byte, all others nothing: no average of a few of them looks like the mean.
    runs = [(rng.random(200) < 0.02) * 50 * LIMIT for _ in range(500)]
    rate = sum(looked_at(values, np.ones(200)).is_established for values in runs) / len(runs)

    print(f"rare and large: {rate:.3f}")
    assert rate <= 0.05


@pytest.mark.parametrize(
    ("mean", "before", "power"), [(1.1, 0, 0.9), (1.2, 0, 1.0), (1.2, 1000, 0.95), (1.5, 1000, 1.0)]
)
def test_answers_that_have_become_worse_are_found_also_after_many_good_ones(mean, before, power):
    rng = np.random.default_rng(3)
    runs = 60
    found = [
        looked_at(np.concatenate([answers(rng, 1.0, before), answers(rng, mean, 1500)]), lengths(rng, before + 1500))
        for _ in range(runs)
    ]
    delays = [each.at - before for each in found if each.at is not None]

    print(
        f"{mean:.2f} for 1.00 (tolerated {LIMIT}) after {before} good answers: found in {len(delays) / runs:.0%}, after "
        f"{np.median(delays):.0f} more (median)"
    )
    assert len(delays) / runs >= power
    assert min(delays) > 0 or before == 0
    if before:
        begun = np.median([each.since for each in found if each.is_established])
        assert abs(begun - before) < 0.25 * before


def test_what_was_established_stays_so_whatever_comes():
    rng = np.random.default_rng(4)
    values, weights = np.concatenate([answers(rng, 2.0, 100), answers(rng, 0.5, 900)]), lengths(rng, 1000)

    first = looked_at(values[:100], weights[:100])
    later = looked_at(values, weights)

    assert first.is_established
    assert (later.at, later.since) == (first.at, first.since)


def test_it_is_the_same_at_each_look_whatever_was_looked_at_before():
    rng = np.random.default_rng(5)
    values, weights = answers(rng, 1.3, 400), lengths(rng, 400)
    at = looked_at(values, weights).at
    assert at is not None

    assert not looked_at(values[: at - 1], weights[: at - 1]).is_established
    assert looked_at(values[:at], weights[:at]).at == at


def test_an_answer_of_any_length_weighs_at_most_four_others():
    good, long = np.full(200, 0.9), np.full(200, 1.0)
    good[100], long[100] = 60.0, 1e9
    short = np.full(200, 1.0)
    short[100] = 4.0

    assert looked_at(good, long).won == looked_at(good, short).won < 20
    # Weights alone say nothing: a unit is as good as another.
    assert looked_at(good, 1000 * short).won == pytest.approx(looked_at(good, short).won)


@pytest.mark.parametrize("values", [[], [5.0]])
def test_of_fewer_than_two_answers_nothing_is_said(values):
    found = looked_at(values, [1.0] * len(values))

    assert (found.won, found.at, found.number) == (1.0, None, len(values))
    assert found.needed == pytest.approx(20)


def test_evidence_beyond_all_numbers_stays_one_that_can_be_written_down():
    found = looked_at(np.full(20_000, 50.0), np.ones(20_000))

    assert math.isfinite(found.won)
    assert found.won > 1e300


# ── ranks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def delay(rng, reference, live, *, needed=20.0):
    """After how many values an alarm is raised; None: after none of them."""
    watch = RankWatch(reference)
    for number, value in enumerate(live, 1):
        watch.add(value, tie=rng.random())
        if watch.won >= needed:
            return number
    return None


@pytest.mark.parametrize("draw", ["normal", "few_values", "heavy"])
def test_values_of_one_population_raise_an_alarm_at_any_time_no_more_often_than_is_said(draw):
    rng = np.random.default_rng(6)
    draws = {
        "normal": lambda n: rng.normal(size=n),
        "few_values": lambda n: rng.integers(0, 3, n),
        "heavy": lambda n: rng.standard_cauchy(n),
    }
    runs = 200
    alarms = sum(delay(rng, draws[draw](100), draws[draw](250), needed=10.0) is not None for _ in range(runs))

    # The bound is nearly reached, so that the share of so many runs may lie above it: by two standard errors at most.
    print(f"ranks of {draw}: {alarms / runs:.3f} false alarms in 250 looks each, 0.1 allowed")
    assert alarms / runs <= 0.1 + 2 * math.sqrt(0.09 / runs)


@pytest.mark.parametrize(("shift", "stretch", "before"), [(1.0, 1.0, 0), (1.0, 1.0, 400), (0.0, 3.0, 0)])
def test_a_population_that_moves_or_spreads_is_found(shift, stretch, before):
    rng = np.random.default_rng(7)
    delays = [
        delay(rng, rng.normal(size=200), np.concatenate([rng.normal(size=before), rng.normal(shift, stretch, 400)]))
        for _ in range(20)
    ]
    found = [each - before for each in delays if each is not None]

    print(f"moved by {shift}, spread by {stretch}, after {before}: {len(found) / 20:.0%}, after {np.median(found):.0f}")
    assert len(found) >= 19
