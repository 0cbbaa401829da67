"""Completions and feedback: acknowledged when they are durable, counted once, sealed into batches.

A batch is sealed by count (or age) in one transaction; its rows never change afterwards. It is published as an artifact
of its own (`rows.parquet`, and `chats.parquet` for what was said to chats), which ingestion reads like any other source;
its fingerprint is that of its contents alone, so the same corrections give the same cycle however and whenever they came.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aifactory.errors import BadRequestError
from aifactory.records.artifacts import ArtifactStore, FeedbackBatch, Record, digest_of
from aifactory.records.identity import fingerprint, hash_parts
from aifactory.records.journal import ANONYMOUS, Journal
from aifactory.records.tables import batches, choices, completions, feedback, scores

BATCH_CODE_VERSION = 1
OF_AN_ADAPTER = 0
"""The batch of feedback on what an adapter answered: kept, but no measure of the release beside which it stood, and nothing
that a retrain of it learns from. No batch has this number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """An answer that was given."""

    id: str
    release: int
    prompt: str
    """As the model saw it."""
    answer: str
    request: str
    """The rest of the request, JSON."""
    finish_reason: str
    prompt_tokens: int
    answer_tokens: int
    messages: str = ""
    """Of a chat the turns, JSON [{"role": ..., "content": ...}]."""
    user: str | None = None
    at: float = 0.0
    key_id: str = ""
    """The key by which it was asked for; empty: the journal's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feedback:
    """What somebody said of an answer."""

    completion: str
    idempotency_key: str
    score: float | None = None
    correction: str | None = None
    comment: str | None = None
    user: str | None = None
    key_id: str = ""
    """The key by which it came; empty: the journal's."""
    rejected: Sequence[str] = ()
    """Answers to the same prompt to which this one was preferred."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """A completion with the answer that it should have been."""

    feedback: int
    completion: str
    release: int
    prompt: str
    messages: str
    answer: str
    correction: str
    user: str
    """Who corrected it; the completion's id where nobody said."""
    key: str = ANONYMOUS
    """The key by which it came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One metric of one answer."""

    feedback: int
    metric: str
    release: int
    value: float
    weight: float


