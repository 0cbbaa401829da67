"""Alerts: what the books say that a person should know, worst first, each with what to do about it.

now      something is wrong until somebody, or the factory itself, does something
lately   something went wrong in the last day and is over, or was dealt with as it should be
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from aifactory.page.cycles import cycles
from aifactory.page.events import newest
from aifactory.page.runs import Run, going_on
from aifactory.page.spending import allowances
from aifactory.records.audit import AuditFault
from aifactory.records.books import Books

LATELY_S = 86_400.0
_NOW_S = 3600.0
"""What the journal tells once, and of whose end it says nothing, counts as going on for so long."""
_AUDITED_EVERY_S = 60.0
"""The whole chain is gone through: that takes its time where it is long."""
_MOST = 100
_LONGEST = 400
"""Characters of what went wrong; the whole of it stands in the journal."""
_ENDED_BY = {
    "load_failed": ("swapped", "trial_loaded"),
    "tick_failed": ("decided",),
    "unscored": (),
    "adapter_refused": (),
}
"""What went wrong, and after what about the same release it is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """Something that a person should know."""

    severity: Literal["now", "lately"]
    kind: str
    title: str
    said: str
    at: float
    """Seconds since 1970, UTC."""
    what_to_do: str
    link: str
    """View of the page that has more of it."""


