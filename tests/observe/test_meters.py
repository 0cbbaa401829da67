"""Laws of meters: nothing is lost between threads, nothing grows without bound, and Prometheus' own parser reads what is said."""

from __future__ import annotations

import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from aifactory.observe.meter import MOST_SERIES, Meters


@pytest.fixture
def meters() -> Meters:
    made = Meters()
    made.identity["factory"] = "alpha"
    return made


def read(meters: Meters) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(meters.text())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_what_many_threads_add_is_all_there(meters: Meters) -> None:
    counter = meters.counter("aifactory_a_rows_total", "rows", "side")
    histogram = meters.histogram("aifactory_a_wait_seconds", "wait", bounds=[1.0])

    def add() -> None:
        for _ in range(20_000):
            counter.add(side="left")
            histogram.observe(0.5)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    found = read(meters)
    assert found["aifactory_a_rows_total", (("factory", "alpha"), ("side", "left"))] == 80_000
    assert found["aifactory_a_wait_seconds_count", (("factory", "alpha"),)] == 80_000
    assert found["aifactory_a_wait_seconds_sum", (("factory", "alpha"),)] == 40_000


def test_a_value_is_in_its_bucket_and_in_all_wider_ones(meters: Meters) -> None:
    histogram = meters.histogram("aifactory_a_wait_seconds", "wait", bounds=[0.1, 1.0, 10.0])
    histogram.observe(0.1)
    histogram.observe(0.5, times=3)
    histogram.observe(99.0)

    buckets = {dict(labels)["le"]: value for (name, labels), value in read(meters).items() if name.endswith("_bucket")}
    assert buckets == {"0.10000000000000001": 1, "1": 4, "10": 4, "+Inf": 5}


def test_whoever_invents_labels_fills_no_memory(meters: Meters) -> None:
    counter = meters.counter("aifactory_a_rows_total", "rows", "rule")
    for number in range(MOST_SERIES + 50):
        counter.add(rule=f"rule-{number}")

    found = read(meters)
    assert len(found) == MOST_SERIES + 1
    assert found["aifactory_a_rows_total", (("factory", "alpha"), ("rule", "other"))] == 50


def test_text_of_labels_can_be_anything(meters: Meters) -> None:
    rule = 'a "quoted"\\ rule\nof two lines'
    meters.counter("aifactory_a_rows_total", "rows", "rule").add(rule=rule)
    assert list(read(meters)) == [("aifactory_a_rows_total", (("factory", "alpha"), ("rule", rule)))]


@pytest.mark.parametrize(
    "name", ["rows_total", "aifactory_a_rows", "aifactory_a_wait_total_seconds_total_", "aifactory_A_rows_total"]
)
def test_a_counter_is_named_as_prometheus_asks(meters: Meters, name: str) -> None:
    with pytest.raises(ValueError, match="expected aifactory_<room>_<what>_<unit>"):
        meters.counter(name, "rows")


def test_a_gauge_says_its_unit_and_is_no_total(meters: Meters) -> None:
    for name in ("aifactory_a_wait", "aifactory_a_wait_seconds_total"):
        with pytest.raises(ValueError, match="expected aifactory_<room>_<what>_<unit>"):
            meters.gauge(name, "wait")


def test_labels_that_a_metric_does_not_have_are_refused(meters: Meters) -> None:
    counter = meters.counter("aifactory_a_rows_total", "rows", "side")
    for labels in ({}, {"rule": "x"}, {"side": "x", "rule": "y"}):
        with pytest.raises(ValueError, match=r"expected the labels \('side',\)"):
            counter.add(**labels)


def test_a_counter_never_falls(meters: Meters) -> None:
    with pytest.raises(ValueError, match="expected at least 0"):
        meters.counter("aifactory_a_rows_total", "rows").add(-1)


def test_what_is_looked_at_is_as_it_is_when_it_is_read_and_one_that_fails_hides_no_other(meters: Meters) -> None:
    gauge, value = meters.gauge("aifactory_a_waiting_count", "waiting"), [1]
    meters.before_reading(lambda: 1 / 0)
    end = meters.before_reading(lambda: gauge.set(value[0]))
    value[0] = 7
    assert list(read(meters).values()) == [7]
    end()
    value[0] = 8
    assert list(read(meters).values()) == [7]