class FeedbackLog:
    """The completions, the feedback and the scores of one factory."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.database = journal.database
        self.factory = journal.factory

    # ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def log_completion(self, *given: Completion, again: bool = False) -> None:
        """Keep an answer, or several that belong together; durable when this returns.

        again    it may have been kept before by whoever was killed before it told anybody: this one takes its place

        NUL and lone surrogates, which PostgreSQL and UTF-8 can't hold, are kept as U+FFFD in what the model said.
        Raises   BadRequestError if a name is longer than its column.
        """
        rows = []
        for completion in given:
            who = completion.key_id or self.journal.key_id
            values = asdict(completion) | {"at": self.journal.clock(), "key_id": who}
            values |= {name: storable(values[name]) for name in ("prompt", "messages", "answer", "request")}
            _check_texts(values, completions)
            rows.append({"factory": self.factory, **values})
        with self.database.write() as connection:
            if again:
                ids = [row["id"] for row in rows]
                mine = (completions.c.factory == self.factory, completions.c.id.in_(ids))
                connection.execute(completions.delete().where(*mine))
            connection.execute(completions.insert(), rows)

    def record(self, entry: Feedback) -> bool:
        """Keep feedback; durable when this returns. False if this idempotency key had been counted before.

        Raises   BadRequestError if no such completion was given, if the key was used for another one, or if a value
                 can't be kept as it is.
        """
        _check_texts({name: value for name, value in asdict(entry).items() if name != "rejected"}, feedback)
        if entry.score is not None and not 0 <= entry.score <= 1:
            raise BadRequestError(f"expected a score from 0 to 1, found {entry.score}.", field="score")
        mine = feedback.c.factory == self.factory
        row = {name: value for name, value in asdict(entry).items() if name != "rejected"}
        with self.database.write(serialize=True) as connection:
            earlier = connection.scalar(
                sa.select(feedback.c.completion).where(mine, feedback.c.idempotency_key == entry.idempotency_key)
            )
            if earlier is not None:
                if earlier != entry.completion:
                    raise BadRequestError(
                        f"expected an idempotency key of its own for each feedback, found {entry.idempotency_key!r} "
                        f"already used for {earlier!r}.",
                        field="idempotency_key",
                    )
                return False
            prompt = self._prompt_of(connection, entry.completion, field="completion")
            for other in entry.rejected:
                if other == entry.completion or self._prompt_of(connection, other, field="rejected") != prompt:
                    raise BadRequestError(
                        f"expected two answers to the same prompt, found {entry.completion!r} and {other!r}.",
                        field="rejected",
                    )
            row["key_id"] = entry.key_id or self.journal.key_id
            values = {"factory": self.factory, "at": self.journal.clock(), **row}
            if self._is_of_an_adapter(connection, entry.completion):
                values["batch"] = OF_AN_ADAPTER
            (seq,) = connection.execute(feedback.insert().values(values)).inserted_primary_key or (None,)
            for other in dict.fromkeys(entry.rejected):
                connection.execute(choices.insert().values(factory=self.factory, feedback=seq, rejected=other))
            return True

    def _is_of_an_adapter(self, connection: Connection, completion: str) -> bool:
        mine = (completions.c.factory == self.factory, completions.c.id == completion)
        request = connection.scalar(sa.select(completions.c.request).where(*mine))
        return "adapter" in json.loads(request or "{}")

    def _prompt_of(self, connection: Connection, completion: str, *, field: str) -> str:
        """Raises BadRequestError if no such completion was given."""
        prompts = sa.select(completions.c.prompt).where(completions.c.factory == self.factory)
        prompt = connection.scalar(prompts.where(completions.c.id == completion))
        if prompt is not None:
            return str(prompt)
        if connection.scalar(prompts.where(completions.c.id == f"{completion}-0")) is not None:
            raise BadRequestError(
                f"expected the index of one of the answers of {completion!r}, of which there are several, found none.",
                field="index",
            )
        raise BadRequestError(f"expected the id of a completion that was given, found {completion!r}.", field=field)

    def add_scores(self, entries: Sequence[Score]) -> None:
        """Keep scores; one that is there already stays as it is."""
        with self.database.write(serialize=True) as connection:
            for entry in entries:
                known = connection.scalar(
                    sa.select(scores.c.at).where(
                        scores.c.factory == self.factory,
                        scores.c.feedback == entry.feedback,
                        scores.c.metric == entry.metric,
                        scores.c.release == entry.release,
                    )
                )
                if known is None:
                    connection.execute(
                        scores.insert().values(factory=self.factory, at=self.journal.clock(), **asdict(entry))
                    )

    # ── sealing ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def seal(self, *, batch_rows: int, batch_after_s: float | None) -> int | None:
        """Seal the oldest corrections into a batch if there are `batch_rows` of them or the oldest is old enough.

        Returns the number of the batch; None where nothing was due. Call it until it returns None.
        """
        with self.database.write(serialize=True) as connection:
            waiting = connection.execute(
                sa.select(feedback.c.seq, feedback.c.at)
                .where(feedback.c.factory == self.factory, feedback.c.batch.is_(None))
                .where(feedback.c.correction.is_not(None))
                .order_by(feedback.c.seq)
                .limit(batch_rows)
            ).all()
            if not waiting:
                return None
            aged = batch_after_s is not None and self.journal.clock() - waiting[0].at >= batch_after_s
            if len(waiting) < batch_rows and not aged:
                return None
            last = connection.scalar(sa.select(sa.func.max(batches.c.number)).where(batches.c.factory == self.factory))
            number = (last or 0) + 1
            # By range, not by list: PostgreSQL binds 65,535 values at most. No row is added in between.
            due = (feedback.c.factory == self.factory, feedback.c.batch.is_(None), feedback.c.correction.is_not(None))
            connection.execute(feedback.update().where(*due, feedback.c.seq <= waiting[-1].seq).values(batch=number))
            connection.execute(
                batches.insert().values(
                    factory=self.factory, number=number, rows=len(waiting), sealed_at=self.journal.clock()
                )
            )
            self.journal.write_within(connection, "sealed", subject=f"batch {number}", detail={"rows": len(waiting)})
            return number

    def sealed(self) -> list[int]:
        """Numbers of the sealed batches, oldest first; without those of which all rows were erased."""
        with self.database.read() as connection:
            query = sa.select(batches.c.number).where(batches.c.factory == self.factory, batches.c.rows > 0)
            return [int(number) for number in connection.scalars(query.order_by(batches.c.number))]

    def publish(self, number: int, artifacts: ArtifactStore, *, objective: str = "likelihood") -> FeedbackBatch:
        """The sealed batch as an artifact; the same contents give the same one.

        objective   what is learnt from it (`train.objective`). likelihood: each correction is a row; dpo: beside it stands, in
                    `rejected`, the answer that was corrected; kto: the answer is a row of its own, and `label` says of
                    each `true` or `false`
        """
        compared = objective != "likelihood"
        found = self.corrections(batch=number)
        # One key is a way in like any other; of several it is told apart, since one of them may be capped.
        keyed = len({row.key for row in found}) > 1
        rows = sorted(found, key=lambda row: _contents(row, with_answer=compared, with_key=keyed))
        contents = [_contents(row, with_answer=compared, with_key=keyed) for row in rows]
        if compared:
            contents.append(objective)
        identity = fingerprint(stage="batch", code_version=BATCH_CODE_VERSION, recipe={"rows": contents}, inputs=[])
        existing = artifacts.find(FeedbackBatch, identity)
        if existing is not None:
            return existing
        # A column is of one type: the prompts of chats are turns, and stand in a file of their own.
        parts = {"rows.parquet": [r for r in rows if not r.messages], "chats.parquet": [r for r in rows if r.messages]}
        tables = {name: _batch_table(part, objective, keyed=keyed) for name, part in parts.items() if part}
        files = []
        for name, table in tables.items():
            sink = io.BytesIO()
            pq.write_table(table, sink, compression="zstd")
            files.append(artifacts.storage.write_bytes(sink.getvalue(), *artifacts.folder("batch", identity), name))
        record = Record(
            kind="batch",
            fingerprint=identity,
            digest=digest_of(files),
            code_version=BATCH_CODE_VERSION,
            recipe={},
            inputs=[],
            files=files,
            figures={"rows": sum(table.num_rows for table in tables.values()), "number": number},
            created_at=self.journal.clock(),
        )
        return artifacts.publish(FeedbackBatch, record)

    # ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def completion(self, completion_id: str) -> Completion | None:
        """The completion of this id."""
        with self.database.read() as connection:
            query = sa.select(completions).where(
                completions.c.factory == self.factory, completions.c.id == completion_id
            )
            row = connection.execute(query).mappings().one_or_none()
            return None if row is None else Completion(**{k: v for k, v in row.items() if k != "factory"})

    def answers_of(self, completion_id: str, *, most: int) -> dict[int, tuple[str, str]]:
        """Of the several answers that came under one id: id and prompt of each, by their index."""
        ids = {f"{completion_id}-{index}": index for index in range(most)}
        with self.database.read() as connection:
            query = sa.select(completions.c.id, completions.c.prompt).where(
                completions.c.factory == self.factory, completions.c.id.in_(ids)
            )
            return {ids[row.id]: (row.id, row.prompt) for row in connection.execute(query)}

    def corrections(
        self,
        *,
        batch: int | None = None,
        unscored_by: str | None = None,
        release: int | None = None,
        since: float | None = None,
        limit: int | None = None,
    ) -> list[Correction]:
        """Corrections in the order in which they came: of a batch, of a release, without a score by a metric, or after a time
        (seconds since 1970, UTC)."""
        query = (
            sa.select(
                feedback.c.seq.label("feedback"),
                completions.c.id.label("completion"),
                completions.c.release,
                completions.c.prompt,
                completions.c.messages,
                completions.c.answer,
                feedback.c.correction,
                sa.func.coalesce(feedback.c.user, completions.c.user, completions.c.id).label("user"),
                feedback.c.key_id.label("key"),
            )
            .join(
                completions,
                sa.and_(completions.c.factory == feedback.c.factory, completions.c.id == feedback.c.completion),
            )
            .where(feedback.c.factory == self.factory, feedback.c.correction.is_not(None))
            .order_by(feedback.c.seq)
        )
        if batch is not None:
            query = query.where(feedback.c.batch == batch)
        if release is not None:
            query = query.where(completions.c.release == release)
        if since is not None:
            query = query.where(feedback.c.at > since)
        if unscored_by is not None:
            scored = sa.select(scores.c.feedback).where(
                scores.c.factory == self.factory,
                scores.c.feedback == feedback.c.seq,
                scores.c.metric == unscored_by,
            )
            query = query.where(~scored.exists(), feedback.c.batch.is_distinct_from(OF_AN_ADAPTER))
        with self.database.read() as connection:
            return [Correction(**row) for row in connection.execute(query.limit(limit)).mappings()]

    def given(
        self, *, release: int, since: float, until: float, after: tuple[float, str] = (0.0, ""), limit: int
    ) -> list[tuple[float, str, str, str]]:
        """Time, id, prompt and text of answers of a release, in order: those given after `since` and up to `until` (seconds since 1970,
        UTC) that come after the time and id `after`."""
        at, name = completions.c.at, completions.c.id
        query = (
            sa.select(at, name, completions.c.prompt, completions.c.answer)
            .where(completions.c.factory == self.factory, completions.c.release == release)
            .where(at > since, at <= until, sa.or_(at > after[0], sa.and_(at == after[0], name > after[1])))
            .order_by(at, name)
            .limit(limit)
        )
        with self.database.read() as connection:
            return [(row.at, row.id, row.prompt, row.answer) for row in connection.execute(query)]

    def scores(self, *, metric: str, release: int, without: Collection[int] = ()) -> list[Score]:
        """The scores of a release by one metric, in the order of the feedback; not those of the batches `without`."""
        query = (
            sa.select(scores.c.feedback, scores.c.metric, scores.c.release, scores.c.value, scores.c.weight)
            .where(scores.c.factory == self.factory, scores.c.metric == metric, scores.c.release == release)
            .order_by(scores.c.feedback)
        )
        if without:
            read = sa.select(feedback.c.seq).where(
                feedback.c.factory == self.factory,
                feedback.c.seq == scores.c.feedback,
                feedback.c.batch.in_(sorted(without)),
            )
            query = query.where(~read.exists())
        with self.database.read() as connection:
            return [Score(**row) for row in connection.execute(query).mappings()]

    def counts(self) -> dict[str, int]:
        """How many completions, feedback rows, corrections that wait for a batch, and batches there are."""
        with self.database.read() as connection:
            return {
                "completions": self._count(connection, completions),
                "feedback": self._count(connection, feedback),
                "waiting": self._count(
                    connection, feedback, feedback.c.batch.is_(None), feedback.c.correction.is_not(None)
                ),
                "batches": self._count(connection, batches),
            }

    def feedback_keys(self) -> set[str]:
        """The idempotency keys of all feedback that was counted."""
        with self.database.read() as connection:
            query = sa.select(feedback.c.idempotency_key).where(feedback.c.factory == self.factory)
            return set(connection.scalars(query))

    def completions_by_release(self) -> dict[int, int]:
        """How many answers each release gave."""
        with self.database.read() as connection:
            query = (
                sa.select(completions.c.release, sa.func.count())
                .where(completions.c.factory == self.factory)
                .group_by(completions.c.release)
            )
            return {int(release): int(number) for release, number in connection.execute(query)}

    def _count(self, connection: Connection, table: sa.Table, *conditions: sa.ColumnElement[bool]) -> int:
        query = sa.select(sa.func.count()).select_from(table).where(table.c.factory == self.factory, *conditions)
        return int(connection.scalar(query) or 0)


def _batch_table(rows: Sequence[Correction], objective: str, *, keyed: bool) -> pa.Table:
    """Corrections as rows to learn from; those of chats have turns for a prompt."""
    table = pa.table(
        {
            "user": [_contributor(row) for row in rows],
            "prompt": [json.loads(row.messages) if row.messages else row.prompt for row in rows],
            "text": [row.correction for row in rows],
            "completion": [row.completion for row in rows],
            "feedback": [row.feedback for row in rows],
        }
    )
    if keyed:
        keys = ["" if row.key == ANONYMOUS else row.key for row in rows]
        table = table.append_column("key", pa.array(keys, pa.string()))
    answers = pa.array([row.answer for row in rows], pa.string())
    if objective == "dpo":
        return table.append_column("rejected", answers)
    if objective == "kto":
        given = table.set_column(table.schema.get_field_index("text"), "text", answers)
        halves = ((table, "true"), (given, "false"))
        return pa.concat_tables(
            [half.append_column("label", pa.array([label] * len(rows), pa.string())) for half, label in halves]
        )
    return table


def storable(text: str) -> str:
    """A text as both databases can hold it: NUL and lone surrogates are U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "\ufffd")


def _check_texts(values: Mapping[str, Any], table: sa.Table) -> None:
    """Refuse what only one of the databases would keep."""
    for name, value in values.items():
        if not isinstance(value, str):
            continue
        if value != storable(value):
            raise BadRequestError(f"expected text without NUL and lone surrogates in {name}, found one.", field=name)
        limit = getattr(table.c[name].type, "length", None)
        if limit is not None and len(value) > limit:
            raise BadRequestError(f"expected {name} of at most {limit} characters, found {len(value)}.", field=name)


def _contributor(row: Correction) -> str:
    """Who corrected it; where nobody said, a name made of the contents, since the completion's id is chance."""
    return row.user if row.user != row.completion else f"nobody-{hash_parts(row.prompt, row.correction)[:16]}"


def _contents(row: Correction, *, with_answer: bool = False, with_key: bool = False) -> str:
    answer = [row.answer] if with_answer else []
    chat = ["chat", row.messages] if row.messages else []
    key = ["key", row.key] if with_key else []
    return hash_parts(_contributor(row), row.prompt, row.correction, *answer, *chat, *key)
