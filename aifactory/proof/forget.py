"""`aifactory forget`: rows that somebody asked to forget are erased from everything that holds them, with all that learnt from them.

    erasing      every place loses the rows (see `erasing`); the production release goes on serving
    retraining   a cycle trains on what is left, from the newest release that had not seen them, or from the base; the gate judges it
    then         the successor serves, the releases that saw them are withdrawn, their models deleted; the database is
                 written anew; every place is looked through once more; the proof is written

Killed anywhere, the same command goes on: its state is in the books (`erasures`), under a keyed hash of what was asked for.
Rows of the same person that arrive while it runs, or later, are new rows: the look at the end says how many came meanwhile,
and the same command run again erases them. Sources outside the factory are named, not touched; a tombstone keeps what was
erased from coming back out of them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from aifactory.evaluate.gate import Reject
from aifactory.observe.events import log_event
from aifactory.proof.erasing import Eraser, Found, go_through, models_that_saw
from aifactory.proof.where import Where, parse_where
from aifactory.records.artifacts import Corpus, Model, Scorecard
from aifactory.records.books import Books
from aifactory.records.erasures import Erasure
from aifactory.records.identity import canonical_json, fingerprint, hash_text
from aifactory.records.journal import Bound, Cycle
from aifactory.records.registry import Release
from aifactory.records.tables import lineage
from aifactory.upkeep.backup import BACKED_UP

PROOFS = "proofs"
VERSION = 1
_MOST_PASSES = 5
_RECIPE = ("evaluate", "promote", "train", "improve", "tokenize", "ingest", "model")
Turn = Callable[[Cycle], Release | Reject]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """What was erased, or would be."""

    proof: str | None
    """Where the proof lies; None of a dry run, and where it has not come to its end."""
    erasure: str | None
    dry_run: bool
    places: Mapping[str, int]
    """Rows by place."""
    releases: Sequence[str]
    """Releases whose models saw them, in training or through a tokenizer that was trained on them."""
    models: Sequence[str]
    """Their models, and models that never became a release."""
    tokenizers: Sequence[str]
    """Token sets with which a tokenizer was trained on them."""
    starts_from: str | None
    """The release from which the successor is, or would be, trained; `base`; None where none is needed."""
    successor: str | None
    """The release that serves in the place of those."""
    reasons: Sequence[str]
    """What the gate found in the successor."""
    outside: Sequence[str]
    """What is outside the factory, and is not touched."""
    left: Sequence[str] = field(default=())
    """What could not be done yet, and why; the same command does the rest."""

    @property
    def holds(self) -> bool:
        """Whether nothing is left to do."""
        return not self.left

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"holds": self.holds}

    def lines(self) -> list[str]:
        """The report as text."""
        if not self.places and not self.releases and self.proof is None and not self.left:
            before = "" if self.erasure is None else f" What was there before fell to {self.erasure}."
            return [f"No row is meant by that; nothing was erased.{before}"]
        would = "would be erased" if self.dry_run else "erased"
        lines = [f"{count:>9,}  {place}, {would}" for place, count in self.places.items()]
        if self.releases:
            lines.append(
                f"Saw them:   {', '.join(self.releases)}" + ("" if self.dry_run else "; withdrawn, models deleted")
            )
        lines += [f"Tokenizer:  that of {tokens} was trained on them" for tokens in self.tokenizers]
        if self.starts_from is not None:
            lines.append(f"Retrain{' would start' if self.dry_run else 'ed'} from {self.starts_from}.")
        if self.successor is not None:
            lines.append(f"Successor:  {self.successor}")
        lines += [f"  {reason}" for reason in self.reasons]
        lines += [f"Not touched: {each}" for each in self.outside]
        lines += [f"Left to do: {each}" for each in self.left]
        if self.proof is not None:
            lines.append(f"Proof:      {self.proof}")
        return lines


def forget_rows(books: Books, where: str, *, turn: Turn, dry_run: bool = False) -> Forgotten:
    """Erase the rows that `where` means, and all that was learnt from them.

    turn     turns a cycle to a release or to the reasons why there is none
    Raises   ConfigError for what `where` must not say; StateError, StorageError.
    """
    meant = parse_where(where)
    open_one = books.erasures.open(str(meant))
    if open_one is None or dry_run:
        found = go_through(Eraser(books, meant, None))
        if dry_run or not found.num_things:
            return _would(books, found, open_one or books.erasures.last(str(meant)))
    return _Forgetting(books, meant, turn).to_the_end()


def _would(books: Books, found: Found, begun: Erasure | None) -> Forgotten:
    """What would happen."""
    saw = [model.id for model in models_that_saw(books, found)]
    releases = [each for each in books.registry.releases() if each.model in saw and each.withdrawn is None]
    production = books.registry.production()
    starts_from = None
    if production is not None and production.model in saw:
        clean = newest_clean(books, saw)
        starts_from = "base" if clean is None else clean.name
    return Forgotten(
        proof=None,
        erasure=None if begun is None else begun.id,
        dry_run=True,
        places={place: sum(things.values()) for place, things in sorted(found.places.items())},
        releases=[each.name for each in releases],
        models=saw,
        tokenizers=sorted(found.tokenizers.values()),
        starts_from=starts_from,
        successor=None,
        reasons=(),
        outside=_outside(books, found.sources, found.silent),
        left=found.waits,
    )


def newest_clean(books: Books, saw: Sequence[str]) -> Release | None:
    """The newest release that may be served and whose model is none of these."""
    unfit = set(books.registry.quarantined())
    trial = books.registry.trial()
    unfit |= set() if trial is None else {trial.release}
    for release in reversed(books.registry.releases()):
        if release.withdrawn is None and release.model not in saw and release.number not in unfit:
            return release
    return None


class _Forgetting:
    """One erasure, from where it stands to its end."""

    def __init__(self, books: Books, where: Where, turn: Turn) -> None:
        self.books = books
        self._where = where
        self._turn = turn
        self.erasure = books.erasures.begin(str(where))
        self._left: list[str] = []

    def to_the_end(self) -> Forgotten:
        log_event("forgetting", erasure=self.erasure.id)
        found = self._erase()
        saw = models_that_saw(self.books, found)
        self._note_saw(saw, found)
        self._end_cycles({model.id for model in saw})
        outcome = self._follow(saw)
        if outcome:
            self._left += outcome
        else:
            self._withdraw(saw)
        self._left += found.waits
        out_of_reach = self.books.database.shred()
        if self.books.database.is_sqlite:
            self._left += out_of_reach
            out_of_reach = []
        return self._finished([*out_of_reach, *_outside(self.books, self._sources(found), found.silent)])

    # ── erased ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _erase(self) -> Found:
        """All places, again until nothing is found any more: traffic goes on meanwhile."""
        whole = Found()
        for number in range(_MOST_PASSES):
            found = go_through(Eraser(self.books, self._where, self._fresh()))
            whole.tokens |= found.tokens
            whole.tokenizers.update(found.tokenizers)
            whole.sources |= found.sources
            whole.silent = found.silent
            whole.waits = found.waits
            if not found.num_things:
                break
            log_event("erased", erasure=self.erasure.id, found=found.num_things, **{"pass": number + 1})
        else:
            whole.waits.append("rows of these conditions arrive faster than they are erased")
        if whole.sources:
            with self.books.database.write(serialize=True) as connection:
                for source in sorted(whole.sources):
                    self.books.erasures.note(connection, self.erasure.id, "sources", source, value=1)
        return whole

    def _fresh(self) -> Erasure:
        found = self.books.erasures.get(self.erasure.id)
        assert found is not None
        self.erasure = found
        return found

    def _sources(self, found: Found) -> set[str]:
        return found.sources | set(self._fresh().found.get("sources", {}))

    def _note_saw(self, saw: Sequence[Model], found: Found) -> None:
        """Name the releases before they are withdrawn, for then nobody could tell any more."""
        ids = {model.id: model for model in saw}
        releases = [each for each in self.books.registry.releases() if each.model in ids]
        with self.books.database.write(serialize=True) as connection:
            note = self.books.erasures.note
            for model in saw:
                note(connection, self.erasure.id, "models", model.id, value={"digest": model.digest})
            for release in releases:
                told = {"model": release.model, "digest": ids[release.model].digest, "number": release.number}
                note(connection, self.erasure.id, "releases", release.name, value=told)

    def _end_cycles(self, saw: set[str]) -> None:
        """Cycles that are bound to what is gone, or train from what will be, can't go on."""
        gone = {*self.books.journal.erased(), *saw}
        for cycle in self.books.journal.cycles():
            bound = {*cycle.bound.batches, *cycle.bound.holdouts, *cycle.bound.corpora, cycle.bound.parent or ""}
            if cycle.state != "running" or not bound & gone:
                continue
            reasons = [f"what it was bound to was erased by {self.erasure.id}"]
            with self.books.database.write(serialize=True) as connection:
                decision = {"decision": "fail", "reasons": reasons}
                current = next(c for c in self.books.journal.cycles() if c.trigger == cycle.trigger)
                if current.state == "running":
                    self.books.journal.close_cycle(connection, current, "failed", decision=decision)
            log_event("failed", cycle=cycle.number, reasons=reasons[0])

    # ── followed ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _follow(self, saw: Sequence[Model]) -> list[str]:
        """See to it that no release which saw the rows is in production; why one still is, or nothing."""
        ids = [model.id for model in saw]
        trial = self.books.registry.trial()
        tried = None if trial is None else self.books.registry.release(trial.release)
        if tried is not None and tried.model in ids:
            self.books.registry.withdraw(
                reason={"reason": f"{self.erasure.id}: it had learnt from rows that were erased"}
            )
        production = self.books.registry.production()
        if production is None or production.model not in ids:
            return []
        clean = newest_clean(self.books, ids)
        corpora = self._corpora_left(production)
        with self.books.database.write(serialize=True) as connection:
            start = "base" if clean is None else clean.name
            self.books.erasures.note(connection, self.erasure.id, "starts_from", value=start)
            self.books.erasures.move(connection, self.erasure.id, "retraining")
        if clean is not None and set(corpora) <= set(self._corpora_left(clean)):
            return self._fall_back(clean, [f"{clean.name} has learnt all that is left already"])
        if not corpora:
            return [
                f"{production.name} still serves: no rows are left on which another could be trained. Add data, run a cycle, "
                "and run the same command again"
            ]
        outcome = self._turn(self._cycle(production, clean, corpora))
        if isinstance(outcome, Release):
            self._note_successor(outcome, list(self._decision(outcome.trigger)))
            return []
        if clean is not None:
            return self._fall_back(clean, [f"the successor was refused, {clean.name} serves again", *outcome.reasons])
        return [
            f"{production.name} still serves: its successor was refused ({'; '.join(outcome.reasons)}), and no release had not seen "
            "the rows. Change the recipe or add data, and run the same command again"
        ]

    def _cycle(self, production: Release, clean: Release | None, corpora: Sequence[str]) -> Cycle:
        """The cycle that trains on what is left; the same each time that it is asked for."""
        books = self.books
        recipe = books.config.recipe(*_RECIPE)
        parent = None if clean is None else clean.model
        inputs = [self.erasure.id, production.model, parent or "base", *corpora]
        identity = fingerprint(stage="forget", code_version=1, recipe=recipe, inputs=inputs)
        batches = [
            each
            for corpus in corpora
            for each in books.artifacts.get(Corpus, corpus).record.inputs
            if each.startswith("batch/")
        ]
        bound = Bound(
            kind="forget",
            sources_digest="",
            batches=batches,
            parent=parent,
            champion=None if clean is None else clean.number,
            corpora=corpora,
            replaces=production.number,
        )
        cycle = books.journal.open_cycle(f"forget-{identity[:16]}", recipe=recipe, bound=bound)
        log_event(
            "triggered", cycle=cycle.number, trigger=cycle.trigger, because=f"{self.erasure.id} erased what trained"
        )
        return cycle

    def _corpora_left(self, release: Release) -> list[str]:
        """What is left of the corpora that a release was trained on, in their order, where rows that train are among it."""
        books = self.books
        model = books.artifacts.get(Model, release.model)
        found: list[str] = []
        for tokens in (each for each in model.record.inputs if each.startswith("tokens/")):
            found += [each for each in _parents(books, tokens) if each.startswith("corpus/")]
        left = [books.artifacts.get(Corpus, each) for each in books.journal.left_of(found)]
        return [corpus.id for corpus in left if corpus.rows_kept > corpus.rows_holdout]

    def _fall_back(self, clean: Release, reasons: Sequence[str]) -> list[str]:
        current = self.books.registry.production()
        if current is None or current.number != clean.number:
            self.books.registry.rollback(to=clean.number, reason=f"{self.erasure.id}: {reasons[0]}")
        self._note_successor(clean, reasons)
        return []

    def _decision(self, trigger: str) -> Sequence[str]:
        cycle = self.books.journal.cycle(trigger)
        return [] if cycle is None or cycle.decision is None else list(cycle.decision["reasons"])

    def _note_successor(self, release: Release, reasons: Sequence[str]) -> None:
        told = {"release": release.name, "model": release.model, "reasons": list(reasons)}
        told["digest"] = self.books.artifacts.get(Model, release.model).digest
        with self.books.database.write(serialize=True) as connection:
            self.books.erasures.note(connection, self.erasure.id, "successor", value=told)

    # ── withdrawn ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _withdraw(self, saw: Sequence[Model]) -> None:
        """Withdraw the releases, then delete their models and what was said of those; models of no release, too."""
        books = self.books
        noted = self._fresh().found
        self._note_late_successor()
        numbers = [told["number"] for told in noted.get("releases", {}).values()]
        for release in books.registry.retire(numbers, erasure=self.erasure.id):
            log_event("withdrawn", release=release.name, erasure=self.erasure.id)
        eraser = Eraser(books, self._where, self.erasure)
        gone = {model.id for model in saw}
        for name in books.storage.names(Scorecard.kind):
            card = books.artifacts.find(Scorecard, name)
            # The first of its inputs that is a model is the one that it judges.
            judged = [] if card is None else [each for each in card.record.inputs if each.startswith("model/")]
            if card is not None and judged and judged[0] in gone:
                eraser.replace(card, None, {})
        for model in reversed(saw):
            run = ("runs", f"train-{model.fingerprint[:16]}")
            books.storage.delete(*run)
            eraser.replace(model, None, {})

    def _note_late_successor(self) -> None:
        """Killed between the promotion and its note: the cycle tells of it."""
        if "successor" in self._fresh().found or "starts_from" not in self.erasure.found:
            return
        production = self.books.registry.production()
        if production is not None:
            self._note_successor(production, self._decision(production.trigger))

    # ── proven ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _finished(self, outside: Sequence[str]) -> Forgotten:
        """Look once more; where nothing is left to do, write the proof and end."""
        books = self.books
        last = Eraser(books, self._where, None)
        last.search_for(self.erasure.id)
        late = go_through(last)
        rows = {place: sum(things.values()) for place, things in late.places.items()}
        self._left += [f"{count:,} in {place} came meanwhile" for place, count in rows.items() if count]
        found = self._fresh().found
        uri = None
        if not self._left:
            uri = self._prove(found, outside)
        successor = found.get("successor") or {}
        return Forgotten(
            proof=uri,
            erasure=self.erasure.id,
            dry_run=False,
            places=_summed(found.get("places", {})),
            releases=sorted(found.get("releases", {})),
            models=sorted(found.get("models", {})),
            tokenizers=sorted(set(found.get("tokenizers", {}).values())),
            starts_from=found.get("starts_from"),
            successor=successor.get("release"),
            reasons=successor.get("reasons", []),
            outside=outside,
            left=list(dict.fromkeys(self._left)),
        )

    def _prove(self, found: Mapping[str, Any], outside: Sequence[str]) -> str:
        """Write the proof, then end the erasure with its digest in the audit, in one transaction."""
        books, erasure = self.books, self.erasure
        ended_at = books.journal.clock()
        document = proof_document(books, erasure, found, outside, ended_at)
        digest = hash_text(canonical_json(document))
        name = f"{erasure.id}.json"
        text = json.dumps({**document, "digest": digest}, indent=1, sort_keys=True) + "\n"
        books.storage.write_bytes(text.encode(), PROOFS, name)
        with books.database.write(serialize=True) as connection:
            books.erasures.move(connection, erasure.id, "ended", ended_at=ended_at)
            detail = {"digest": digest, "places": _summed(found.get("places", {}))}
            books.journal.write_within(connection, "forgotten", subject=erasure.id, detail=detail)
            books.journal.audit_within(connection, "forgotten", subject=erasure.id, detail=detail)
        log_event("forgotten", erasure=erasure.id)
        return books.storage.path(PROOFS, name)


