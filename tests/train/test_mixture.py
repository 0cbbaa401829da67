"""Laws of the mixture: shares follow the weights, no source is read more often than it may be, and nothing is lost."""

from __future__ import annotations

import random

import pytest

from aifactory.config import SourceShare
from aifactory.errors import ConfigError
from aifactory.train.mixture import mix


def test_without_a_mixture_each_source_gives_as_many_rows_as_it_has():
    found = mix({"a": 30, "b": 10, "empty": 0}, {}, draws=80)

    assert {name: (drawn.share, drawn.epochs) for name, drawn in found.items()} == {"a": (0.75, 2.0), "b": (0.25, 2.0)}


def test_shares_follow_the_weights_whatever_the_sizes():
    found = mix({"a": 1000, "b": 10}, {"a": SourceShare(weight=1), "b": SourceShare(weight=3)}, draws=40)

    assert {name: drawn.share for name, drawn in found.items()} == {"a": 0.25, "b": 0.75}
    assert found["b"].epochs == 3.0


def test_what_a_source_may_not_give_the_others_give_by_their_weights():
    mixture = {"a": SourceShare(weight=2), "b": SourceShare(weight=1), "c": SourceShare(weight=3, max_epochs=2)}
    found = mix({"a": 100, "b": 100, "c": 10}, mixture, draws=110)

    assert found["c"].epochs == pytest.approx(2)
    assert {name: drawn.share * 110 for name, drawn in found.items()} == pytest.approx({"a": 60, "b": 30, "c": 20})


def test_a_weight_of_0_leaves_a_source_out():
    assert set(mix({"a": 5, "b": 5}, {"a": SourceShare(weight=0), "b": SourceShare()}, draws=5)) == {"b"}


@pytest.mark.parametrize("seed", range(20))
def test_shares_add_up_and_no_cap_is_passed(seed):
    rng = random.Random(seed)
    rows = {f"s{i}": rng.randrange(1, 500) for i in range(rng.randrange(1, 8))}
    mixture = {
        name: SourceShare(weight=rng.uniform(0.1, 5), max_epochs=rng.choice([None, rng.uniform(0.5, 4)]))
        for name in rows
    }
    most = sum(share.max_epochs * rows[name] if share.max_epochs else 10_000 for name, share in mixture.items())
    draws = rng.uniform(0.1, 1) * most

    found = mix(rows, mixture, draws=draws)

    assert sum(drawn.share for drawn in found.values()) == pytest.approx(1)
    uncapped = []
    for name, drawn in found.items():
        assert drawn.epochs * rows[name] == pytest.approx(drawn.share * draws)
        cap = mixture[name].max_epochs
        assert cap is None or drawn.epochs <= cap * (1 + 1e-9)
        if cap is None or drawn.epochs < cap * (1 - 1e-9):
            uncapped.append(drawn.share / mixture[name].weight)
    assert max(uncapped, default=1) == pytest.approx(min(uncapped, default=1))


def test_too_few_rows_for_the_run_and_a_source_without_a_share_are_errors_that_say_what_to_do():
    with pytest.raises(ConfigError, match=r"21 packed rows, found 20 within their max_epochs; lower train\.max_steps"):
        mix({"a": 10}, {"a": SourceShare(max_epochs=2)}, draws=21)
    with pytest.raises(ConfigError, match=r"found none for \['b'\]"):
        mix({"a": 10, "b": 1}, {"a": SourceShare()}, draws=1)
