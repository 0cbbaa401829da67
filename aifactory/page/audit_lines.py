"""The newest lines of the audit; whether the chain holds is looked at elsewhere, since that goes through all of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from aifactory.records.books import Books
from aifactory.records.tables import audit


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Who or what did what."""

    number: int
    at: float
    key_id: str
    action: str
    subject: str
    reasons: Sequence[str]


def audit_lines(books: Books, *, limit: int = 15) -> list[Line]:
    """The newest lines, newest first."""
    query = (
        sa.select(*(audit.c[name] for name in ("number", "at", "key_id", "action", "subject", "detail")))
        .where(audit.c.factory == books.config.name)
        .order_by(audit.c.number.desc())
        .limit(limit)
    )
    with books.database.read() as connection:
        return [_line(dict(row)) for row in connection.execute(query).mappings()]


def _line(row: dict[str, Any]) -> Line:
    try:
        detail = json.loads(row.pop("detail"))
    except ValueError:  # a changed line need not be JSON
        detail = {}
    said: Mapping[str, Any] = detail if isinstance(detail, dict) else {}
    reasons = said.get("reasons") or [said.get("reason", "")]
    return Line(**row, reasons=[str(each) for each in reasons if each])
