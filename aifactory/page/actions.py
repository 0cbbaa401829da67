"""Actions on releases: what is asked for in a form, what it would do in words, and doing it.

Each is one transaction of the registry, which writes the journal and the audit with it, under the key of whoever asked. What was
looked at when it was decided (`expected`) must still hold, or nothing is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from aifactory.errors import StateError
from aifactory.observe.events import log_event
from aifactory.records.books import Books
from aifactory.records.journal import Journal
from aifactory.records.registry import Registry, Release
from aifactory.records.trials import ShareOf, Trial

Deed = Literal["promote", "rollback", "canary", "shadow", "withdraw"]
DEEDS: tuple[Deed, ...] = get_args(Deed)
_LONGEST_REASON = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What somebody wants done."""

    deed: Deed
    release: int
    reason: str = ""
    share: float | None = None
    """Of a canary or a shadow, from 0 to 1."""
    by: ShareOf | None = None
    quarantine: bool = False
    """Of a rollback or a withdrawal: what is taken back is neither tried nor served again."""
    expected: str = ""
    """What held when it was decided (see `standing_of`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What would be done, for whoever is to confirm it."""

    asked: Asked
    title: str
    effects: Sequence[str]
    button: str
    takes_share: bool
    offers_quarantine: str
    """What can be put into quarantine with it, in words; empty: nothing."""
    standing: str


def read_asked(form: Mapping[str, str]) -> Asked:
    """What a form, or a link, asks for.

    Raises   StateError for what is none.
    """
    deed = next((each for each in DEEDS if each == form.get("do")), None)
    number = form.get("release", "")
    if deed is None or not number.isascii() or not number.isdecimal() or len(number) > 9:
        raise StateError(
            f"expected one of {', '.join(DEEDS)} and the number of a release, found {form.get('do')!r} and {number!r}."
        )
    by = form.get("by")
    return Asked(
        deed=deed,
        release=int(number),
        reason=form.get("reason", "").strip()[:_LONGEST_REASON],
        share=_share(form["percent"]) if "percent" in form else None,
        by="key" if by == "key" else "request" if by == "request" else None,
        quarantine=form.get("quarantine") == "yes",
        expected=form.get("expected", ""),
    )


def standing_of(books: Books) -> str:
    """What serves and what is tried, in a form that can be compared."""
    standing = books.registry.standing()
    production = 0 if standing.production is None else standing.production.number
    return f"{production}.{0 if standing.trial is None else standing.trial.number}"


def propose(books: Books, asked: Asked) -> Proposal:
    """What would be done now.

    Raises   StateError where it can't be done as things stand.
    """
    standing = books.registry.standing()
    release, production, trial = books.registry.release(asked.release), standing.production, standing.trial
    if release is None or production is None:
        raise StateError(f"expected a release with the number {asked.release}, and one in production, found none.")
    title, effects, button = _words(books, asked.deed, release, production, trial)
    offers = {"rollback": f"{production.name}, which it replaces", "withdraw": release.name}.get(asked.deed, "")
    return Proposal(
        asked=asked,
        title=title,
        effects=effects,
        button=button,
        takes_share=asked.deed in ("canary", "shadow"),
        offers_quarantine=offers,
        standing=standing_of(books),
    )


def carry_out(books: Books, asked: Asked, *, key_id: str) -> str:
    """Do it, as the holder of this key; what was done, in words.

    Raises   StateError where it can't be done, or where something else holds than when it was decided.
    """
    if not asked.reason:
        raise StateError("expected a reason, which the audit keeps, found none; write one.")
    production, trial = _expected(books, asked.expected)
    registry = Registry(Journal(books.database, books.config.name, clock=books.journal.clock, key_id=key_id))
    reason = {"reason": asked.reason}
    match asked.deed:
        case "promote":
            _require_tried(books, asked.release)
            name = registry.promote_trial(reason=reason, of=trial).name
            said = f"{name} is in production."
        case "rollback":
            release = registry.rollback(
                to=asked.release, reason=asked.reason, quarantine=asked.quarantine, of=production
            )
            name, said = release.name, f"{release.name} serves again."
        case "withdraw":
            _require_tried(books, asked.release)
            name = registry.withdraw(reason=reason, quarantine=asked.quarantine, of=trial).name
            said = f"{name} is withdrawn; production answers all again."
        case _:
            if asked.share is None:
                raise StateError("expected a share in percent, found none; write one.")
            begun = registry.try_out(
                asked.release,
                asked.deed,
                share=asked.share,
                by=asked.by if asked.deed == "canary" else None,
                reason=reason,
                of=trial or None,
            )
            name, said = begun.name, f"{begun.name} is on trial: {begun.kind}, {begun.share:.1%} of the {begun.by}s."
    log_event("acted", deed=asked.deed, release=name, reason=asked.reason, key=key_id)
    return said


def _expected(books: Books, expected: str) -> tuple[int, int]:
    """Production and the entry of the trial, as they were when it was decided."""
    if expected != standing_of(books):
        raise StateError(
            "expected what serves and what is on trial to be what you saw, found that it has changed since; look at it and "
            "decide again."
        )
    production, _, trial = expected.partition(".")
    return int(production), int(trial)


def _require_tried(books: Books, release: int) -> None:
    trial = books.registry.trial()
    if trial is None or trial.release != release:
        raise StateError(f"expected release {release} on trial, found {'none' if trial is None else trial.name}.")


def _words(
    books: Books, deed: Deed, release: Release, production: Release, trial: Trial | None
) -> tuple[str, list[str], str]:
    if deed in ("promote", "withdraw"):
        _require_tried(books, release.number)
    if deed in ("canary", "shadow") and trial is not None and trial.release != release.number:
        raise StateError(f"expected no other release on trial, found {trial.name}; withdraw it or promote it first.")
    follow = "Replicas take it up by themselves; a request that has begun ends on the release that it began on."
    ends = [] if trial is None or trial.release == release.number else [f"The trial of {trial.name} ends."]
    match deed:
        case "promote":
            return (
                f"Put {release.name} into production",
                [
                    f"{release.name} answers all requests in place of {production.name}.",
                    "Its trial ends, and so does its cycle.",
                    follow,
                ],
                "Promote",
            )
        case "rollback":
            return (
                f"Serve {release.name} again",
                [f"{release.name} answers all requests in place of {production.name}.", *ends, follow],
                "Roll back",
            )
        case "withdraw":
            return (
                f"Withdraw {release.name} from its trial",
                [f"{production.name} answers all requests again.", "The cycle that made it ends as rejected.", follow],
                "Withdraw",
            )
        case "canary":
            return (
                f"Have {release.name} answer a share of the requests",
                [
                    f"It answers them in place of {production.name}, and people see its answers.",
                    "While the share rises, whoever had it keeps it.",
                ],
                "Set the canary’s share",
            )
        case _:
            return (
                f"Have {release.name} answer a share of the requests in the shadow",
                ["It answers copies of them; nobody sees what it says.", f"{production.name} answers as before."],
                "Set the shadow’s share",
            )


def _share(percent: str) -> float:
    try:
        value = float(percent)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise StateError(f"expected a share from 0 to 100 percent, found {percent[:20]!r}.")
    return value / 100
