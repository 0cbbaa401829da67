"""The schedule: whether a retrain is due by the clock. Pure; the clock is handed in."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aifactory.config.schedule import RetrainSchedule

_WEEK = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A moment of the schedule for which no retrain has begun yet, though it has come."""

    at: float
    """Seconds since 1970, UTC."""
    said: str


def due(schedule: RetrainSchedule, now: float, *, since: float, last_begun: float | None) -> Slot | None:
    """The newest slot that has come and for which nothing was begun; None where there is none.

    since       from when on there is something to retrain: slots before that are nobody's
    last_begun  when the last retrain began, for whatever reason: it stands for every slot before it
    """
    if schedule.interval_s is not None:
        from_ = since if last_begun is None else max(since, last_begun)
        at = from_ + schedule.interval_s
        what = "the first release" if last_begun is None or since > last_begun else "the last retrain"
        said = f"schedule: {now - from_:.0f} s since {what} began, one is due every {schedule.interval_s:g} s"
        return Slot(at=at, said=said) if at <= now else None
    found = _newest(schedule, now)
    if found is None or found < since or (last_begun is not None and last_begun >= found):
        return None
    if now - found > schedule.misfire_grace_s:
        return None  # it was missed; the next one comes
    days = f" on {', '.join(schedule.weekdays)}" if schedule.weekdays else ""
    when = datetime.fromtimestamp(found, UTC).strftime("%Y-%m-%d %H:%M")
    return Slot(
        at=found,
        said=f"schedule: {schedule.daily_at}{days} in {schedule.timezone} has come ({when} UTC), {now - found:.0f} s ago",
    )


def _newest(schedule: RetrainSchedule, now: float) -> float | None:
    """The last moment not after now at which the clocks of the zone show the time, on one of the days."""
    assert schedule.daily_at is not None
    zone, at = schedule.zone, time.fromisoformat(schedule.daily_at)
    today = datetime.fromtimestamp(now, zone).date()
    for back in range(8):
        day = today - timedelta(days=back)
        if schedule.weekdays and _WEEK[day.weekday()] not in schedule.weekdays:
            continue
        # Of an hour that clocks skip, the moment after it; of one that they show twice, the first.
        moment = datetime.combine(day, at, zone).timestamp()
        if moment <= now:
            return moment
    return None
