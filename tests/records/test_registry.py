"""python -m pytest tests/records/test_registry.py"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from aifactory.errors import FencedError, StateError
from aifactory.records.database import Database
from aifactory.records.journal import Bound, Cycle, Journal
from aifactory.records.registry import Registry
from aifactory.records.tables import metadata

Begin = Callable[..., Cycle]


def promote(registry: Registry, cycle: Cycle) -> int:
    release = registry.promote(
        cycle, model=f"model/{cycle.trigger}", scorecard=f"scorecard/{cycle.trigger}", decision={"reasons": ["better"]}
    )
    return release.number


def everything(database: Database) -> Mapping[str, list[Any]]:
    with database.read() as connection:
        return {table.name: sorted(map(repr, connection.execute(sa.select(table)))) for table in metadata.sorted_tables}


@pytest.fixture
def registry(journal: Journal) -> Registry:
    return Registry(journal)


def test_a_promotion_makes_a_release_and_serves_it(registry: Registry, begin: Begin) -> None:
    assert registry.production() is None

    promote(registry, begin("t1"))

    release = registry.production()
    assert release is not None
    assert (release.number, release.name) == (1, "alpha-r1")
    assert (release.model, release.scorecard) == ("model/t1", "scorecard/t1")
    assert registry.release(1) == release
    assert registry.releases() == [release]
    assert registry.release(2) is None
    assert [e.event for e in registry.journal.events()] == ["cycle_begun", "cycle_ended", "promoted"]
    assert [(a.action, a.subject, a.key_id) for a in registry.journal.audited().lines] == [
        ("promote", "alpha-r1", "key-1")
    ]


def test_the_fingerprint_of_a_release_changes_with_its_model_alone(registry: Registry, begin: Begin) -> None:
    first = registry.promote(begin("t1"), model="model/0123456789abcdef", scorecard="scorecard/1", decision={})
    same = registry.promote(begin("t2", 1), model="model/0123456789abcdef", scorecard="scorecard/2", decision={})
    other = registry.promote(begin("t3", 2), model="model/fedcba9876543210", scorecard="scorecard/2", decision={})

    assert first.fingerprint == same.fingerprint == "fp_0123456789ab"
    assert other.fingerprint != same.fingerprint


def test_promote_swaps_only_the_release_with_which_it_was_compared(registry: Registry, begin: Begin) -> None:
    promote(registry, begin("t1"))
    slow, fast = begin("t2", 1), begin("t3", 1)
    promote(registry, fast)
    before = everything(registry.database)

    with pytest.raises(StateError, match=r"expected release 1 on the channel production.*found 2. Begin a new"):
        promote(registry, slow)

    assert everything(registry.database) == before
    assert registry.journal.cycle("t2") == slow
    assert slow.state == "running"


def test_a_first_promotion_fails_where_another_came_first(registry: Registry, begin: Begin) -> None:
    slow = begin("t1")
    promote(registry, begin("t2"))

    with pytest.raises(StateError, match="expected release None"):
        promote(registry, slow)

    assert [release.trigger for release in registry.releases()] == ["t2"]


def test_an_older_attempt_can_neither_promote_nor_reject(registry: Registry, begin: Begin) -> None:
    older = begin("t1")
    newer = registry.journal.claim(older)
    before = everything(registry.database)

    with pytest.raises(FencedError):
        promote(registry, older)
    with pytest.raises(FencedError):
        registry.reject(older, scorecard="scorecard/1", decision={})

    assert everything(registry.database) == before
    assert promote(registry, newer) == 1


def test_an_older_attempt_learns_that_it_is_fenced_also_after_the_newer_one_promoted(
    registry: Registry, begin: Begin
) -> None:
    older = begin("t1")
    promote(registry, registry.journal.claim(older))

    with pytest.raises(FencedError):
        promote(registry, older)


def test_a_cycle_gives_one_release(registry: Registry, begin: Begin) -> None:
    cycle = begin("t1")
    promote(registry, cycle)
    before = everything(registry.database)

    for _ in range(2):
        with pytest.raises(FencedError):
            promote(registry, registry.journal.claim(cycle))

    assert everything(registry.database) == before


def test_concurrent_promotions_of_one_cycle_give_one_release(open_database: Callable[[], Database]) -> None:
    registries = [Registry(Journal(open_database(), "alpha")) for _ in range(4)]
    bound = Bound(kind="drift", sources_digest="0" * 64)
    cycle = registries[0].journal.claim(registries[0].journal.open_cycle("t1", recipe={}, bound=bound))
    outcomes: list[int | type] = []

    def work(registry: Registry) -> None:
        try:
            outcomes.append(promote(registry, cycle))
        except StateError as error:
            outcomes.append(type(error))

    threads = [threading.Thread(target=work, args=(registry,)) for registry in registries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(outcomes, key=str) == [1, FencedError, FencedError, FencedError]
    assert len(registries[0].promotions()) == 1


def test_concurrent_promotions_of_rival_cycles_let_one_through(open_database: Callable[[], Database]) -> None:
    registries = [Registry(Journal(open_database(), "alpha")) for _ in range(4)]
    bound = Bound(kind="drift", sources_digest="0" * 64)
    outcomes: list[int | type] = []

    def work(registry: Registry, trigger: str) -> None:
        cycle = registry.journal.claim(registry.journal.open_cycle(trigger, recipe={}, bound=bound))
        try:
            outcomes.append(promote(registry, cycle))
        except StateError as error:
            outcomes.append(type(error))

    threads = [threading.Thread(target=work, args=(r, f"t{at}")) for at, r in enumerate(registries)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(outcomes, key=str) == [1, StateError, StateError, StateError]
    assert [cycle.state for cycle in registries[0].journal.cycles()].count("running") == 3


def test_a_rejection_ends_the_cycle_without_a_release(registry: Registry, begin: Begin) -> None:
    registry.reject(begin("t1"), scorecard="scorecard/1", decision={"reasons": ["worse"]})

    cycle = registry.journal.cycle("t1")
    assert cycle is not None
    assert (cycle.state, cycle.decision) == ("rejected", {"reasons": ["worse"]})
    assert registry.production() is None
    assert registry.journal.events(event="rejected")[0].subject == "scorecard/1"


def test_a_rollback_is_a_new_promotion_and_is_audited(registry: Registry, begin: Begin) -> None:
    promote(registry, begin("t1"))
    promote(registry, begin("t2", 1))

    back = registry.rollback(reason="it swears")

    assert back.number == 1
    assert registry.production() == back
    assert [(p["number"], p["release"], p["previous"], p["action"]) for p in registry.promotions()] == [
        (1, 1, None, "promote"),
        (2, 2, 1, "promote"),
        (3, 1, 2, "rollback"),
    ]
    audited = registry.journal.audited().lines[-1]
    assert (audited.action, audited.subject) == ("rollback", "alpha-r1")
    assert audited.detail == {"channel": "production", "reason": "it swears"}
    assert registry.journal.events(event="rolled_back")[0].subject == "alpha-r1"


def test_another_rollback_goes_further_back_and_never_forward(registry: Registry, begin: Begin) -> None:
    for trigger, champion in (("t1", None), ("t2", 1), ("t3", 2)):
        promote(registry, begin(trigger, champion))

    assert registry.rollback(reason="bad").number == 2
    assert registry.rollback(reason="bad too").number == 1
    with pytest.raises(StateError, match="expected an older release to go back to, found None"):
        registry.rollback(reason="and again")

    assert registry.rollback(to=3, reason="it was not the model").number == 3


def test_a_rollback_skips_a_release_that_was_rolled_back(registry: Registry, begin: Begin) -> None:
    promote(registry, begin("t1"))
    promote(registry, begin("t2", 1))
    registry.rollback(reason="2 is bad")
    promote(registry, begin("t3", 1))

    assert registry.rollback(reason="3 is bad").number == 1


def test_a_rollback_to_what_is_not_there_is_refused(registry: Registry, begin: Begin) -> None:
    with pytest.raises(StateError, match="found none yet; run a cycle first"):
        registry.rollback(reason="")
    promote(registry, begin("t1"))
    before = everything(registry.database)

    for to in (None, 1, 7):
        with pytest.raises(StateError, match="the channel production serves 1"):
            registry.rollback(to=to, reason="")

    assert everything(registry.database) == before


def test_a_cycle_bound_before_a_rollback_is_not_promoted_after_it(registry: Registry, begin: Begin) -> None:
    promote(registry, begin("t1"))
    promote(registry, begin("t2", 1))
    slow = begin("t3", 2)
    registry.rollback(reason="bad")

    with pytest.raises(StateError, match=r"expected release 2 .* found 1"):
        promote(registry, slow)


@pytest.mark.parametrize("table", ["releases", "promotions", "journal", "audit"])
def test_a_promotion_with_all_its_records_is_one_transaction(registry: Registry, begin: Begin, table: str) -> None:
    cycle = begin("t1")
    refuse_inserts(registry.database, table)
    before = everything(registry.database)

    with pytest.raises((DBAPIError, StateError), match="refused by the test"):
        promote(registry, cycle)

    assert everything(registry.database) == before
    assert registry.production() is None
    assert registry.journal.cycle("t1") == cycle


def test_a_rollback_with_its_audit_is_one_transaction(registry: Registry, begin: Begin) -> None:
    promote(registry, begin("t1"))
    promote(registry, begin("t2", 1))
    refuse_inserts(registry.database, "audit")
    before = everything(registry.database)

    with pytest.raises((DBAPIError, StateError), match="refused by the test"):
        registry.rollback(reason="bad")

    assert everything(registry.database) == before


def refuse_inserts(database: Database, table: str) -> None:
    with database.write() as connection:
        if database.is_sqlite:
            connection.exec_driver_sql(
                f"CREATE TRIGGER refuse BEFORE INSERT ON {table} BEGIN SELECT RAISE(ABORT, 'refused by the test'); END"
            )
            return
        connection.exec_driver_sql(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'refused by the test'; END $$"
        )
        connection.exec_driver_sql(f"CREATE TRIGGER refuse BEFORE INSERT ON {table} EXECUTE FUNCTION refuse()")


def test_factories_in_one_database_do_not_serve_one_another(registry: Registry, begin: Begin) -> None:
    beta = Registry(Journal(registry.database, "beta"))
    promote(registry, begin("t1"))

    assert (beta.production(), beta.release(1), beta.releases(), beta.promotions()) == (None, None, [], [])
    with pytest.raises(StateError):
        beta.rollback(reason="")

    cycle = beta.journal.open_cycle("t1", recipe={}, bound=Bound(kind="run", sources_digest="0"))
    assert promote(beta, beta.journal.claim(cycle)) == 1
    assert registry.promotions()[-1]["number"] == 1
    assert len(registry.releases()) == 1


def test_channels_do_not_move_one_another(registry: Registry, begin: Begin) -> None:
    promote(registry, begin("t1"))

    registry.promote(begin("t2"), model="model/2", scorecard="scorecard/2", decision={}, channel="canary")

    production, canary = registry.production(), registry.production("canary")
    assert production is not None
    assert canary is not None
    assert (production.number, canary.number) == (1, 2)
