"""Files that clients upload, and batch jobs over them: many requests in one file, answered while nobody else asks.

Law      Each line of a job is answered once: its result is kept under the job and the number of the line, by whoever holds
         the job, and a holder whose time has run out keeps nothing more. So a replica that is killed loses the lines that
         it was at, which another answers; none is lost, none is there twice.
Layout   <root>/files/<id>: the bytes of a file. Its row is written after them.
Raises   BadRequestError naming the field, StateError.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, RowMapping

from aifactory.errors import FencedError
from aifactory.records.journal import ANONYMOUS, Journal
from aifactory.records.storage import Storage
from aifactory.records.tables import batch_jobs, batch_lines, files

WINDOW_S = 86_400.0
"""Time that a job has; what is not answered then is not answered any more."""
LEASE_S = 30.0
"""Time for which a replica holds a job, unless it says that it is still at it."""
_OPEN = ("validating", "in_progress", "cancelling")


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadedFile:
    """A file that somebody uploaded, or that a job has written."""

    id: str
    filename: str
    purpose: str
    num_bytes: int
    created_at: float
    key_id: str
    """Whose it is."""
    team: str | None
    """Whose it is beside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """Many requests in one file."""

    id: str
    endpoint: str
    input_file: str
    state: str
    """validating, in_progress, cancelling; then completed, failed, cancelled or expired."""
    note: Mapping[str, str]
    """What the client wanted to remember."""
    created_at: float
    expires_at: float
    started_at: float | None
    cancelling_at: float | None
    ended_at: float | None
    total: int
    """Lines of the input file, once it was read."""
    num_answered: int
    num_failed: int
    output_file: str | None
    error_file: str | None
    problems: Sequence[Mapping[str, Any]]
    """What is wrong with the input file, of a job that failed."""
    key_id: str
    """Who asked for it, and pays for it."""
    team: str | None
    """Whose it is beside."""