def proof_document(
    books: Books, erasure: Erasure, found: Mapping[str, Any], outside: Sequence[str], ended_at: float
) -> dict[str, Any]:
    """The proof without its own digest; it names nobody and quotes nothing."""
    keyed = books.erasures.keyed()
    assert keyed is not None
    return {
        "proof": "aifactory forget",
        "version": VERSION,
        "id": erasure.id,
        "factory": books.config.name,
        "begun_at": _when(erasure.begun_at),
        "ended_at": _when(ended_at),
        "where": {"hash": erasure.where_hash},
        "key": {
            "algorithm": "HMAC-SHA256 over 'row:ID', 'key:KEY', 'completion:ID' and 'where:CONDITIONS'",
            "id": keyed.id,
            "held": (
                "in the factory's state database (table erasure_keys) and nowhere else. Who has it can test whether an id was "
                "erased; nobody can tell an id or a text from these hashes. Where it is destroyed, they say nothing any more, and "
                "what was erased can come back from sources outside"
            ),
        },
        "places": _summed(found.get("places", {})),
        "rows": sorted(books.erasures.buried("row", erasure=erasure.id)),
        "keys": sorted(books.erasures.buried("key", erasure=erasure.id)),
        "completions": sorted(books.erasures.buried("completion", erasure=erasure.id)),
        "artifacts": found.get("artifacts", {}),
        "releases": found.get("releases", {}),
        "models": found.get("models", {}),
        "tokenizers": found.get("tokenizers", {}),
        "starts_from": found.get("starts_from"),
        "successor": found.get("successor"),
        "not_touched": list(outside),
    }


