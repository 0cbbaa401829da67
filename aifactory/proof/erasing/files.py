"""Files: parts of data, what was uploaded and answered, and what is loose: runs, folders without a record, partial files."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import sqlalchemy as sa

from aifactory.ingest.index import INDEX_FILE, read_index
from aifactory.proof.erasing.eraser import Place
from aifactory.proof.erasing.search import FEEDBACK
from aifactory.proof.erasing.seen import models_that_saw
from aifactory.records.artifacts import ERASED_NAME, Artifact, Corpus, FeedbackBatch, Model, Scorecard, TokenSet
from aifactory.records.batch_jobs import UploadedFile
from aifactory.records.rows import from_parquet
from aifactory.records.storage import RECORD_NAME
from aifactory.records.tables import batch_jobs, files

_NOUNS: tuple[type[Artifact], ...] = (FeedbackBatch, Corpus, TokenSet, Model, Scorecard)
_OPEN_JOBS = ("validating", "in_progress", "cancelling")
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{12}")
_QUIET_S = 60.0
"""A partial file that nobody has touched for so long is nobody's any more."""


class Files(Place):
    """Files that are not those of an artifact."""

    def erase_parts(self) -> None:
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
                    rows += self.search.in_shard(data)
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

    def erase_uploaded(self) -> None:
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

    def erase_loose(self) -> None:
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


def _custom_id(line: bytes) -> str:
    try:
        return str(json.loads(line).get("custom_id", ""))
    except (ValueError, AttributeError, RecursionError):
        return ""
