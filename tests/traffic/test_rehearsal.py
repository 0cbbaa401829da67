"""The rehearsal: users close the loop once, whatever the loop comes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aifactory.config import Config
from aifactory.errors import AIFactoryError, ConfigError
from aifactory.records.books import Books
from aifactory.records.feedback import Completion, Feedback
from aifactory.records.journal import Bound, Cycle
from aifactory.traffic.rehearsal import REHEARSED, rehearse

TEXTS = [(f"user-{n}", "".join(f"text {n} line {i:03d} of it\n" for i in range(10))) for n in range(6)]


def open_books(folder: Path, *, released: bool = True, keys: str = "optional", **changes: Any) -> Books:
    traffic = {
        "source": {"name": "users", "kind": "text", "path": "nowhere"},
        "requests": 12,
        "steady_per_s": 40,
        "timeout_s": 20,
    }
    books = Books(
        Config.model_validate(
            {
                "name": "small",
                "ingest": {"sources": [{"name": "docs", "kind": "text", "path": "nowhere"}]},
                "evaluate": {"prompt_bytes": 20, "answer_bytes": 20},
                "improve": {"min_scored": 2},
                "traffic": traffic | changes,
                "runtime": {"storage": str(folder), "gateway": {"keys": keys}},
            }
        )
    )
    if released and books.registry.production() is None:
        run = books.journal.open_cycle("run-1", recipe={}, bound=Bound(kind="run", sources_digest="x"))
        promote(books, books.journal.claim(run))
    return books


def promote(books: Books, cycle: Cycle) -> None:
    books.registry.promote(
        cycle, model=f"model/{cycle.number}", scorecard=f"scorecard/{cycle.number}", decision={"reasons": []}
    )


class FakeLoop:
    """A factory that is served by a small server; its evaluation actor does what the test says once all is corrected."""

    def __init__(self, books: Books, server: Any, ends: str = "settled") -> None:
        self.books, self.server, self.ends = books, server, ends
        self.opened = self.closed = 0
        server.on_feedback = self._keep

    def open(self) -> tuple[str, str]:
        self.opened += 1
        if self.ends == "breaks":
            raise AIFactoryError("no room for the actor")
        return self.server.url, "small"

    def _keep(self, body: dict[str, Any]) -> None:
        self.books.feedback.log_completion(
            Completion(
                id=body["completion"],
                release=1,
                prompt="p",
                answer="a",
                request="{}",
                finish_reason="stop",
                prompt_tokens=1,
                answer_tokens=1,
            )
        )
        key = body["idempotency_key"]
        self.books.feedback.record(
            Feedback(completion=body["completion"], idempotency_key=key, correction=body["correction"])
        )
        if len(self.server.feedback) == 12 and self.ends in ("promoted", "rejected", "failed", "running"):
            self._retrain()

    def _retrain(self) -> None:
        bound = Bound(kind="drift", sources_digest="", batches=[f"batch/{self.opened}"], champion=1)
        cycle = self.books.journal.claim(self.books.journal.open_cycle(f"drift-{self.ends}", recipe={}, bound=bound))
        if self.ends == "promoted":
            promote(self.books, cycle)
            self.server.model = "small-r2"
        elif self.ends == "rejected":
            self.books.registry.reject(cycle, scorecard="scorecard/x", decision={"reasons": ["worse"]})
        elif self.ends == "failed":
            with self.books.database.write(serialize=True) as connection:
                self.books.journal.close_cycle(connection, cycle, "failed", decision={"reasons": ["3 attempts"]})

    def is_settled(self) -> bool:
        return self.ends == "settled"

    def close(self) -> None:
        self.closed += 1


def found(books: Books) -> dict[str, Any]:
    (event,) = books.journal.events(event=REHEARSED)
    return dict(event.detail)


def test_it_ends_where_there_is_no_reason_to_retrain_and_does_nothing_the_second_time(
    tmp_path: Path, server: Any
) -> None:
    books = open_books(tmp_path)
    loop = FakeLoop(books, server)

    rehearse(books, loop, lambda: TEXTS)

    assert (found(books)["cycle"], found(books)["corrections"], found(books)["failed"]) == (None, 12, 0)
    assert found(books)["requests"] == len(server.asked)
    assert (loop.opened, loop.closed) == (1, 1)
    before = books.journal.events()
    rehearse(books, loop, lambda: TEXTS)
    patient = open_books(tmp_path, timeout_s=99, steady_per_s=1, concurrency=2)
    rehearse(patient, loop, lambda: TEXTS)
    assert books.journal.events() == before
    assert (loop.opened, loop.closed) == (1, 1)


def test_where_keys_are_required_users_have_one_that_ends_with_the_rehearsal(tmp_path: Path, server: Any) -> None:
    books = open_books(tmp_path, keys="required")
    rehearse(books, FakeLoop(books, server), lambda: TEXTS)

    (key,) = books.keys.all()
    assert (key.scopes, key.state(books.journal.clock())) == (("infer", "feedback"), "revoked")
    (sent,) = server.tokens
    assert sent.startswith("Bearer aif_" + key.id.removeprefix("key-"))
    assert found(books)["failed"] == 0


def test_it_ends_when_answers_come_from_the_release_that_was_promoted(tmp_path: Path, server: Any) -> None:
    books = open_books(tmp_path)
    loop = FakeLoop(books, server, "promoted")

    rehearse(books, loop, lambda: TEXTS)

    assert found(books)["cycle"] == 2
    assert found(books)["answered_by"]["small-r2"] >= 5
    assert sum(found(books)["answered_by"].values()) == found(books)["requests"]
    assert loop.closed == 1


@pytest.mark.parametrize("ends", ["rejected", "failed"])
def test_it_ends_when_the_cycle_ends_without_a_release(ends: str, tmp_path: Path, server: Any) -> None:
    books = open_books(tmp_path)
    loop = FakeLoop(books, server, ends)

    rehearse(books, loop, lambda: TEXTS)

    assert found(books)["cycle"] == 2
    assert loop.closed == 1


def test_a_loop_that_does_not_close_in_time_is_an_error_that_says_where_it_stood_and_what_failed(
    tmp_path: Path, server: Any
) -> None:
    books = open_books(tmp_path, timeout_s=0.7)
    loop = FakeLoop(books, server, "running")

    with pytest.raises(AIFactoryError, match=r"timeout_s = 0.7 s, found it at 'cycle 2 running'"):
        rehearse(books, loop, lambda: TEXTS)
    assert loop.closed == 1
    assert books.journal.events(event=REHEARSED) == []

    loop.ends = "unsettled"
    server.stop()
    with pytest.raises(AIFactoryError, match=r"failed requests, the first: .*ClientConnectorError"):
        rehearse(books, loop, lambda: TEXTS)


def test_killed_and_begun_again_it_corrects_only_the_rest_and_finds_the_cycle_of_before(
    tmp_path: Path, server: Any
) -> None:
    books = open_books(tmp_path, timeout_s=0.7)
    loop = FakeLoop(books, server, "running")
    with pytest.raises(AIFactoryError):
        rehearse(books, loop, lambda: TEXTS)
    (drift,) = [cycle for cycle in books.journal.cycles() if cycle.bound.kind == "drift"]
    promote(books, drift)
    server.model = "small-r2"

    rehearse(open_books(tmp_path), loop, lambda: TEXTS)

    assert found(books)["cycle"] == 2
    assert found(books)["corrections"] == 12 == len(server.feedback)


def test_users_with_other_questions_do_not_take_an_earlier_cycle_for_theirs(tmp_path: Path, server: Any) -> None:
    books = open_books(tmp_path)
    rehearse(books, FakeLoop(books, server, "promoted"), lambda: TEXTS)

    rehearse(books, FakeLoop(books, server, "settled"), lambda: [(user, text.upper()) for user, text in TEXTS])

    first, second = books.journal.events(event=REHEARSED)
    assert (first.detail["cycle"], second.detail["cycle"]) == (2, None)
    assert second.detail["corrections"] == 12
    assert len(server.feedback) == 24


def test_what_was_opened_in_part_is_closed(tmp_path: Path, server: Any) -> None:
    books = open_books(tmp_path)
    loop = FakeLoop(books, server, "breaks")

    with pytest.raises(AIFactoryError, match="no room"):
        rehearse(books, loop, lambda: TEXTS)
    assert loop.closed == 1


def test_without_a_release_there_is_nothing_to_ask(tmp_path: Path, server: Any) -> None:
    books = open_books(tmp_path, released=False)
    loop = FakeLoop(books, server)

    rehearse(books, loop, lambda: TEXTS)
    assert (loop.opened, books.journal.events()) == (0, [])


def test_too_few_questions_are_refused_before_anything_is_served(tmp_path: Path, server: Any) -> None:
    books = open_books(tmp_path, requests=1)
    loop = FakeLoop(books, server)

    with pytest.raises(ConfigError, match=r"improve.min_scored = 2 questions, found 1"):
        rehearse(books, loop, lambda: TEXTS)
    assert loop.opened == 0
