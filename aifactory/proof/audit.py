"""The audit, as a person reads it: who or what did what, and whether the chain of its lines holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from aifactory.errors import ConfigError
from aifactory.records.audit import AuditFault, AuditLine
from aifactory.records.books import Books


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """Lines that were asked for, and what was found in all of them."""

    factory: str
    holds: bool
    """Whether every line stands as it was written, as far as the lines tell (see `records.audit`)."""
    num_lines: int
    head: str
    """Hash of the last line. Kept elsewhere and given back as `expect`, it shows whether anything up to it was touched."""
    begun_after: int
    """So many lines are older than the chain."""
    faults: Sequence[AuditFault]
    num_found: int
    """Lines that were asked for; `lines` has the newest of them."""
    lines_found: Sequence[AuditLine]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as text."""
        lines = [
            f"Audit of {self.factory}: {self.num_lines:,} lines"
            + ("." if self.holds else ", not as they were written.")
        ]
        if self.num_found > len(self.lines_found):
            lines.append(f"The newest {len(self.lines_found):,} of {self.num_found:,}:")
        for line in self.lines_found:
            detail = ", ".join(f"{name}: {_short(value)}" for name, value in line.detail.items())
            lines.append(
                f"{line.number:>6}  {_when(line.at)}  {line.key_id}  {line.action}  {line.subject}  {detail}  [{line.hash[:12]}]"
            )
        lines += [f"{fault.kind}: line {fault.number}: {fault.what}" for fault in self.faults]
        if self.begun_after:
            lines.append(
                f"The first {self.begun_after:,} lines are older than the chain: what was changed before line "
                f"{self.begun_after + 1} was written can't be found."
            )
        if self.holds:
            lines.append("Every line was written after the one before it and says what it said then.")
        return [*lines, f"Head: {self.head}"]


def read_audit(
    books: Books,
    *,
    subject: str | None,
    action: str | None,
    since: str | None,
    until: str | None,
    expect: str | None,
    limit: int,
) -> AuditReport:
    """The whole chain looked through, and of its lines the newest that were asked for.

    since, until   times as ISO 8601 says (`2026-11-26`, `2026-11-26T04:00`); UTC where they name no offset
    Raises   ConfigError for a time that is none, a hash that is none, a limit below 0.
    """
    if limit < 0:
        raise ConfigError(f"expected a limit of 0 or more, found {limit}.")
    if expect is not None and (len(expect) != 64 or set(expect) - set("0123456789abcdef")):
        raise ConfigError(f"expected the hash of a line, 64 hex digits as this command prints them, found {expect!r}.")
    first, last = (None if text is None else moment(text) for text in (since, until))
    chain = books.journal.audited(expect=expect)
    found = [
        line
        for line in chain.lines
        if (subject is None or line.subject == subject)
        and (action is None or line.action == action)
        and (first is None or line.at >= first)
        and (last is None or line.at < last)
    ]
    return AuditReport(
        factory=books.config.name,
        holds=not chain.faults,
        num_lines=len(chain.lines),
        head=chain.head,
        begun_after=chain.begun_after,
        faults=chain.faults,
        num_found=len(found),
        lines_found=found[len(found) - min(limit, len(found)) :],
    )


def moment(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"expected a time such as 2026-11-26 or 2026-11-26T04:00+01:00, found {text!r}.") from error
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _short(value: Any) -> str:
    text = "; ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 100 else text[:99] + "…"