def _parents(books: Books, artifact_id: str) -> list[str]:
    """What the books say that an artifact was made from."""
    with books.database.read() as connection:
        query = sa.select(lineage.c.parent).where(
            lineage.c.factory == books.config.name, lineage.c.child == artifact_id
        )
        return sorted(connection.scalars(query))


def _outside(books: Books, sources: set[str], silent: set[str]) -> list[str]:
    """What is not the factory's, or does not say whose it is, and may hold the rows still."""
    named = [
        f"the ledger of {corpus}, which an older version wrote without user and label: its rows are found by id and key alone"
        for corpus in sorted(silent)
    ]
    for source in books.config.ingest.sources:
        if source.name in sources:
            place = getattr(source, "path", None) or getattr(source, "table", None) or source.kind
            named.append(
                f"the source {source.name} ({source.kind}: {place}): its owner erases them there; they do not come back"
            )
    if not books.storage.is_local:
        named.append("what other machines have fetched to their temporary folders (aifactory-cache-*)")
    if left := sorted(path.name for path in Path(tempfile.gettempdir()).glob("aifactory-verify-*")):
        named.append(f"temporary folders of verify that were killed or still run: {', '.join(left)}")
    targets = sorted({str(event.detail["target"]) for event in books.journal.events(event=BACKED_UP)})
    named += [
        f"the backup in {each}: the next one that is taken there deletes what it holds of them" for each in targets
    ]
    return [*named, "other backups, pages and files that somebody has copied out of the factory"]


def _summed(places: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    return {place: sum(things.values()) for place, things in sorted(places.items())}


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
