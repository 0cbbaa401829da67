"""Energy and cost: the energy ledger as it stands, and what is left of the budget of retrains."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from aifactory.energy_ledger import EnergyLedger, read_energy
from aifactory.improve.spending import spending
from aifactory.page.events import last_number
from aifactory.records.books import Books

SPANS = {"all": None, "24h": 86_400.0, "7d": 604_800.0, "30d": 2_592_000.0}
"""What may be looked at: from now back, seconds; None: all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """One limit of `improve.budget`."""

    of: str
    unit: str
    used: float
    """By retrains in the window until now."""
    limit: float

    @property
    def is_empty(self) -> bool:
        return self.used >= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyView:
    """What was used, and what may be."""

    span: str
    ledger: EnergyLedger
    allowances: Sequence[Allowance]
    window_s: float | None
    """Of the budget; None where there is none."""


class EnergyBooks:
    """Reads the ledger again when the journal has a new line, which all of it follows from."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._lock = threading.Lock()
        self._read: dict[str, tuple[int, EnergyLedger]] = {}

    def view(self, span: str = "all") -> EnergyView:
        """The ledger of a span until now. One that is none of `SPANS` is all of it."""
        span = span if span in SPANS else "all"
        budget = self._books.config.improve.budget
        return EnergyView(
            span=span,
            ledger=self._ledger(span),
            allowances=allowances(self._books),
            window_s=None if budget is None else budget.window_s,
        )

    def _ledger(self, span: str) -> EnergyLedger:
        seconds = SPANS[span]
        if seconds is not None:
            since = datetime.fromtimestamp(self._books.journal.clock() - seconds, UTC).isoformat()
            return read_energy(self._books, since=since)
        number = last_number(self._books)
        with self._lock:
            if span not in self._read or self._read[span][0] != number:
                self._read[span] = number, read_energy(self._books)
            return self._read[span][1]


def allowances(books: Books) -> list[Allowance]:
    """The limits of the budget with what retrains have used of them; none where there is no budget."""
    budget = books.config.improve.budget
    if budget is None:
        return []
    spent = spending(books, budget).spent
    limits = (
        ("CPUs", "hours", spent.cpu_hours, budget.cpu_hours),
        ("GPUs", "hours", spent.gpu_hours, budget.gpu_hours),
        ("energy", "J", spent.joules, budget.joules),
        ("money", "", spent.money(budget), budget.money),
    )
    return [
        Allowance(of=of, unit=unit, used=used, limit=limit) for of, unit, used, limit in limits if limit is not None
    ]
