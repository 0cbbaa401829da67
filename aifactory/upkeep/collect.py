"""`aifactory gc`: what no release, cycle or proof needs is deleted.

    models, token sets   of candidates that were rejected, not chosen, or whose cycle failed
    checkpoints          of training runs whose model is there
    unfinished           folders of artifacts without a record, which were being made when their maker was killed
    uploads              files of the batch API that the books do not know
    caches               only if asked for: parts, by which the next ingestion makes anew only what has changed

While a cycle runs nothing of all that is deleted: it looks for what is there, and takes it. Each thing is taken from its place in a
transaction in which no cycle can begin, and deleted after it; so whoever looks finds all of it or none, and a kill leaves it out
of the way, where the next `gc` deletes it.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import sqlalchemy as sa

from aifactory.errors import StateError
from aifactory.observe.events import log_event
from aifactory.records.artifacts import Model
from aifactory.records.books import Books
from aifactory.records.tables import batch_jobs, cycles, files
from aifactory.upkeep.needs import NOUNS, needed

COLLECTED = "collected"
"""Event: the artifact `subject` was deleted since nothing needs it; the detail says why."""
TRASH = "trash"
SETTLED_S = 3600.0
"""What was written less than so long ago may still be on its way into the books."""
Kind = Literal["model", "tokens", "corpus", "scorecard", "unfinished", "checkpoint", "upload", "part"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unneeded:
    """Something that nobody needs."""

    what: str
    """The id of an artifact, or a path below the storage root."""
    kind: Kind
    reason: str
    num_bytes: int
    """What is free without it: a file that has a second name elsewhere counts nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What was deleted, or would be."""

    dry_run: bool
    things: Sequence[Unneeded]
    kept: Mapping[str, int]
    """By reason how many artifacts are needed."""
    caches: Unneeded | None
    """What would be free besides if caches were deleted too."""
    waits_for: Sequence[str]
    """Cycles that run, and erasures that have not ended: until then nothing is deleted."""

    @property
    def num_bytes(self) -> int:
        """Of all of them."""
        return sum(thing.num_bytes for thing in self.things)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"num_bytes": self.num_bytes}

    def lines(self) -> list[str]:
        """The report as text."""
        if self.waits_for:
            return [
                f"Nothing is deleted while {', '.join(self.waits_for)} may need it. Of a cycle that nobody will ever turn again: "
                "aifactory gc CONFIG --give-up TRIGGER."
            ]
        done = "would be deleted" if self.dry_run else "deleted"
        lines = [f"{thing.num_bytes:>15,} bytes  {thing.what}: {thing.reason}" for thing in self.things]
        lines.append(f"{self.num_bytes:>15,} bytes  {len(self.things)} things, {done}")
        lines += [f"{count:>15,} kept   {reason}" for reason, count in sorted(self.kept.items())]
        if self.caches is not None:
            lines.append(f"{self.caches.num_bytes:>15,} bytes  {self.caches.what}: {self.caches.reason}")
        return lines


def collect(books: Books, *, dry_run: bool = False, caches: bool = False, give_up: str | None = None) -> Collected:
    """Delete what nobody needs.

    caches    delete parts too
    give_up   the trigger of a running cycle that nobody will ever turn again: it ends as failed, whoever still turns it is
              fenced off
    Raises    StateError for a cycle that does not run; StorageError.
    """
    if give_up is not None:
        _give_up(books, give_up, dry_run=dry_run)
    before = _state(books)
    waits = [each for each in _waits_for(books) if each != f"the cycle {give_up}"]
    things = [] if waits else list(_unneeded(books))
    parts = None if waits else _parts(books)
    if caches and parts is not None:
        things.append(parts)
        parts = None
    if not dry_run and not waits:
        _empty_trash(books)
        for thing in things:
            _delete(books, thing, before)
    why = needed(books)
    kept: dict[str, int] = {}
    for reason in why.values():
        kept[reason] = kept.get(reason, 0) + 1
    return Collected(dry_run=dry_run, things=things, kept=kept, caches=parts, waits_for=waits)


# ── what nobody needs ─────────────────────────────────────────────────────────────────────────────────────────────────


def _unneeded(books: Books) -> Iterator[Unneeded]:
    why = needed(books)
    storage, artifacts = books.storage, books.artifacts
    for noun in NOUNS:
        for name in storage.names(noun.kind):
            artifact_id = f"{noun.kind}/{name}"
            if artifacts.find(noun, name) is not None:
                if artifact_id not in why:
                    reason = "no release has it, and no cycle that runs"
                    yield _thing(books, artifact_id, noun.kind, reason)  # type: ignore[arg-type]
            elif artifacts.erased(artifact_id) is None and _is_settled(books, noun.kind, name):
                yield _thing(books, artifact_id, "unfinished", "its record was never written: its maker was killed")
    for run in storage.names("runs"):
        made = artifacts.find(Model, run.removeprefix("train-")) if run.startswith("train-") else None
        for step in storage.names("runs", run) if made is not None else ():
            if step.startswith("step-"):
                yield _thing(books, f"runs/{run}/{step}", "checkpoint", f"its run has ended with {made and made.id}")
    known = _known_files(books)
    for name in storage.names("files"):
        if name not in known and _is_settled(books, "files", name):
            yield _thing(books, f"files/{name}", "upload", "the books know no such file of the batch API")


def _is_settled(books: Books, *parts: str) -> bool:
    """Whether nobody can be writing it any more: files of uploads and batches are written before the books say so."""
    written_at = books.storage.written_at(*parts)
    return written_at is None or books.journal.clock() - written_at > SETTLED_S


def _thing(books: Books, what: str, kind: Kind, reason: str) -> Unneeded:
    return Unneeded(what=what, kind=kind, reason=reason, num_bytes=books.storage.freed(*what.split("/")))


def _parts(books: Books) -> Unneeded | None:
    if not books.storage.names("parts"):
        return None
    reason = "by them the next ingestion makes anew only what has changed; --caches deletes them"
    return _thing(books, "parts", "part", reason)


def _known_files(books: Books) -> set[str]:
    factory = books.config.name
    with books.database.read() as connection:
        found = set(connection.scalars(sa.select(files.c.id).where(files.c.factory == factory)))
        jobs = sa.select(batch_jobs.c.input_file, batch_jobs.c.output_file, batch_jobs.c.error_file)
        for row in connection.execute(jobs.where(batch_jobs.c.factory == factory)):
            found |= {each for each in row if each is not None}
    return found


# ── deleted ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _waits_for(books: Books) -> list[str]:
    running = [f"the cycle {cycle.trigger}" for cycle in books.journal.cycles() if cycle.state == "running"]
    return running + [f"the erasure {each.id}" for each in books.erasures.all() if each.state != "ended"]


def _state(books: Books) -> tuple[Any, ...]:
    """What changes whenever a cycle begins, goes on or ends."""
    return tuple((cycle.trigger, cycle.attempt, cycle.state) for cycle in books.journal.cycles())


def _delete(books: Books, thing: Unneeded, before: tuple[Any, ...]) -> None:
    place = thing.what.split("/")
    aside = (TRASH, f"{'-'.join(place)}-{secrets.token_hex(4)}")
    is_artifact = thing.kind in {noun.kind for noun in NOUNS}
    with books.database.write(serialize=True) as connection:
        # Cycles begin in transactions of the same kind: none begins until this one has ended.
        query = sa.select(cycles).where(cycles.c.factory == books.config.name).order_by(cycles.c.number)
        found = tuple((row["trigger"], row["attempt"], row["state"]) for row in connection.execute(query).mappings())
        if found != before:
            raise StateError(
                "expected no cycle to begin or end while things are deleted, found that one did; what was deleted was not "
                "needed before, the rest is as it was. Run the same command again."
            )
        if thing.kind == "upload":
            books.storage.delete_file(*place)
        else:
            books.storage.put_away(aside, *place)
        if is_artifact:
            _note(books, connection, thing.what, thing.reason)
    books.storage.delete(*aside)
    log_event(COLLECTED, what=thing.what, bytes=thing.num_bytes)


def _note(books: Books, connection: sa.Connection, artifact_id: str, reason: str) -> None:
    books.journal.write_within(connection, COLLECTED, subject=artifact_id, detail={"reason": reason})


def _empty_trash(books: Books) -> None:
    """What a `gc` that was killed had taken away; where it was killed before it could say so, that is said now."""
    told = {event.subject for event in books.journal.events(event=COLLECTED)}
    kinds = {noun.kind for noun in NOUNS}
    for name in books.storage.names(TRASH):
        kind, _, rest = name.partition("-")
        artifact_id = f"{kind}/{rest.partition('-')[0]}"
        # An unfinished folder has no record, and is no artifact.
        is_artifact = kind in kinds and books.storage.size(TRASH, name, "record.json") is not None
        if is_artifact and artifact_id not in told:
            with books.database.write() as connection:
                _note(books, connection, artifact_id, "taken away by a gc that was killed")
        books.storage.delete(TRASH, name)


def _give_up(books: Books, trigger: str, *, dry_run: bool) -> None:
    cycle = books.journal.cycle(trigger)
    if cycle is None or cycle.state != "running":
        found = "none of that name" if cycle is None else f"one that is {cycle.state}"
        raise StateError(
            f"expected a running cycle for --give-up, found {found}: {trigger}; `aifactory status` names them."
        )
    if dry_run:
        return
    decision = {"decision": "fail", "reasons": ["given up by gc"]}
    cycle = books.journal.claim(cycle)
    with books.database.write(serialize=True) as connection:
        books.journal.close_cycle(connection, cycle, "failed", decision=decision)
        books.journal.audit_within(connection, "give_up", subject=trigger, detail={"attempt": cycle.attempt})
    log_event("failed", cycle=cycle.number, reasons="given up by gc")
