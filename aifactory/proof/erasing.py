"""The places that hold rows: what of them is meant by an erasure, and how each loses it.

    log       completions, feedback, choices, scores, files and batch jobs             rows deleted
    batch     sealed feedback                                                          published anew from the log
    corpus    rows on both sides, the ledger, the index, the page                      written anew without them
    scorecard scores by row                                                            written anew without them
    tokens    packed rows, their index from text, the tokenizer if it was trained on them    deleted, made anew where needed
    parts     what was made from pieces of data, n-grams of holdouts                   deleted, made anew where needed
    runs      checkpoints and packed holdouts of runs; files without a record          deleted
    journal   examples of rejected rows, errors that quote                             the quotation is taken out

Identity   What is left of an artifact is another artifact: its recipe names the one that it was made from (`erased_from`) and a
           digest of the keyed hashes of what it lacks. Of the old one a note stays (`erased.json`), without text.
Law        Each thing is found by what it holds, or by tombstones where names are gone; it is noted before it is deleted, and
           doing it again changes nothing. So whoever was killed does all of it again.
"""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa

from aifactory.ingest.card import dataset_card
from aifactory.ingest.index import INDEX_FILE, index_bytes, read_index
from aifactory.ingest.pipeline import counted_again
from aifactory.proof.where import Where
from aifactory.records.artifacts import (
    ERASED_NAME,
    Artifact,
    Corpus,
    Erased,
    FeedbackBatch,
    Model,
    Noun,
    Record,
    Scorecard,
    TokenSet,
    digest_of,
)
from aifactory.records.batch_jobs import UploadedFile
from aifactory.records.books import Books
from aifactory.records.erasures import Erasure, KeyedHash, Kind
from aifactory.records.identity import fingerprint, hash_parts
from aifactory.records.journal import ERASED
from aifactory.records.rows import CORPUS_SCHEMA, LEDGER_SCHEMA, from_parquet, to_parquet
from aifactory.records.storage import RECORD_NAME, StoredFile
from aifactory.records.tables import (
    batch_jobs,
    batches,
    choices,
    completions,
    cycles,
    feedback,
    files,
    journal,
    scores,
    shadow_answers,
)

FEEDBACK = "feedback"
"""The source of rows that users said to the factory itself."""
_NOUNS: tuple[type[Artifact], ...] = (FeedbackBatch, Corpus, TokenSet, Model, Scorecard)
_NAMED = ("id", "key", "user", "source", "label", "origin", "completion", "text")
_SIDES = ("train", "holdout", "rejected")
_OPEN_JOBS = ("validating", "in_progress", "cancelling")
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{12}")
_QUIET_S = 60.0
"""A partial file that nobody has touched for so long is nobody's any more."""
_QUOTED_CHARS = 60
_MOST_QUOTED = 20_000
_AT_ONCE = 400


@dataclass(slots=True)
class Search:
    """What is meant: by the conditions, by names found in this process, and by the tombstones of this erasure."""

    where: Where
    keyed: KeyedHash | None = None
    rows: frozenset[str] = frozenset()
    """Tombstones of rows."""
    said: frozenset[str] = frozenset()
    """Tombstones of completions."""
    row_ids: set[str] = field(default_factory=set)
    completion_ids: set[str] = field(default_factory=set)

    def is_gone(self, row_id: str) -> bool:
        """Whether the row of this id is meant."""
        return row_id in self.row_ids or (
            bool(self.rows) and self.keyed is not None and self.keyed.of("row", row_id) in self.rows
        )

    def is_said(self, completion_id: str) -> bool:
        """Whether the completion of this id is meant."""
        return completion_id in self.completion_ids or (
            bool(self.said) and self.keyed is not None and self.keyed.of("completion", completion_id) in self.said
        )

    def mask(self, rows: pa.Table) -> npt.NDArray[np.bool_]:
        """Which of N rows of a corpus or a ledger are meant."""
        gone = _each(rows, "id", self.is_gone)
        return self.where.mask(rows) | gone | _each(rows, "origin", self.is_said)


def _each(rows: pa.Table, column: str, is_meant: Callable[[str], bool]) -> npt.NDArray[np.bool_]:
    """For each of N rows whether what a column says is meant; where there is none, no row is."""
    if column not in rows.column_names or not rows.num_rows:
        return np.zeros(rows.num_rows, bool)
    values = rows[column].combine_chunks().dictionary_encode()
    found = np.array([is_meant(value or "") for value in values.dictionary.to_pylist()], bool)
    meant: npt.NDArray[np.bool_] = found[values.indices.to_numpy()]
    return meant