class BatchQueue:
    """The files and the batch jobs of one factory."""

    def __init__(self, journal: Journal, storage: Storage) -> None:
        self.journal = journal
        self.database = journal.database
        self.storage = storage
        self.factory = journal.factory

    # ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def add_file(
        self, data: bytes, *, filename: str, purpose: str, key_id: str = ANONYMOUS, team: str | None = None
    ) -> UploadedFile:
        """Keep a file; durable when this returns. It belongs to a key, and to its team."""
        file_id = "file-" + secrets.token_hex(12)
        self.storage.write_bytes(data, "files", file_id)
        with self.database.write() as connection:
            self._add_file_row(
                connection,
                file_id,
                filename=filename,
                purpose=purpose,
                num_bytes=len(data),
                key_id=key_id,
                team=team,
            )
        found = self.file(file_id)
        assert found is not None
        return found

    def file(self, file_id: str) -> UploadedFile | None:
        """The file of this id; None where there is none, or none any more."""
        return next(iter(self._files(files.c.id == file_id)), None)

    def files(self) -> list[UploadedFile]:
        """All files, newest first."""
        return self._files()

    def read_file(self, file_id: str) -> bytes | None:
        """The bytes of a file."""
        return None if self.file(file_id) is None else self.storage.read_bytes("files", file_id)

    def delete_file(self, file_id: str) -> bool:
        """Delete a file; False where there is none."""
        with self.database.write() as connection:
            gone = connection.execute(files.delete().where(files.c.factory == self.factory, files.c.id == file_id))
        if gone.rowcount:
            self.storage.delete_file("files", file_id)
        return bool(gone.rowcount)

    # ── jobs ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def open_job(
        self,
        *,
        endpoint: str,
        input_file: str,
        note: Mapping[str, str],
        key_id: str = ANONYMOUS,
        team: str | None = None,
    ) -> BatchJob:
        """Ask for the answers to a file of requests; durable when this returns. It and what it writes belong to a key, and to its
        team."""
        job_id, now = "batch-" + secrets.token_hex(12), self.journal.clock()
        with self.database.write() as connection:
            connection.execute(
                batch_jobs.insert().values(
                    factory=self.factory,
                    id=job_id,
                    endpoint=endpoint,
                    input_file=input_file,
                    state="validating",
                    note=json.dumps(dict(note)),
                    created_at=now,
                    expires_at=now + WINDOW_S,
                    total=0,
                    num_answered=0,
                    num_failed=0,
                    problems="[]",
                    key_id=key_id,
                    team=team,
                )
            )
        found = self.job(job_id)
        assert found is not None
        return found

    def job(self, job_id: str) -> BatchJob | None:
        """The job of this id."""
        return next(iter(self._jobs(batch_jobs.c.id == job_id)), None)

    def jobs(self) -> list[BatchJob]:
        """All jobs, newest first."""
        return self._jobs()

    def cancel(self, job_id: str) -> BatchJob | None:
        """Ask for the end of a job; whoever holds it writes down what is done. Nothing happens if it has ended."""
        with self.database.write() as connection:
            connection.execute(
                batch_jobs.update()
                .where(batch_jobs.c.factory == self.factory, batch_jobs.c.id == job_id)
                .where(batch_jobs.c.state.in_(("validating", "in_progress")))
                .values(state="cancelling", cancelling_at=self.journal.clock())
            )
        return self.job(job_id)

    def counts(self, job: BatchJob) -> tuple[int, int]:
        """How many lines were answered so far, and how many could not be."""
        if job.ended_at is not None:
            return job.num_answered, job.num_failed
        with self.database.read() as connection:
            good = sa.func.sum(sa.case((batch_lines.c.status == 200, 1), else_=0))
            query = sa.select(sa.func.count(), good).where(*self._lines_of(job.id))
            total, answered = connection.execute(query).one()
            return int(answered or 0), int(total) - int(answered or 0)

    # ── holding one ───────────────────────────────────────────────────────────────────────────────────────────────────

    def claim(self, holder: str) -> BatchJob | None:
        """The oldest open job that nobody holds, held from here on."""
        now = self.journal.clock()
        free = sa.or_(batch_jobs.c.holder.is_(None), batch_jobs.c.held_until < now)
        with self.database.write(serialize=True) as connection:
            job_id = connection.scalar(
                sa.select(batch_jobs.c.id)
                .where(batch_jobs.c.factory == self.factory, batch_jobs.c.state.in_(_OPEN), free)
                .order_by(batch_jobs.c.created_at, batch_jobs.c.id)
                .limit(1)
            )
            if job_id is None:
                return None
            connection.execute(
                batch_jobs.update()
                .where(batch_jobs.c.factory == self.factory, batch_jobs.c.id == job_id)
                .values(holder=holder, held_until=now + LEASE_S)
            )
        return self.job(job_id)

    def hold(self, job_id: str, holder: str) -> str:
        """Hold a job for longer; its state. Raises FencedError if somebody else has it."""
        with self.database.write() as connection:
            self._fence(connection, job_id, holder, held_until=self.journal.clock() + LEASE_S)
            state = sa.select(batch_jobs.c.state).where(batch_jobs.c.factory == self.factory, batch_jobs.c.id == job_id)
            return str(connection.scalar(state))

    def let_go(self, job_id: str, holder: str) -> None:
        """Hold it no longer, so that another may take it up at once."""
        with self.database.write() as connection:
            connection.execute(
                batch_jobs.update()
                .where(batch_jobs.c.factory == self.factory, batch_jobs.c.id == job_id, batch_jobs.c.holder == holder)
                .values(holder=None, held_until=None)
            )

    def begin(self, job_id: str, holder: str, *, total: int) -> None:
        """The file is as it should be, and has so many lines."""
        with self.database.write() as connection:
            self._fence(connection, job_id, holder, total=total, started_at=self.journal.clock())
            connection.execute(
                batch_jobs.update()
                .where(batch_jobs.c.factory == self.factory, batch_jobs.c.id == job_id)
                .where(batch_jobs.c.state == "validating")
                .values(state="in_progress")
            )

    def fail(self, job_id: str, holder: str, problems: Sequence[Mapping[str, Any]]) -> None:
        """The file is not as it should be: nothing of it is answered."""
        with self.database.write() as connection:
            self._fence(
                connection,
                job_id,
                holder,
                state="failed",
                problems=json.dumps(list(problems)),
                ended_at=self.journal.clock(),
                holder_after=None,
            )

    def done_lines(self, job_id: str) -> set[int]:
        """The lines that have a result."""
        with self.database.read() as connection:
            return set(connection.scalars(sa.select(batch_lines.c.line).where(*self._lines_of(job_id))))

    def add_line(self, job_id: str, holder: str, line: int, *, status: int, result: str) -> None:
        """Keep the result of a line. Raises FencedError if somebody else has the job."""
        with self.database.write() as connection:
            self._fence(connection, job_id, holder)
            connection.execute(
                batch_lines.insert().values(factory=self.factory, job=job_id, line=line, status=status, result=result)
            )

    def results(self, job_id: str) -> list[tuple[int, str]]:
        """Status and result of each line that has one, in the order of the lines."""
        with self.database.read() as connection:
            query = sa.select(batch_lines.c.status, batch_lines.c.result).where(*self._lines_of(job_id))
            return [(row.status, row.result) for row in connection.execute(query.order_by(batch_lines.c.line))]

    def finish(self, job_id: str, holder: str, *, state: str, output: Sequence[str], errors: Sequence[str]) -> None:
        """Write down the lines that were answered and those that were not, and end the job.

        The end is one transaction, after the files are durable; whoever does it again writes the same files.
        """
        written = {
            name: (f"file-{job_id.removeprefix('batch-')}-{name}", "".join(f"{line}\n" for line in lines).encode())
            for name, lines in (("output", output), ("error", errors))
            if lines
        }
        for file_id, data in written.values():
            self.storage.write_bytes(data, "files", file_id)
        with self.database.write() as connection:
            self._fence(
                connection,
                job_id,
                holder,
                state=state,
                ended_at=self.journal.clock(),
                num_answered=len(output),
                num_failed=len(errors),
                output_file=written["output"][0] if output else None,
                error_file=written["error"][0] if errors else None,
                holder_after=None,
            )
            mine = (batch_jobs.c.factory == self.factory, batch_jobs.c.id == job_id)
            owner = connection.execute(sa.select(batch_jobs.c.key_id, batch_jobs.c.team).where(*mine)).one()
            for name, (file_id, data) in written.items():
                self._add_file_row(
                    connection,
                    file_id,
                    filename=f"{job_id}_{name}.jsonl",
                    purpose="batch_output",
                    num_bytes=len(data),
                    key_id=owner.key_id,
                    team=owner.team,
                )
            connection.execute(batch_lines.delete().where(*self._lines_of(job_id)))

    # ── how ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _fence(self, connection: Connection, job_id: str, holder: str, **values: Any) -> None:
        """Change a job that is held; with nothing to change, see that it is."""
        held = (batch_jobs.c.factory == self.factory, batch_jobs.c.id == job_id, batch_jobs.c.holder == holder)
        changes = {"holder": values.pop("holder_after", holder), **values}
        if not connection.execute(batch_jobs.update().where(*held).values(changes)).rowcount:
            raise FencedError(f"expected to hold the batch job {job_id}, found that another replica has taken it up.")

    def _add_file_row(self, connection: Connection, file_id: str, **values: Any) -> None:
        row = {"factory": self.factory, "id": file_id, "created_at": self.journal.clock(), **values}
        connection.execute(files.insert().values(row))

    def _lines_of(self, job_id: str) -> tuple[sa.ColumnElement[bool], ...]:
        return batch_lines.c.factory == self.factory, batch_lines.c.job == job_id

    def _files(self, *conditions: sa.ColumnElement[bool]) -> list[UploadedFile]:
        query = sa.select(files).where(files.c.factory == self.factory, *conditions)
        with self.database.read() as connection:
            rows = connection.execute(query.order_by(files.c.created_at.desc(), files.c.id)).mappings()
            return [UploadedFile(**{k: v for k, v in row.items() if k != "factory"}) for row in rows]

    def _jobs(self, *conditions: sa.ColumnElement[bool]) -> list[BatchJob]:
        query = sa.select(batch_jobs).where(batch_jobs.c.factory == self.factory, *conditions)
        with self.database.read() as connection:
            rows = connection.execute(query.order_by(batch_jobs.c.created_at.desc(), batch_jobs.c.id)).mappings()
            return [_job_of(row) for row in rows]


def _job_of(row: RowMapping) -> BatchJob:
    values = {k: v for k, v in row.items() if k not in ("factory", "holder", "held_until")}
    return BatchJob(**values | {"note": json.loads(row["note"]), "problems": json.loads(row["problems"])})
