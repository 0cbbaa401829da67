"""Books of a factory that has a release and corrections of its answers, and what stands in for model and cluster."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from aifactory.config import Config
from aifactory.records.artifacts import ArtifactStore, Model, Record, Scorecard, digest_of
from aifactory.records.books import Books
from aifactory.records.database import Database
from aifactory.records.feedback import Completion, Feedback, FeedbackLog
from aifactory.records.journal import Bound, Cycle, Journal
from aifactory.records.lineage import Lineage
from aifactory.records.registry import Registry
from aifactory.records.retrain_requests import RetrainRequests
from aifactory.records.verdicts import Verdicts
from aifactory.text.tasks import Task

STANDARD = 1.0
"""Bits per byte that a release needs for answers about rows that it was taught."""


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.at = 1_000.0

    def __call__(self) -> float:
        return self.at


class Death(BaseException):
    """The process is gone: nothing catches it."""


class MortalDatabase(Database):
    """Dies with the n-th transaction that writes: before it, or after it is on disk."""

    def __init__(self, url: str, *, dies_at: int | None = None, after_commit: bool = False) -> None:
        super().__init__(url)
        self.num_writes, self._dies_at, self._after_commit = 0, dies_at, after_commit

    def write(self, *, serialize: bool = False) -> Any:
        self.num_writes += 1
        dies = self.num_writes == self._dies_at
        if dies and not self._after_commit:
            raise Death
        return _Dying(super().write(serialize=serialize)) if dies else super().write(serialize=serialize)


class _Dying:
    def __init__(self, transaction: Any) -> None:
        self._transaction = transaction

    def __enter__(self) -> Any:
        return self._transaction.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._transaction.__exit__(*error)
        raise Death


class Scorer:
    """A model that needs so many bits per byte, by the id of the model."""

    def __init__(self, bits_per_byte: float = 3.0) -> None:
        self.bits_per_byte = bits_per_byte
        self.of: dict[str, float] = {}
        self.asked: list[tuple[str, str]] = []
        """Model and answer, one for each that was scored."""
        self.poison: set[str] = set()
        """Answers, and ids of models, at which it raises."""

    def __call__(self, store: ArtifactStore, model: Model, tasks: Sequence[Task]) -> list[float]:
        if self.poison & {model.id, *(task.answer for task in tasks)}:
            raise ValueError("poison")
        self.asked += [(model.id, task.answer) for task in tasks]
        # Spread a little, as answers are.
        worth = self.of.get(model.id, self.bits_per_byte)
        return [(worth + 0.01 * (len(task.prompt) % 3)) * len(task.answer.encode()) for task in tasks]


class FakeLauncher:
    """Turns a cycle in `turn`, or keeps it at work until `end` is called."""

    def __init__(self, books: Books, end: Callable[[Books, Cycle], None] | None = None) -> None:
        self.books, self._end = books, end
        self.turned: list[tuple[str, int]] = []
        self.at_work: set[str] = set()
        self.why = ""

    def is_turning(self, cycle: Cycle) -> bool:
        return cycle.trigger in self.at_work

    def turn(self, cycle: Cycle) -> None:
        claimed = self.books.journal.claim(cycle)
        self.turned.append((cycle.trigger, claimed.attempt))
        if self._end is None:
            self.at_work.add(cycle.trigger)
        else:
            self._end(self.books, claimed)

    def ending(self, cycle: Cycle) -> str:
        return self.why


def promote(books: Books, cycle: Cycle) -> None:
    """A candidate that the gate lets pass."""
    model, card = publish_release(books, f"{cycle.number:016x}" + "0" * 48)
    books.registry.promote(cycle, model=model.id, scorecard=card.id, decision={"reasons": ["better"]})


def reject(books: Books, cycle: Cycle) -> None:
    """A candidate that the gate does not let pass."""
    books.registry.reject(cycle, scorecard="scorecard/x", decision={"reasons": ["worse"]})


def publish_release(books: Books, fingerprint: str) -> tuple[Model, Scorecard]:
    def publish(noun: Any, figures: dict[str, Any]) -> Any:
        record = Record(
            kind=noun.kind,
            fingerprint=fingerprint,
            digest=digest_of([]),
            code_version=1,
            recipe={},
            inputs=[],
            files=[],
            figures=figures,
        )
        return books.artifacts.publish(noun, record)

    known = {"candidate": {"estimate": STANDARD, "low": 0.9, "high": 1.1}}
    return publish(Model, {}), publish(Scorecard, {"known": known})


def small_books(folder: Path, **improve: Any) -> Books:
    """Empty books, with a clock that is set by hand."""
    config = Config.model_validate(
        {
            "name": "small",
            "ingest": {"sources": [{"name": "docs", "kind": "text", "path": "nowhere"}]},
            "improve": {"min_scored": 6, "batch_rows": 8, **improve},
            "runtime": {"storage": str(folder)},
        }
    )
    books = Books(config)
    return with_database(books, books.database, Clock())


def with_database(books: Books, database: Database, clock: Callable[[], float]) -> Books:
    """The same books, over another way to the database."""
    books.database = database
    books.journal = Journal(database, books.config.name, clock=clock)
    books.registry, books.feedback = Registry(books.journal), FeedbackLog(books.journal)
    books.lineage = Lineage(books.journal)
    books.verdicts = Verdicts(books.journal)
    books.retrain_requests = RetrainRequests(books.journal)
    return books


def first_release(books: Books) -> None:
    cycle = books.journal.open_cycle("run-1", recipe={}, bound=Bound(kind="run", sources_digest="x"))
    promote(books, books.journal.claim(cycle))


def correct(books: Books, number: int, *, release: int = 1, start: int = 0, text: str = "as it should be") -> None:
    """So many answers of a release, each corrected."""
    for i in range(start, start + number):
        books.feedback.log_completion(
            Completion(
                id=f"cmpl-{i}",
                release=release,
                prompt="?" * (i % 7 + 1),
                answer="no",
                request="{}",
                finish_reason="stop",
                prompt_tokens=1,
                answer_tokens=1,
            )
        )
        books.feedback.record(
            Feedback(completion=f"cmpl-{i}", idempotency_key=f"k{i}", correction=f"{text} {i}", user=f"u{i}")
        )


class Tools:
    """What the tests of this folder take from here; importlib mode gives conftest no name to import it by."""

    Clock, Death, MortalDatabase, Scorer, FakeLauncher = Clock, Death, MortalDatabase, Scorer, FakeLauncher
    promote, reject = staticmethod(promote), staticmethod(reject)
    correct, first_release = staticmethod(correct), staticmethod(first_release)
    small_books, with_database = staticmethod(small_books), staticmethod(with_database)
    publish_release = staticmethod(publish_release)

    @staticmethod
    def copied(template: Path, target: Path) -> Path:
        shutil.copytree(template, target)
        return target


@pytest.fixture(scope="session")
def tools() -> type[Tools]:
    return Tools


@pytest.fixture
def books(tmp_path: Path) -> Books:
    """A release in production, and nothing said about it yet."""
    made = small_books(tmp_path)
    first_release(made)
    return made
