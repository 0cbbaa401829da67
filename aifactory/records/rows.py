"""Rows: what a corpus is made of, and the ids that follow each of them.

key      names a row for good: the file it is (code, text), or its content (jsonl, parquet, feedback). A hash of the key
         decides whether it trains or is held out, so an edited file never changes its side.
id       names one text: the hash of the key and the content.
cluster  rows that are not independent of one another share it (a user, a file): intervals resample clusters.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from aifactory.errors import StorageError
from aifactory.records.artifacts import Artifact
from aifactory.records.identity import hash_parts, share_of
from aifactory.records.storage import Storage

CORPUS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("key", pa.string()),
        ("cluster", pa.string()),
        ("source", pa.string()),
        ("origin", pa.string()),
        ("position", pa.int64()),
        ("side", pa.string()),
        ("content_hash", pa.string()),
        ("prompt", pa.string()),
        ("text", pa.string()),
    ]
)
LEDGER_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("origin", pa.string()),
        ("position", pa.int64()),
        ("rule", pa.string()),
        ("score", pa.float64()),
        ("detail", pa.string()),
        ("prompt", pa.string()),
        ("text", pa.string()),
    ]
)
_ID_DIGITS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of a corpus."""

    id: str
    key: str
    cluster: str
    source: str
    origin: str
    """The file it came from, below the source's path; or the completion that was corrected."""
    position: int
    """Line or record in the file, from 0."""
    side: str
    """train or holdout."""
    content_hash: str
    prompt: str
    """Empty for plain text."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A line of the ledger: a row that was not kept, why, and all that it takes to bring it back."""

    source: str
    origin: str
    position: int
    rule: str
    score: float
    """What the rule measured; its unit is the rule's."""
    detail: str
    text: str
    prompt: str = ""
    id: str = ""
    """The row's id; derived where the row never became one."""

    def to_ledger(self) -> dict[str, object]:
        values = asdict(self)
        values["id"] = self.id or hash_parts(self.source, self.origin, str(self.position), self.text)[:_ID_DIGITS]
        return values


def make_row(
    *,
    source: str,
    origin: str,
    position: int,
    text: str,
    prompt: str = "",
    keyed_by_file: bool,
    holdout_share: float,
    cluster: str | None = None,
) -> Row:
    """A row with its ids and its side."""
    content_hash = hash_parts(prompt, text)[:_ID_DIGITS]
    key = hash_parts(source, origin if keyed_by_file else content_hash)[:_ID_DIGITS]
    return Row(
        id=hash_parts(key, content_hash)[:_ID_DIGITS],
        key=key,
        cluster=cluster if cluster is not None else key,
        source=source,
        origin=origin,
        position=position,
        side="holdout" if share_of(key, salt="holdout") < holdout_share else "train",
        content_hash=content_hash,
        prompt=prompt,
        text=text,
    )


def read_corpus(storage: Storage, corpus: Artifact, *, columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
    """The kept rows of a corpus, part by part: the part's name and its table."""
    for name in part_names(corpus):
        data = storage.read_bytes(corpus.kind, corpus.fingerprint[:16], name)
        if data is None:
            raise StorageError(
                f"expected {corpus.uri}/{name}, found no such file; move the corpus away and ingest again."
            )
        yield name, pq.read_table(io.BytesIO(data), columns=list(columns))


def part_names(corpus: Artifact) -> list[str]:
    """The files of a corpus that hold its kept rows, in order."""
    return sorted(file.name for file in corpus.record.files if file.name.startswith("part-"))
