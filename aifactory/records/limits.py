"""Limits: how much a key or a team may ask for, and in what time."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

from sqlalchemy.engine import RowMapping

SubjectKind = Literal["key", "team"]
Window = Literal["day", "month", "total"]
WINDOWS: tuple[Window, ...] = ("day", "month", "total")
RATE_S = 60
"""The time for which rates hold, seconds."""


class Subject(NamedTuple):
    """Whom a limit holds for."""

    kind: SubjectKind
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a key or a team may use; None: as much as there is."""

    requests_per_minute: int | None = None
    """In any 60 seconds; all requests that are let in, feedback too."""
    tokens_per_minute: int | None = None
    """Of the requests that were let in in any 60 seconds: of prompts, and of answers; the most that an open one may get."""
    concurrent: int | None = None
    """Requests open at once."""
    budget_tokens: int | None = None
    """Of prompts and answers, in the window."""
    budget_money: float | None = None
    """By `runtime.gateway`'s prices of tokens, in the window."""
    budget_joules: float | None = None
    """As replicas enter them every `runtime.endpoint.meter_s` seconds, in the window; so it may be passed by what is used in such
    a time."""
    budget_window: Window = "month"
    """A calendar day or month, UTC, or all time."""

    @property
    def are_none(self) -> bool:
        """Whether nothing is limited."""
        return not self.asked()

    @property
    def has_budget(self) -> bool:
        return any(name.startswith("budget_") for name in self.asked())

    def asked(self) -> dict[str, Any]:
        """What is limited, by name; the window where there is a budget."""
        found = {name: value for name in NAMES if (value := getattr(self, name)) is not None}
        has_budget = any(name.startswith("budget_") for name in found)
        return found | ({"budget_window": self.budget_window} if has_budget else {})


NAMES = tuple(field.name for field in fields(Limits) if field.name != "budget_window")
"""The numbers of `Limits`."""


def limits_of(row: RowMapping) -> Limits:
    """A row of the table as a value."""
    return Limits(**{field.name: row[field.name] for field in fields(Limits)})