@dataclass(slots=True)
class Found:
    """What was found, by place and thing; of a run that erases what it has erased itself."""

    places: dict[str, dict[str, int]] = field(default_factory=dict)
    waits: list[str] = field(default_factory=list)
    """What can't be erased now, and why."""
    trained: dict[str, int] = field(default_factory=dict)
    """By corpus how many of its rows trained."""
    tokens: set[str] = field(default_factory=set)
    """Token sets that hold such rows, or whose tokenizer was trained on them."""
    tokenizers: dict[str, str] = field(default_factory=dict)
    """By digest of a tokenizer that was trained on them the token set with which it was."""
    sources: set[str] = field(default_factory=set)
    silent: set[str] = field(default_factory=set)
    """Corpora whose ledger does not say what the conditions ask for: an older version wrote it."""

    def add(self, place: str, thing: str, rows: int) -> None:
        of_place = self.places.setdefault(place, {})
        of_place[thing] = of_place.get(thing, 0) + rows

    @property
    def num_things(self) -> int:
        return sum(map(len, self.places.values()))


class Eraser:
    """Looks through all places of a factory, and erases what it finds unless it only looks."""

    def __init__(self, books: Books, where: Where, erasure: Erasure | None) -> None:
        """`erasure`: none where it only looks."""
        self.books = books
        self.storage = books.storage
        self.erasure = erasure
        self.found = Found()
        self.search = Search(where)
        self._quoted: set[str] = set()
        self._hits: dict[str, dict[str, int]] = {}
        self._read_tombstones()

    def _read_tombstones(self) -> None:
        if self.erasure is not None:
            self.search_for(self.erasure.id)

    def search_for(self, erasure_id: str) -> None:
        """Look for what lies under the tombstones of an erasure, too."""
        erasures = self.books.erasures
        self.search.keyed = erasures.keyed()
        self.search.rows = erasures.buried("row", erasure=erasure_id)
        self.search.said = erasures.buried("completion", erasure=erasure_id)

    def said_again(self) -> list[str]:
        """Completions in the log that lie under tombstones."""
        query = sa.select(completions.c.id).where(completions.c.factory == self.books.journal.factory)
        with self.books.database.read() as connection:
            return [each for each in connection.scalars(query) if self.search.is_said(each)]

    def go_through(self) -> Found:
        """All places once."""
        self._log(self._in_log())
        rows = self._in_corpora()
        more = self._said_in(rows)
        if more:
            self._log(more)
        self._bury(rows)
        self._batches()
        self._corpora()
        self._scorecards()
        self._token_sets()
        self._parts()
        self._files()
        self._journal()
        self._loose()
        return self.found

    # ── the log ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _in_log(self) -> tuple[list[str], list[int]]:
        """Completions, and feedback, that the conditions mean."""
        conditions = dict(self.search.where.conditions)
        if conditions.pop("source", FEEDBACK) != FEEDBACK or conditions.keys() & {"key", "label"}:
            return [], []
        mine = completions.c.factory == self.books.journal.factory
        asked = sa.select(completions.c.id).where(mine)
        told = (
            sa.select(feedback.c.seq)
            .join(
                completions,
                sa.and_(completions.c.factory == feedback.c.factory, completions.c.id == feedback.c.completion),
            )
            .where(feedback.c.factory == self.books.journal.factory)
        )
        if "user" in conditions:
            user = conditions["user"]
            on_it = sa.select(feedback.c.seq).where(
                feedback.c.factory == completions.c.factory, feedback.c.completion == completions.c.id
            )
            # What nobody has put his name to is his who alone said something of it.
            his = sa.and_(
                completions.c.user.is_(None),
                on_it.where(feedback.c.user == user).exists(),
                ~on_it.where(feedback.c.user.is_distinct_from(user)).exists(),
            )
            asked = asked.where(sa.or_(completions.c.user == user, his))
            told = told.where(sa.func.coalesce(feedback.c.user, completions.c.user) == user)
        if "id" in conditions:
            name = conditions["id"]
            named = sa.or_(completions.c.id == name, completions.c.id.startswith(f"{name}-", autoescape=True))
            asked, told = asked.where(named), told.where(named)
        with self.books.database.read() as connection:
            return list(connection.scalars(asked)), list(connection.scalars(told))

    def _said_in(self, rows: Sequence[dict[str, str]]) -> tuple[list[str], list[int]] | None:
        """Of rows that were said to the factory the completions that they were made of, where the conditions name a row.

        A user who corrected somebody else's answer takes the correction along, not the other's question.
        """
        fields = set(self.search.where.fields)
        user = self.search.where.conditions.get("user", "")
        if not fields & {"id", "key", "label"} and not user.startswith("nobody-"):
            return None
        origins = sorted({row["origin"] for row in rows if row["source"] == FEEDBACK and row["origin"]})
        found: list[str] = []
        with self.books.database.read() as connection:
            for some in _chunks(origins):
                query = sa.select(completions.c.id).where(completions.c.factory == self.books.journal.factory)
                found += connection.scalars(query.where(completions.c.id.in_(some)))
        return (found, []) if found else None

    def _log(self, meant: tuple[Sequence[str], Sequence[int]]) -> None:
        """Delete completions with all that was said of them, and feedback; the tombstones in the same transaction."""
        ids, told = meant
        self.search.completion_ids.update(ids)
        self.search.completion_ids.update(re.sub(r"-\d+$", "", each) for each in ids)
        if not ids and not told:
            return
        factory, erasure = self.books.journal.factory, self.erasure
        with self.books.database.write(serialize=True) as connection:
            seqs = set(told)
            for some in _chunks(ids):
                query = sa.select(feedback.c.seq).where(feedback.c.factory == factory)
                seqs.update(connection.scalars(query.where(feedback.c.completion.in_(some))))
                texts = sa.select(completions.c.prompt, completions.c.answer).where(completions.c.factory == factory)
                for row in connection.execute(texts.where(completions.c.id.in_(some))):
                    self._quote(row.prompt, row.answer)
            counted = {"completions": len(ids), "feedback": len(seqs)}
            for place, count in counted.items():
                if count:
                    self.found.add(place, "log", count)
            if erasure is None:
                return
            for seqs_ in _chunks(sorted(seqs)):
                mine = scores.c.factory == factory
                gone = connection.execute(scores.delete().where(mine, scores.c.feedback.in_(seqs_))).rowcount
                counted["scores"] = counted.get("scores", 0) + gone
                mine = choices.c.factory == factory
                gone = connection.execute(choices.delete().where(mine, choices.c.feedback.in_(seqs_))).rowcount
                counted["choices"] = counted.get("choices", 0) + gone
            for some in _chunks(ids):
                mine = choices.c.factory == factory
                gone = connection.execute(choices.delete().where(mine, choices.c.rejected.in_(some))).rowcount
                counted["choices"] = counted.get("choices", 0) + gone
            for seqs_ in _chunks(sorted(seqs)):
                connection.execute(feedback.delete().where(feedback.c.factory == factory, feedback.c.seq.in_(seqs_)))
            for some in _chunks(ids):
                mine = shadow_answers.c.factory == factory
                shadows = shadow_answers.delete().where(mine, shadow_answers.c.completion.in_(some))
                counted["shadow answers"] = counted.get("shadow answers", 0) + connection.execute(shadows).rowcount
                connection.execute(
                    completions.delete().where(completions.c.factory == factory, completions.c.id.in_(some))
                )
            left = sa.select(sa.func.count()).where(
                feedback.c.factory == batches.c.factory, feedback.c.batch == batches.c.number
            )
            connection.execute(batches.update().where(batches.c.factory == factory).values(rows=left.scalar_subquery()))
            self.books.erasures.bury(
                connection, erasure.id, (("completion", each, "") for each in self.search.completion_ids)
            )
            for place, count in counted.items():
                if count:
                    self.books.erasures.note(connection, erasure.id, "places", place, "log", value=count, add=True)
            self.books.journal.write_within(
                connection, ERASED, subject="log", detail={"erasure": erasure.id, **counted}
            )
        self._read_tombstones()

    def _quote(self, *texts: str) -> None:
        if len(self._quoted) < _MOST_QUOTED:
            self._quoted.update(cut for text in texts if len(cut := text.strip()[:_QUOTED_CHARS]) >= 16)

    # ── corpora ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _in_corpora(self) -> list[dict[str, str]]:
        """The rows of all corpora that are meant; how many of each side and file is remembered."""
        rows: list[dict[str, str]] = []
        self._hits = {}
        for corpus in self._all(Corpus):
            for file in corpus.record.files:
                if not file.name.endswith(".parquet"):
                    continue
                table = _named_columns(self._read(corpus, file.name))
                if self.search.where.conditions.keys() & {"user", "label"} - set(table.column_names):
                    self.found.silent.add(corpus.id)
                meant = self.search.mask(table)
                if not meant.any():
                    continue
                self._hits.setdefault(corpus.id, {})[file.name] = int(meant.sum())
                for row in table.filter(pa.array(meant)).to_pylist():
                    self._quote(row.pop("text"))
                    rows.append(row)
                    self.found.sources.add(row["source"])
        self.search.row_ids.update(row["id"] for row in rows)
        return rows

    def _bury(self, rows: Sequence[dict[str, str]]) -> None:
        """Tombstones, before any file is changed."""
        if self.erasure is None or not rows:
            return
        with self.books.database.write(serialize=True) as connection:
            self.books.erasures.bury(connection, self.erasure.id, _tombstones(rows))
        self._read_tombstones()

    def _corpora(self) -> None:
        for corpus_id, hits in list(self._hits.items()):
            corpus = self.books.artifacts.get(Corpus, corpus_id)
            rows = {side: sum(count for name, count in hits.items() if name.startswith(f"{side}-")) for side in _SIDES}
            self.found.trained[corpus_id] = rows["train"]
            for side, count in rows.items():
                if count:
                    self.found.add(
                        {"train": "corpora", "holdout": "holdouts", "rejected": "ledgers"}[side], corpus_id, count
                    )
            if self.erasure is not None:
                self.replace(corpus, self._without(corpus, sum(hits.values())), rows)

    def _without(self, corpus: Corpus, erased: int) -> Corpus | None:
        """The corpus without what is meant; None where nothing is left of it."""
        record, keyed = corpus.record, self.search.keyed
        assert keyed is not None
        numbers = sorted({name.partition("-")[2].partition(".")[0] for name in _parts_of(corpus)})
        hashes: list[str] = []
        masks: dict[str, npt.NDArray[np.bool_]] = {}
        for name in _parts_of(corpus):
            table = _named_columns(self._read(corpus, name))
            masks[name] = self.search.mask(table)
            ids = table["id"].filter(pa.array(masks[name])).to_pylist()
            hashes += [keyed.of("row", each) for each in ids]
        recipe = {
            **record.recipe,
            "erased_from": record.fingerprint,
            "erased": hash_parts(*sorted(hashes)),
        }
        identity = fingerprint(
            stage=Corpus.kind, code_version=record.code_version, recipe=recipe, inputs=[record.fingerprint]
        )
        known = self.books.artifacts.find(Corpus, identity)
        if known is not None:
            return known
        kept: list[StoredFile] = []
        target = self.books.artifacts.folder(Corpus.kind, identity)

        def parts() -> Iterator[tuple[pa.Table, pa.Table, pa.Table]]:
            for number in numbers:
                sides = {}
                for side in _SIDES:
                    name = f"{side}-{number}.parquet"
                    schema = LEDGER_SCHEMA if side == "rejected" else CORPUS_SCHEMA
                    table = self._read(corpus, name) if name in masks else schema.empty_table()
                    sides[side] = table
                    if name in masks and masks[name].any():
                        sides[side] = table = table.filter(pa.array(~masks[name]))
                        if table.num_rows:
                            kept.append(self.storage.write_bytes(to_parquet(table), *target, name))
                    elif name in masks:
                        kept.append(self._taken(corpus, name, target))
                index = f"index-{number}.arrow"
                if index in {file.name for file in record.files}:
                    kept.append(self._index_without(corpus, index, masks, number, target))
                yield sides["train"], sides["holdout"], sides["rejected"]

        figures = counted_again(record.figures, parts(), erased=erased, gone=self.search.is_gone)
        if not figures["rows_kept"] and not figures["rows_rejected"]:
            self.storage.delete(*target)
            return None
        from aifactory.ingest.corpus_page import REPORT_FILE, corpus_report

        name = self.books.config.name
        kept.append(self.storage.write_bytes(dataset_card(name, figures).encode(), *target, "README.md"))
        kept.append(self.storage.write_bytes(corpus_report(name, figures), *target, REPORT_FILE))
        inputs = [corpus.id, *self.books.journal.left_of(each for each in record.inputs if each.startswith("batch/"))]
        return self._published(Corpus, record, identity, recipe, inputs, kept, figures)

    def _index_without(
        self,
        corpus: Corpus,
        name: str,
        masks: dict[str, npt.NDArray[np.bool_]],
        number: str,
        target: tuple[str, str],
    ) -> StoredFile:
        sides = [masks.get(f"{side}-{number}.parquet", np.zeros(0, bool)) for side in ("train", "holdout")]
        gone = np.concatenate(sides)
        if not gone.any():
            return self._taken(corpus, name, target)
        data = self.storage.read_bytes(*self.books.artifacts.folder(corpus.kind, corpus.fingerprint), name)
        assert data is not None, name
        return self.storage.write_bytes(index_bytes(read_index(data).take(~gone)), *target, name)

    def _taken(self, artifact: Artifact, name: str, target: tuple[str, str]) -> StoredFile:
        folder = self.books.artifacts.folder(artifact.kind, artifact.fingerprint)
        self.storage.duplicate([((*folder, name), (*target, name))])
        return next(file for file in artifact.record.files if file.name == name)

    def _published(
        self,
        noun: type[Noun],
        old: Record,
        identity: str,
        recipe: dict[str, Any],
        inputs: Sequence[str],
        kept: Sequence[StoredFile],
        figures: Mapping[str, Any],
    ) -> Noun:
        record = Record(
            kind=noun.kind,
            fingerprint=identity,
            digest=digest_of(kept),
            code_version=old.code_version,
            recipe=recipe,
            inputs=inputs,
            files=kept,
            figures=figures,
            execution=old.execution,
            created_at=self.books.journal.clock(),
        )
        return self.books.artifacts.publish(noun, record)

    # ── what an artifact becomes ──────────────────────────────────────────────────────────────────────────────────────

    def replace(self, old: Artifact, successor: Artifact | None, rows: dict[str, int]) -> None:
        """Note that an artifact is erased and what is left of it; then delete it."""
        erasure = self.erasure
        assert erasure is not None
        left = None if successor is None else successor.id
        if successor is not None:
            self.books.lineage.add(successor)
        if old.id not in self.books.journal.erased():
            with self.books.database.write(serialize=True) as connection:
                told = {"digest": old.digest, "successor": left, "rows": rows}
                if successor is not None:
                    told["successor_digest"] = successor.digest
                    if isinstance(successor, Corpus):
                        self.books.journal.write_within(
                            connection, "ingested", subject=successor.id, detail=dict(successor.figures)
                        )
                self.books.erasures.note(connection, erasure.id, "artifacts", old.id, value=told)
                for place, things in self.found.places.items():
                    if old.id in things:
                        self.books.erasures.note(connection, erasure.id, "places", place, old.id, value=things[old.id])
                self.books.journal.write_within(
                    connection, ERASED, subject=old.id, detail={"erasure": erasure.id, "successor": left, "rows": rows}
                )
        self._erase(old, left, rows)

    def _erase(self, old: Artifact, successor: str | None, rows: dict[str, int]) -> None:
        """Delete an artifact that was noted, here and where this machine has fetched it."""
        assert self.erasure is not None
        self.books.artifacts.erase(
            Erased(id=old.id, digest=old.digest, erasure=self.erasure.id, successor=successor, rows=rows)
        )
        folder = self.books.artifacts.folder(old.kind, old.fingerprint)
        self.storage.drop_cache(*folder, version=old.digest)

    # ── batches and scorecards ────────────────────────────────────────────────────────────────────────────────────────

    def _batches(self) -> None:
        where = dict(self.search.where.conditions)
        is_of_log = where.pop("source", FEEDBACK) == FEEDBACK and not where.keys() - {"user"}
        for batch in self._all(FeedbackBatch):
            gone = 0
            columns: set[str] = set()
            for file in batch.record.files:
                table = self._read(batch, file.name)
                columns |= set(table.column_names)
                meant = _each(table, "completion", self.search.is_said)
                if is_of_log and where:
                    meant |= Where(where).mask(table)
                gone += int(meant.sum())
            if not gone:
                continue
            self.found.add("batches", batch.id, gone)
            if self.erasure is None:
                continue
            objective = "dpo" if "rejected" in columns else "kto" if "label" in columns else "likelihood"
            number = int(batch.figures["number"])
            successor: FeedbackBatch | None = None
            if number in self.books.feedback.sealed():
                successor = self.books.feedback.publish(number, self.books.artifacts, objective=objective)
                assert successor.id != batch.id, "the log holds nothing any more of what is erased from its batch"
            self.replace(batch, successor, {"train": gone})

    def _scorecards(self) -> None:
        for card in self._all(Scorecard):
            name = "examples.parquet"
            if name not in {file.name for file in card.record.files}:
                continue
            table = self._read(card, name)
            gone = np.array([self.search.is_gone(each) for each in table["row"].to_pylist()], bool)
            if not gone.any():
                continue
            self.found.add("scorecards", card.id, int(gone.sum()))
            if self.erasure is None:
                continue
            record = card.record
            recipe = {**record.recipe, "erased_from": record.fingerprint, "erased": self.erasure.id}
            identity = fingerprint(
                stage=card.kind, code_version=record.code_version, recipe=recipe, inputs=[record.fingerprint]
            )
            target = self.books.artifacts.folder(card.kind, identity)
            sink = io.BytesIO()
            pq.write_table(table.filter(pa.array(~gone)), sink, compression="zstd")
            kept = [self.storage.write_bytes(sink.getvalue(), *target, name)]
            kept += [self._taken(card, file.name, target) for file in record.files if file.name != name]
            inputs = [card.id, *self.books.journal.left_of(each for each in record.inputs if each.startswith("model/"))]
            successor = self._published(Scorecard, record, identity, recipe, inputs, kept, record.figures)
            self.replace(card, successor, {"holdout": int(gone.sum())})

    # ── tokens ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _token_sets(self) -> None:
        """Those that hold such rows, whose tokenizer was trained on them, or that use such a tokenizer."""
        every = list(self._all(TokenSet))
        if self.erasure is not None:
            noted = self.books.erasures.get(self.erasure.id)
            assert noted is not None
            self.found.tokenizers.update(noted.found.get("tokenizers", {}))
        held = {tokens.id: self._rows_of(tokens) for tokens in every}
        for tokens in every:
            if "vocab_size" in tokens.record.recipe and (held[tokens.id] or self._has_trained(tokens)):
                self.found.tokenizers[tokens.figures["tokenizer_digest"]] = tokens.id
        if self.erasure is not None and self.found.tokenizers:
            with self.books.database.write(serialize=True) as connection:
                for digest, token_id in self.found.tokenizers.items():
                    self.books.erasures.note(connection, self.erasure.id, "tokenizers", digest, value=token_id)
        for tokens in every:
            if (
                held[tokens.id]
                or self._has_trained(tokens)
                or tokens.figures["tokenizer_digest"] in self.found.tokenizers
            ):
                self.found.tokens.add(tokens.id)
                self.found.add("token sets", tokens.id, held[tokens.id])
                if self.erasure is not None:
                    self.replace(tokens, None, {"train": held[tokens.id]})

    def _rows_of(self, tokens: TokenSet) -> int:
        count = 0
        for file in tokens.record.files:
            if file.name.startswith("shard-"):
                data = self.storage.read_bytes(*self.books.artifacts.folder(tokens.kind, tokens.fingerprint), file.name)
                count += self._documents(data or b"")
        return count

    def _documents(self, shard: bytes) -> int:
        """How many rows that are meant lie in a shard."""
        if not shard:
            return 0
        batch = pa.ipc.open_file(pa.BufferReader(shard)).get_batch(0)
        names = batch.column("documents").values.field("row").dictionary_encode().dictionary.to_pylist()
        return sum(self.search.is_gone(name) for name in names)

    def _has_trained(self, tokens: TokenSet) -> bool:
        """Whether a row of its corpus is meant that stood on the side that trains."""
        corpus = tokens.record.inputs[0]
        erased = self.books.artifacts.erased(corpus)
        if erased is not None and self.erasure is not None and erased.erasure == self.erasure.id:
            return bool(erased.rows.get("train"))
        return bool(self.found.trained.get(corpus))

    # ── parts, files, the journal, what is loose ──────────────────────────────────────────────────────────────────────

    def _parts(self) -> None:
        for begin in self.storage.names("parts"):
            for name in self.storage.names("parts", begin):
                folder = ("parts", begin, name)
                rows = self._rows_in_part(folder)
                if rows is None:
                    continue
                self.found.add("parts", "/".join(folder), rows)
                if self.erasure is not None:
                    with self.books.database.write(serialize=True) as connection:
                        place = ("places", "parts", "/".join(folder))
                        self.books.erasures.note(connection, self.erasure.id, *place, value=rows)
                    self.storage.delete_file(*folder, "part.json")
                    self.storage.delete(*folder)

    def _rows_in_part(self, folder: tuple[str, str, str]) -> int | None:
        """How many rows that are meant are in a part; None where it may stay."""
        rows, must_go = 0, False
        for name in self.storage.names(*folder):
            data = self.storage.read_bytes(*folder, name) or b""
            try:
                if name == "arrays.npz":
                    # Hashes of what stood in holdouts: nobody can tell whose.
                    must_go = must_go or bool(self.search.row_ids or self.search.rows)
                elif name == "shard.arrow":
                    rows += self._documents(data)
                elif name == INDEX_FILE:
                    ids = read_index(data).ids_N2.astype(">u8").tobytes().hex()
                    rows += sum(self.search.is_gone(ids[at : at + 32]) for at in range(0, len(ids), 32))
                elif name.endswith(".arrow") and not name.startswith("trace"):
                    rows += int(self.search.mask(pa.ipc.open_file(pa.BufferReader(data)).read_all()).sum())
                elif name.endswith(".parquet"):
                    rows += int(self.search.mask(from_parquet(data)).sum())
            except (pa.ArrowInvalid, OSError, ValueError, KeyError):
                must_go = (
                    True  # a power cut may have taken the half of it: it can be made again, and not be looked through
                )
        return rows if rows or must_go else None

    def _files(self) -> None:
        """Lines of uploaded files and of the answers to them."""
        queue, factory = self.books.batches, self.books.journal.factory
        with self.books.database.read() as connection:
            query = sa.select(
                batch_jobs.c.id, batch_jobs.c.input_file, batch_jobs.c.output_file, batch_jobs.c.error_file
            )
            jobs = connection.execute(
                query.add_columns(batch_jobs.c.state).where(batch_jobs.c.factory == factory)
            ).all()
        known = {file.id: file for file in queue.files()}
        meant: dict[str, list[bool]] = {}
        named: dict[str, set[str]] = {}
        for name in self.storage.names("files"):
            lines = (self.storage.read_bytes("files", name) or b"").split(b"\n")
            found = [self._is_meant_line(line) for line in lines]
            meant[name] = [is_meant for is_meant, _ in found]
            named[name] = {custom for is_meant, custom in found if is_meant and custom}
        for job in jobs:
            customs = named.get(job.input_file, set())
            for name in filter(None, (job.output_file, job.error_file)):
                if customs and name in meant:
                    lines = (self.storage.read_bytes("files", name) or b"").split(b"\n")
                    meant[name] = [
                        is_meant or _custom_id(line) in customs
                        for is_meant, line in zip(meant[name], lines, strict=True)
                    ]
            if job.state in _OPEN_JOBS and customs:
                self.found.waits.append(f"the batch job {job.id} is still answered: its lines can go when it has ended")
                meant.pop(job.input_file, None)
        for name, gone in meant.items():
            if any(gone):
                self._write_file(name, known.get(name), gone)

    def _is_meant_line(self, line: bytes) -> tuple[bool, str]:
        """Whether a request of a file, or an answer to one, is meant; and what its client calls it."""
        try:
            value = json.loads(line)
            body = value.get("body") or (value.get("response") or {}).get("body") or {}
            user, name = body.get("user"), str(body.get("id", ""))
        except (ValueError, AttributeError, RecursionError):
            return False, ""
        conditions = self.search.where.conditions
        fits = self.search.where.fits({"user": user, "source": FEEDBACK, "id": name}) and bool(
            conditions.keys() & {"user", "id", "source"}
        )
        return fits or (bool(name) and self.search.is_said(name)), str(value.get("custom_id", ""))

    def _write_file(self, name: str, known: UploadedFile | None, gone: Sequence[bool]) -> None:
        count = sum(gone)
        self.found.add("files", name, count)
        if self.erasure is None:
            return
        lines = (self.storage.read_bytes("files", name) or b"").split(b"\n")
        left = b"\n".join(line for line, is_gone in zip(lines, gone, strict=True) if not is_gone)
        with self.books.database.write(serialize=True) as connection:
            self.books.erasures.note(connection, self.erasure.id, "places", "files", name, value=count)
            mine = (files.c.factory == self.books.journal.factory, files.c.id == name)
            connection.execute(files.update().where(*mine).values(num_bytes=len(left)))
        if known is None:
            self.storage.delete_file("files", name)  # nobody can ask for it
        else:
            self.storage.write_bytes(left, "files", name)

    def _journal(self) -> None:
        """Take quotations out of what the journal keeps: examples of rejected rows, and errors."""
        factory = self.books.journal.factory
        for table, key, column in (
            (journal, journal.c.seq, journal.c.detail),
            (cycles, cycles.c.trigger, cycles.c.decision),
        ):
            changed: dict[Any, str] = {}
            with self.books.database.read() as connection:
                query = sa.select(key, column).where(table.c.factory == factory, column.is_not(None))
                for name, text in connection.execute(query):
                    told = json.loads(text)
                    left = self._without_quotations(told)
                    if left != told:
                        changed[name] = json.dumps(left, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            if not changed:
                continue
            self.found.add("journal", table.name, len(changed))
            if self.erasure is None:
                continue
            with self.books.database.write(serialize=True) as connection:
                for name, text in changed.items():
                    mine = (table.c.factory == factory, key == name)
                    connection.execute(table.update().where(*mine).values({column.name: text}))
                place = ("places", "journal", table.name)
                self.books.erasures.note(connection, self.erasure.id, *place, value=len(changed), add=True)

    def _without_quotations(self, told: Any) -> Any:
        if isinstance(told, dict):
            return {name: self._without_quotations(value) for name, value in told.items()}
        if isinstance(told, list):
            return [
                self._without_quotations(each)
                for each in told
                if not (isinstance(each, dict) and "text" in each and self.search.is_gone(str(each.get("id"))))
            ]
        if isinstance(told, str) and len(told) >= 16 and any(text in told for text in self._quoted):
            return "(erased)"
        return told

    def _loose(self) -> None:
        """Checkpoints of runs that nobody needs, folders without a record, and partial files of whoever was killed.

        Runs and folders not once an erasure trains again: then they are its own.
        """
        if not (self.search.row_ids or self.search.rows):
            return
        if self.storage.is_local:
            for path in Path(self.storage.path()).rglob(".*"):
                if _PARTIAL.fullmatch(path.name) and path.is_file():
                    self._partial(path)
        if self.erasure is not None and self.erasure.state != "erasing":
            return
        saw = {each.id for each in models_that_saw(self.books, self.found)}
        for name in self.storage.names("runs"):
            model = f"model/{name.removeprefix('train-')}"
            has_record = self.storage.size(*model.split("/"), RECORD_NAME) is not None
            if not has_record or model in saw:
                self._drop("runs", name)
        for noun in _NOUNS:
            for name in self.storage.names(noun.kind):
                there = self.storage.names(noun.kind, name)
                if RECORD_NAME not in there and (ERASED_NAME not in there or len(there) > 1):
                    self._drop("unfinished", noun.kind, name, keep=ERASED_NAME)

    def _drop(self, place: str, *folder: str, keep: str = "") -> None:
        parts = ("runs", *folder) if place == "runs" else folder
        self.found.add(place, "/".join(parts), 0)
        if self.erasure is None:
            return
        with self.books.database.write(serialize=True) as connection:
            self.books.erasures.note(connection, self.erasure.id, "places", place, "/".join(parts), value=0)
        for name in self.storage.names(*parts, hidden=True):
            if name != keep:
                self.storage.delete_any(*parts, name)
        if keep not in self.storage.names(*parts):
            self.storage.delete(*parts)

    def _partial(self, path: Path) -> None:
        try:
            age = time.time() - path.stat().st_mtime
            if age < _QUIET_S:
                self.found.waits.append(f"{path} was written {age:.0f} s ago, perhaps by somebody who still lives")
                return
            self.found.add("unfinished", path.name, 0)
            if self.erasure is not None:
                path.unlink()
        except FileNotFoundError:
            return

    # ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _all(self, noun: type[Noun]) -> Iterator[Noun]:
        """Every artifact of a kind that there is."""
        for name in self.storage.names(noun.kind):
            artifact = self.books.artifacts.find(noun, name)
            if artifact is not None:
                yield artifact

    def _read(self, artifact: Artifact, name: str) -> pa.Table:
        data = self.storage.read_bytes(*self.books.artifacts.folder(artifact.kind, artifact.fingerprint), name)
        return pa.table({}) if data is None else from_parquet(data)


def models_that_saw(books: Books, found: Found) -> list[Model]:
    """The models that were trained on such rows, on tokens of a tokenizer that was, or from such a model; oldest first."""
    every = [
        model for name in books.storage.names(Model.kind) if (model := books.artifacts.find(Model, name)) is not None
    ]
    saw: dict[str, Model] = {}
    for model in sorted(every, key=lambda each: each.record.created_at):
        for each in model.record.inputs:
            is_gone = each.startswith(("tokens/", "model/")) and books.artifacts.erased(each) is not None
            if each in found.tokens or each in saw or is_gone:
                saw[model.id] = model
    return list(saw.values())


def _named_columns(table: pa.Table) -> pa.Table:
    """The columns by which rows are found; what a table of another version lacks is left out."""
    return table.select([name for name in _NAMED if name in table.column_names])


def _parts_of(corpus: Corpus) -> list[str]:
    """The files with rows, by name."""
    return sorted(
        file.name
        for file in corpus.record.files
        if file.name.endswith(".parquet") and file.name.startswith(tuple(f"{side}-" for side in _SIDES))
    )


def _tombstones(rows: Sequence[dict[str, str]]) -> Iterator[tuple[Kind, str, str]]:
    for row in rows:
        outside = "" if row["source"] == FEEDBACK else row["source"]
        yield "row", row["id"], outside
        if row.get("key"):
            yield "key", row["key"], outside


def _custom_id(line: bytes) -> str:
    try:
        return str(json.loads(line).get("custom_id", ""))
    except (ValueError, AttributeError, RecursionError):
        return ""


def _chunks(values: Iterable[Any]) -> Iterator[list[Any]]:
    every = list(values)
    for at in range(0, len(every), _AT_ONCE):
        yield every[at : at + _AT_ONCE]