class AuditWatch:
    """Goes through the audit's chain now and then."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._lock = threading.Lock()
        self._looked_at = float("-inf")
        self._faults: Sequence[AuditFault] = ()

    def faults(self) -> Sequence[AuditFault]:
        """What was wrong with it a minute ago at most."""
        with self._lock:
            if time.monotonic() - self._looked_at >= _AUDITED_EVERY_S:
                self._faults = self._books.journal.audited().faults
                self._looked_at = time.monotonic()
            return self._faults


def alerts(books: Books, *, audit: Sequence[AuditFault] = (), runs: Sequence[Run] | None = None) -> list[Alert]:
    """All alerts: what is wrong now, then what was lately, the newest of each first.

    audit   what is wrong with the audit's chain
    runs    those that go on, where the caller has them
    """
    found = [
        *_audit(books, audit),
        *_cycles(books),
        *_releases(books),
        *_events(books),
        *_budget(books),
        *_key_budgets(books),
        *_runs(going_on(books) if runs is None else runs),
    ]
    return sorted(found, key=lambda alert: (alert.severity != "now", -alert.at))[:_MOST]


def _audit(books: Books, faults: Sequence[AuditFault]) -> Iterator[Alert]:
    for fault in faults:
        yield Alert(
            severity="now",
            kind="audit",
            title=f"The audit is not as it was written: line {fault.number} {fault.kind}",
            said=_cut(fault.what),
            at=books.journal.clock(),
            what_to_do="aifactory audit shows all that is wrong; find out who writes to the database.",
            link="alerts",
        )


def _cycles(books: Books) -> Iterator[Alert]:
    since = books.journal.clock() - LATELY_S
    newest_cycles = cycles(books, limit=_MOST)
    for cycle in newest_cycles:
        over = cycle is not newest_cycles[0]
        if cycle.state == "failed" and (not over or cycle.heard_at >= since):
            yield Alert(
                severity="lately" if over else "now",
                kind="failed cycle",
                title=f"Cycle {cycle.number} failed",
                said=_cut("; ".join(cycle.reasons)),
                at=cycle.closed_at or cycle.heard_at,
                what_to_do="Mend what its reasons name; then ask for another retrain (aifactory retrain).",
                link=f"cycles/{cycle.number}",
            )
        elif cycle.state == "rejected" and cycle.heard_at >= since:
            failed = [reason for reason in cycle.reasons if not reason.startswith("passed")]
            yield Alert(
                severity="lately",
                kind="rejected release",
                title=f"The candidate of cycle {cycle.number} was rejected",
                said=_cut("; ".join(failed)),
                at=cycle.closed_at or cycle.heard_at,
                what_to_do="Nothing: production stays as it is. Its page says which checks failed.",
                link=f"cycles/{cycle.number}",
            )
        elif cycle.state == "running" and cycle.failed_attempts:
            yield Alert(
                severity="now",
                kind="failed attempt",
                title=f"Cycle {cycle.number} runs again after {len(cycle.failed_attempts)} failed attempt(s)",
                said=_cut(cycle.failed_attempts[-1]),
                at=cycle.heard_at,
                what_to_do="It is tried again by itself; what it has made so far is taken as it is.",
                link=f"cycles/{cycle.number}",
            )


def _releases(books: Books) -> Iterator[Alert]:
    last = {entry.release: entry for entry in books.registry.trial_entries()}
    for entry in last.values():
        if not entry.quarantined:
            continue
        name = f"{books.config.name}-r{entry.release}"
        yield Alert(
            severity="lately",
            kind="quarantine",
            title=f"{name} is in quarantine",
            said=_cut("; ".join(map(str, entry.reason.get("reasons", [entry.reason.get("reason", "")])))),
            at=entry.at,
            what_to_do="It is neither tried nor served again, unless --despite-quarantine says so.",
            link=f"releases/{entry.release}",
        )


def _events(books: Books) -> Iterator[Alert]:
    since = books.journal.clock() - LATELY_S
    ends = {event for events in _ENDED_BY.values() for event in events}
    lines = newest(books, of=[*_ENDED_BY, *ends], since=since, limit=500)
    over: set[tuple[str, str | None]] = set()
    told: set[tuple[str, str | None]] = set()
    for line in lines:  # newest first: what ended something is met before it
        for event, ended_by in _ENDED_BY.items():
            if line.event in ended_by:
                over.add((event, None if event == "tick_failed" else line.subject))
        if line.event not in _ENDED_BY or (line.event, line.subject) in told:
            continue
        told.add((line.event, line.subject))
        is_over = (line.event, line.subject) in over or books.journal.clock() - line.at > _NOW_S
        title, what_to_do, link = _WORDS[line.event]
        yield Alert(
            severity="lately" if is_over else "now",
            kind=line.event.replace("_", " "),
            title=title.format(subject=line.subject or ""),
            said=_cut(str(line.detail.get("reason") or line.detail.get("error") or "")),
            at=line.at,
            what_to_do="It is over: nothing." if is_over else what_to_do,
            link=link,
        )
    production = books.registry.production()
    for line in newest(books, of=["drifted", "guard_broken", "judged_bad"], since=since, limit=20):
        yield Alert(
            severity="now" if production is not None and line.subject == production.name else "lately",
            kind=line.event.replace("_", " "),
            title=_FOUND[line.event].format(subject=line.subject),
            said=_cut(str(line.detail.get("said", ""))),
            at=line.at,
            what_to_do="The evaluation actor weighs it; aifactory retrain asks for a retrain in any case.",
            link="drift",
        )


_WORDS = {
    "load_failed": (
        "A replica could not load {subject}",
        "It tries again by itself, and serves the release before until then; mend what the reason names.",
        "traffic",
    ),
    "tick_failed": (
        "The evaluation actor can't look",
        "It tries again with every tick; mend what the error names.",
        "drift",
    ),
    "unscored": (
        "Answers of {subject} can't be scored",
        "It is tried again; until then nothing is decided by them.",
        "drift",
    ),
    "adapter_refused": (
        "An adapter is not served with {subject}",
        "Train it from the release in production, or take it out of runtime.endpoint.adapters.",
        "releases",
    ),
}
_FOUND = {
    "drifted": "Users ask something else of {subject} than they did",
    "guard_broken": "Answers of {subject} hold what they may not",
    "judged_bad": "The judge finds too many answers of {subject} bad",
}


def _budget(books: Books) -> Iterator[Alert]:
    empty = [each for each in allowances(books) if each.is_empty]
    last = next(iter(newest(books, of=["decided"], limit=1)), None)
    waits = last is not None and last.detail.get("awaited") == "budget"
    if not empty and not waits:
        return
    said = [f"{each.of}: {each.used:,.3g} of {each.limit:,.3g} {each.unit}".strip() for each in empty]
    yield Alert(
        severity="now",
        kind="empty budget",
        title="The budget of retrains is used up" if empty else "A retrain waits for the budget",
        said=_cut("; ".join(said or (last.detail["reasons"] if last is not None else ()))),
        at=last.at if waits and last is not None else books.journal.clock(),
        what_to_do="Wait for the window of improve.budget to move on, or raise its limits.",
        link="energy",
    )


def _key_budgets(books: Books) -> Iterator[Alert]:
    """Keys and teams whose budget is used up: they are answered 402."""
    limited = {subject: limits for subject, limits in books.keys.limits_of().items() if limits.has_budget}
    spent = {window: books.allowances.spent(window) for window in {limits.budget_window for limits in limited.values()}}
    for subject, limits in limited.items():
        used = spent[limits.budget_window].get(subject)
        empty = [
            f"{name}: {getattr(used, name):,.6g} of {limit:,.6g}"
            for name in ("tokens", "money", "joules")
            if (limit := getattr(limits, f"budget_{name}")) is not None and used and getattr(used, name) >= limit
        ]
        if empty:
            yield Alert(
                severity="now",
                kind="empty budget",
                title=f"The budget of {subject} is used up",
                said=f"{'; '.join(empty)} ({limits.budget_window})",
                at=books.journal.clock(),
                what_to_do="Its requests are answered 402 until the window ends; aifactory keys limit gives it more.",
                link="energy",
            )


def _runs(runs: Sequence[Run]) -> Iterator[Alert]:
    for run in runs:
        if run.state == "silent":
            yield Alert(
                severity="now",
                kind="silent run",
                title=f"The run of {run.model} says nothing",
                said=f"step {run.step:,} of {run.steps:,} was its last",
                at=run.at or 0.0,
                what_to_do="If its process is gone, the same command goes on from the last checkpoint.",
                link="training",
            )
        for warning in run.warnings:
            yield Alert(
                severity="lately",
                kind="training",
                title=f"The run of {run.model} warns",
                said=_cut(warning),
                at=run.at or 0.0,
                what_to_do="The run goes on; read the warning.",
                link="training",
            )


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
