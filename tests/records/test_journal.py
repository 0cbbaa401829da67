"""python -m pytest tests/records/test_journal.py"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from aifactory.errors import FencedError, StateError
from aifactory.records.database import Database
from aifactory.records.journal import ANONYMOUS, Bound, Cycle, Journal

BOUND = Bound(
    kind="drift",
    sources_digest="a" * 64,
    batches=["batch/1"],
    parent="model/1",
    champion=1,
    holdouts=[],
    restored=[],
    models=[],
    corpora=[],
    requests=[],
)


def test_a_cycle_is_opened_once_and_bound_once(journal: Journal, clock: Callable[[], float]) -> None:
    first = journal.open_cycle("t1", recipe={"seed": 1}, bound=BOUND)
    clock.at += 60  # type: ignore[attr-defined]

    again = journal.open_cycle("t1", recipe={"seed": 2}, bound=Bound(kind="run", sources_digest="b" * 64))

    assert again == first
    assert (first.number, first.attempt, first.state, first.opened_at) == (1, 0, "running", 1_000.0)
    assert first.bound == BOUND
    assert len(journal.events(event="cycle_begun")) == 1


def test_an_ended_cycle_is_returned_as_it_ended(journal: Journal) -> None:
    cycle = journal.claim(journal.open_cycle("t1", recipe={}, bound=BOUND))
    with journal.database.write() as connection:
        journal.close_cycle(connection, cycle, "rejected", decision={"reasons": ["worse"]})

    again = journal.open_cycle("t1", recipe={}, bound=BOUND)

    assert (again.state, again.decision, again.closed_at) == ("rejected", {"reasons": ["worse"]}, 1_000.0)
    assert journal.claim(again).attempt == again.attempt


def test_a_newer_attempt_fences_the_older_ones_off(journal: Journal) -> None:
    opened = journal.open_cycle("t1", recipe={}, bound=BOUND)
    older, newer = journal.claim(opened), journal.claim(opened)
    before = journal.events()

    for stale in (opened, older):
        expected = pytest.raises(FencedError, match=r"expected attempt .* found attempt 2, running")
        with expected, journal.database.write() as connection:
            journal.close_cycle(connection, stale, "rejected", decision={})

    assert (older.attempt, newer.attempt) == (1, 2)
    assert journal.cycle("t1") == newer
    assert journal.events() == before


def test_a_cycle_ends_once(journal: Journal) -> None:
    cycle = journal.claim(journal.open_cycle("t1", recipe={}, bound=BOUND))
    with journal.database.write() as connection:
        journal.close_cycle(connection, cycle, "failed", decision={})

    with pytest.raises(FencedError, match="failed"), journal.database.write() as connection:
        journal.close_cycle(connection, cycle, "rejected", decision={})

    ended = journal.cycle("t1")
    assert ended is not None
    assert ended.state == "failed"
    assert len(journal.events(event="cycle_ended")) == 1


def test_a_cycle_that_was_never_opened_is_not_claimed(journal: Journal) -> None:
    opened = journal.open_cycle("t1", recipe={}, bound=BOUND)
    other = Journal(journal.database, "beta")

    with pytest.raises(StateError, match="expected the cycle t1, found none in the factory beta"):
        other.claim(opened)
    with pytest.raises(FencedError, match="found none"), journal.database.write() as connection:
        other.close_cycle(connection, opened, "rejected", decision={})

    assert journal.cycle("t1") == opened


def test_concurrent_openers_and_claimers_get_numbers_without_gaps(open_database: Callable[[], Database]) -> None:
    journals = [Journal(open_database(), "alpha") for _ in range(4)]
    attempts: list[int] = []
    openings: list[Cycle] = []

    def work(journal: Journal, at: int) -> None:
        for turn in range(4):
            journal.open_cycle(f"own-{at}-{turn}", recipe={}, bound=BOUND)
            openings.append(journal.open_cycle(f"shared-{turn}", recipe={"by": at}, bound=BOUND))
            attempts.append(journal.claim(openings[-1]).attempt)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(journals, range(4), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [cycle.number for cycle in journals[0].cycles()] == list(range(1, 21))
    assert sorted(attempts) == sorted([1, 2, 3, 4] * 4)
    for turn in range(4):
        recipes = [cycle.recipe["by"] for cycle in openings if cycle.trigger == f"shared-{turn}"]
        assert len(recipes) == 4
        assert len(set(recipes)) == 1


def test_factories_in_one_database_do_not_see_one_another(journal: Journal) -> None:
    beta = Journal(journal.database, "beta")
    mine = journal.claim(journal.open_cycle("t1", recipe={"of": "alpha"}, bound=BOUND))
    with journal.database.write() as connection:
        journal.audit_within(connection, "tested", subject="alpha", detail={})

    assert beta.cycle("t1") is None
    assert (beta.cycles(), beta.events(), beta.audited().lines) == ([], [], [])

    theirs = beta.open_cycle("t1", recipe={"of": "beta"}, bound=BOUND)
    claimed = beta.claim(beta.claim(theirs))
    with beta.database.write() as connection:
        beta.close_cycle(connection, claimed, "failed", decision={})

    assert theirs.number == 1
    assert journal.cycle("t1") == mine
    assert [event.event for event in journal.events()] == ["cycle_begun"]


def test_events_come_back_in_order_as_they_were_written(journal: Journal) -> None:
    journal.write(
        "tokenized",
        cycle="t1",
        attempt=1,
        subject="tokens/1",
        detail={"rows": 3, "text": "ä\n"},
        seconds=1.5,
        joules=2.5,
        joules_source="estimate",
    )
    journal.write("trained", cycle="t2")
    Journal(journal.database, "alpha").write("trained", cycle="t1")

    events = journal.events()

    assert [event.event for event in events] == ["tokenized", "trained", "trained"]
    assert [event.seq for event in events] == sorted({event.seq for event in events})
    assert (events[0].detail, events[0].seconds, events[0].joules) == ({"rows": 3, "text": "ä\n"}, 1.5, 2.5)
    assert (events[0].at, events[0].key_id, events[2].key_id) == (1_000.0, "key-1", ANONYMOUS)
    assert [event.event for event in journal.events(cycle="t1")] == ["tokenized", "trained"]
    assert [event.trigger for event in journal.events(event="trained")] == ["t2", "t1"]
