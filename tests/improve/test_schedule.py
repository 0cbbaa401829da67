"""The schedule: when a retrain is due by the clock."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from aifactory.config import RetrainSchedule
from aifactory.improve.schedule import due


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def found(now: str, *, since: str = "2026-01-01 00:00", begun: str | None = None, **schedule: Any) -> str | None:
    slot = due(RetrainSchedule(**schedule), at(now), since=at(since), last_begun=None if begun is None else at(begun))
    return None if slot is None else datetime.fromtimestamp(slot.at, UTC).strftime("%m-%d %H:%M")


def test_an_interval_runs_from_the_first_release_and_then_from_each_retrain() -> None:
    hourly = {"since": "2026-03-01 10:00", "interval_s": 3600}

    assert found("2026-03-01 10:59", **hourly) is None
    assert found("2026-03-01 11:00", **hourly) == "03-01 11:00"
    assert found("2026-03-01 11:29", begun="2026-03-01 10:30", **hourly) is None
    assert found("2026-03-05 00:00", begun="2026-03-01 10:30", **hourly) == "03-01 11:30"


def test_a_time_of_day_is_due_from_then_until_its_grace_is_over_or_a_retrain_has_begun() -> None:
    nightly = {"daily_at": "03:00", "misfire_grace_s": 1800}

    assert found("2026-03-02 02:59", **nightly) is None
    assert found("2026-03-02 03:00", **nightly) == "03-02 03:00"
    assert found("2026-03-02 03:30", **nightly) == "03-02 03:00"
    assert found("2026-03-02 03:31", **nightly) is None
    assert found("2026-03-02 03:20", begun="2026-03-02 03:00", **nightly) is None
    assert found("2026-03-02 03:20", begun="2026-03-02 02:59", **nightly) == "03-02 03:00"
    assert found("2026-03-02 03:20", since="2026-03-02 03:10", **nightly) is None


def test_a_time_of_day_is_that_of_the_zones_clocks_also_where_they_change() -> None:
    berlin = {"daily_at": "02:30", "timezone": "Europe/Berlin", "misfire_grace_s": 600}

    assert found("2026-01-10 01:30", **berlin) == "01-10 01:30"
    assert found("2026-07-10 00:30", **berlin) == "07-10 00:30"
    assert found("2026-03-29 01:30", **berlin) == "03-29 01:30"  # 02:30 is skipped: what clocks show then is 03:30
    # It is shown twice, and the first one is meant.
    assert found("2026-10-25 00:30", **berlin) == "10-25 00:30"
    assert found("2026-10-25 01:30", **berlin) is None


def test_on_days_that_are_not_named_nothing_is_due() -> None:
    weekend = {"daily_at": "03:00", "weekdays": ("sat", "sun")}

    assert [day for day in range(2, 9) if found(f"2026-03-{day:02} 03:00", **weekend)] == [7, 8]  # the 2nd is a Monday
    assert found("2026-03-09 00:00", daily_at="23:30", weekdays=("sun",)) == "03-08 23:30"


def test_at_every_minute_of_weeks_a_slot_that_is_served_is_due_once() -> None:
    schedule = RetrainSchedule(daily_at="23:50", timezone="America/New_York", misfire_grace_s=3600)
    begun: list[float] = []
    start = at("2026-10-20 00:00")
    for minute in range(0, 21 * 24 * 60, 7):
        now = start + 60 * minute
        slot = due(schedule, now, since=start, last_begun=begun[-1] if begun else None)
        if slot is not None:
            assert 0 <= now - slot.at < 420
            begun.append(now)
    assert len(begun) == 21
