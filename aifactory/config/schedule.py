"""The section `improve.schedule`: retrains at fixed times, whatever is found."""

from __future__ import annotations

from datetime import UTC, tzinfo
from typing import Any, Literal
from zoneinfo import ZoneInfo

from pydantic import Field, field_validator, model_validator

from aifactory.config.section import Section

Weekday = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]


class RetrainSchedule(Section):
    """A retrain after every so many seconds, or at a time of day, once there is new feedback: what waits is then sealed, however little
    it is. Cool-down, daily limit, budget and gate hold as ever."""

    interval_s: float | None = Field(default=None, gt=0)
    """Time from the beginning of one retrain, or of the watch over the first release, to the next, seconds. Default: none."""
    daily_at: str | None = Field(default=None, pattern=r"^([01]\d|2[0-3]):[0-5]\d$")
    """In its place a time of day, "HH:MM". Default: none."""
    weekdays: tuple[Weekday, ...] = ()
    """Of daily_at: on these days alone. Default: on all."""
    timezone: str = "UTC"
    """Of daily_at: the zone whose clocks it is read from, by its IANA name, such as Europe/Berlin. Default: UTC."""
    misfire_grace_s: float = Field(default=3600.0, gt=0)
    """Of daily_at: how long after it a retrain may still begin that something held up, such as a cool-down or a machine that was off,
    seconds. Default: 3600."""

    @field_validator("daily_at", mode="before")
    @classmethod
    def _not_sexagesimal(cls, value: Any) -> Any:
        # YAML 1.1 reads 13:30 without quotes as 13 times 60 and 30, and nobody means that here.
        is_minutes = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 24 * 60
        return f"{value // 60:02}:{value % 60:02}" if is_minutes else value

    @property
    def zone(self) -> tzinfo:
        """The zone of daily_at; UTC needs no database of zones."""
        return UTC if self.timezone == "UTC" else ZoneInfo(self.timezone)

    @field_validator("timezone")
    @classmethod
    def _is_known(cls, value: str) -> str:
        try:
            if value != "UTC":
                ZoneInfo(value)
        except (KeyError, ValueError, OSError) as error:
            raise ValueError(
                f"expected the IANA name of a time zone, such as Europe/Berlin, found {value!r}; correct it, or install tzdata "
                "where the machine knows none"
            ) from error
        return value

    @model_validator(mode="after")
    def _one_of_both(self) -> RetrainSchedule:
        if (self.interval_s is None) == (self.daily_at is None):
            found = "neither" if self.daily_at is None else "both"
            raise ValueError(f"expected either interval_s or daily_at in improve.schedule, found {found}; name one")
        for name in ("weekdays", "timezone", "misfire_grace_s"):
            if self.daily_at is None and getattr(self, name) != RetrainSchedule.model_fields[name].default:
                raise ValueError(f"expected {name} beside daily_at alone, found interval_s; leave it out")
        if len(set(self.weekdays)) != len(self.weekdays):
            raise ValueError(
                f"expected each of the weekdays once, found {list(self.weekdays)}; leave out what is twice"
            )
        return self
