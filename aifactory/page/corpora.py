"""Corpora: rows that came in, were kept, held out and rejected, and where the page of each lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aifactory.errors import StorageError
from aifactory.page.events import cycle_numbers, newest
from aifactory.records.books import Books

_REPORT = "report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusLine:
    """Rows that were made of sources or of a batch of feedback."""

    id: str
    cycle: int | None
    at: float
    rows_in: int
    rows_kept: int
    rows_holdout: int
    rows_rejected: int
    sources: Sequence[str]
    rejected_by_rule: Mapping[str, int]
    """Most first."""
    attacks: Sequence[str]
    """What of the feedback was not believed, in words."""
    seconds: float
    is_erased: bool
    """Rows of it were erased, and its page with them."""

    @property
    def name(self) -> str:
        """What its address is made of."""
        return self.id.partition("/")[2]


def corpora(books: Books, *, limit: int = 50) -> list[CorpusLine]:
    """The newest corpora, newest first."""
    numbers, erased = cycle_numbers(books), books.journal.erased()
    return [
        CorpusLine(
            id=str(event.subject),
            cycle=numbers.get(event.trigger or ""),
            at=event.at,
            rows_in=event.detail["rows_in"],
            rows_kept=event.detail["rows_kept"],
            rows_holdout=event.detail.get("rows_holdout", 0),
            rows_rejected=event.detail["rows_rejected"],
            sources=list(event.detail.get("sources", {})),
            rejected_by_rule=dict(
                sorted(event.detail["rejected_by_rule"].items(), key=lambda each: (-each[1], each[0]))
            ),
            attacks=event.detail.get("trust", {}).get("attacks", ()),
            seconds=event.seconds or 0.0,
            is_erased=event.subject in erased,
        )
        for event in newest(books, of=["ingested"], limit=limit)
    ]


def report_page(books: Books, name: str) -> bytes | None:
    """The page of the corpus with this name, as ingest wrote it; None where there is none."""
    if not (name.isalnum() and name.isascii()):
        return None  # a name of this storage, not a way out of it
    try:
        return books.storage.read_bytes("corpus", name, _REPORT)
    except StorageError:
        return None
