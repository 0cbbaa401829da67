"""Laws of backup and restore: what was lost is as it was, on SQLite and PostgreSQL, and what was erased stays erased."""

from __future__ import annotations

import gzip
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from here_loops import here, tiny_config
from kept_books import publish, say
from leftovers import left_of, needles

from aifactory import Factory
from aifactory.errors import ConfigError, StateError, StorageError
from aifactory.records.database import SCHEMA_HEAD, Database
from aifactory.records.feedback import Completion, Feedback, FeedbackLog
from aifactory.records.journal import Journal
from aifactory.records.tables import feedback, metadata, scores
from aifactory.upkeep import recovery
from aifactory.upkeep.backup import snapshots
from aifactory.upkeep.snapshot import put, take

Copy = Callable[..., Factory]
Again = Callable[..., Factory]
USER = "user-7-1"


def rows_of(factory: Factory) -> dict[str, list[dict[str, Any]]]:
    """All that the database holds of a factory, but for lines that tell of backups themselves."""
    found = {}
    told = ("backed_up", "recovered", "backup", "restore_backup")
    with factory.books.database.read() as connection:
        for table in metadata.sorted_tables:
            query = sa.select(table).order_by(*table.primary_key.columns)
            rows = [dict(row) for row in connection.execute(query).mappings()]
            found[table.name] = [row for row in rows if row.get("event") not in told and row.get("action") not in told]
    return found


def artifacts_of(factory: Factory) -> dict[str, bytes]:
    root = Path(factory.books.storage.root)
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for kind in ("batch", "corpus", "tokens", "model", "scorecard", "files", "proofs", "listing")
        for path in sorted((root / kind).rglob("*"))
        if path.is_file()
    }


@pytest.fixture(params=["sqlite", "postgresql"])
def kept(request: pytest.FixtureRequest, factory: Factory, again: Again) -> Factory:
    """A factory of two releases, on each of the databases."""
    if request.param == "sqlite":
        return factory
    url = str(request.getfixturevalue("postgres_url"))
    with Database(url).write_at(SCHEMA_HEAD) as connection:
        put(connection, {file.table: file.data for file in take(factory.books.database, "small")})
    factory.close()
    Path(factory.books.storage.path("state.db")).unlink()
    return again(url)


def lose(factory: Factory) -> None:
    """Database and storage are gone, as with their disk."""
    factory.close()
    shutil.rmtree(factory.books.storage.root)
    if not factory.books.database.is_sqlite:
        with factory.books.database.engine.begin() as connection:
            connection.execute(sa.text("DROP SCHEMA public CASCADE"))
            connection.execute(sa.text("CREATE SCHEMA public"))
        factory.close()


def test_what_was_lost_is_as_it_was_and_goes_on(kept: Factory, again: Again, tmp_path: Path) -> None:
    factory, target = kept, str(tmp_path / "backup")
    rows, files = rows_of(factory), artifacts_of(factory)
    taken = factory.backup(target)
    lose(factory)
    back = again(factory.config.runtime.state_url)

    told = back.recover(target)

    assert told.holds
    assert told.artifacts == taken.artifacts == 9
    assert rows_of(back) == rows
    assert artifacts_of(back) == files
    assert back.audit().holds
    assert back.lineage("small-r2").parents
    # It goes on: numbers that count up begin after what was brought back.
    say(back.books, range(100, 140))
    assert back.books.feedback.seal(batch_rows=30, batch_after_s=None) == len(rows["batches"]) + 1
    assert back.books.feedback.counts()["feedback"] == len(rows["feedback"]) + 40


def test_a_second_backup_copies_only_what_is_new_and_the_same_rows_are_the_same_bytes(
    factory: Factory, tmp_path: Path
) -> None:
    target = str(tmp_path / "backup")
    first = factory.backup(target)
    second = factory.backup(target)

    assert first.copied == first.artifacts
    assert (second.copied, second.copied_bytes) == (0, 0)
    older, newer = snapshots(factory.books.storage.__class__(f"{target}/small"))
    unchanged = [name for name in older.tables if name not in ("journal", "audit")]
    assert {name: older.tables[name] for name in unchanged} == {name: newer.tables[name] for name in unchanged}

    publish(factory.books, "batch", "batch 2", ())
    third = factory.backup(target, keep=2)
    assert third.copied == 1
    assert any("2 newer ones are kept" in line for line in third.purged)
    assert len(snapshots(factory.books.storage.__class__(f"{target}/small"))) == 2


def test_only_the_storage_lost_the_database_stays_and_only_the_database_lost_the_artifacts_stay(
    factory: Factory, again: Again, tmp_path: Path
) -> None:
    target = str(tmp_path / "backup")
    files, rows = artifacts_of(factory), rows_of(factory)
    factory.backup(target)
    for kind in ("model", "corpus"):
        shutil.rmtree(factory.books.storage.path(kind))
    damaged = next(iter(sorted(Path(factory.books.storage.path("tokens")).rglob("rows"))))
    damaged.write_bytes(damaged.read_bytes()[:-1])

    told = factory.recover(target)

    assert told.rows is None
    assert told.artifacts_there > 0
    assert artifacts_of(factory) == files

    factory.close()
    for file in Path(factory.books.storage.root).glob("state.db*"):
        file.unlink()
    back = again()
    told = back.recover(target)
    assert told.rows
    assert told.artifacts == 0
    assert {name: found for name, found in rows_of(back).items() if name not in ("journal", "audit")} == {
        name: found for name, found in rows.items() if name not in ("journal", "audit")
    }


original = recovery.copy_artifact


def test_a_restore_that_was_killed_is_run_again(
    factory: Factory, again: Again, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = str(tmp_path / "backup")
    rows, files = rows_of(factory), artifacts_of(factory)
    factory.backup(target)
    lose(factory)
    for number in (1, 4):
        left = [number]

        def copy(*arguments: Any, left: list[int] = left) -> int | None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return original(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(recovery, "copy_artifact", copy)
            with pytest.raises(KeyboardInterrupt):
                again().recover(target)
        assert not Path(factory.books.storage.path("state.db")).exists(), "rows come last"
    back = again()

    assert back.recover(target).holds

    assert (rows_of(back), artifacts_of(back)) == (rows, files)


@pytest.mark.slow
def test_rows_that_were_erased_after_the_backup_do_not_come_back(copied: Copy, tmp_path: Path) -> None:
    factory, target = copied(), str(tmp_path / "backup")
    wanted = needles(factory, USER)
    factory.backup(target)
    older = shutil.copytree(target, tmp_path / "older")
    assert left_of_rows(Path(target), wanted), "the backup holds them"

    proof = factory.forget(f'user = "{USER}"')
    assert proof.holds
    assert any(f"the backup in {target}" in place for place in proof.outside)
    with pytest.raises(StateError, match="would bring them back"):
        factory.recover(target)  # the database is there, and knows
    taken = factory.backup(target)

    assert any("erased" in line for line in taken.purged)
    assert left_of(Path(target), wanted) == []
    assert left_of_rows(Path(target), wanted) == []
    lose(factory)
    again = here(tiny_config(tmp_path / "copied"))
    assert again.recover(target).holds
    assert left_of(Path(again.books.storage.root), wanted) == []
    assert again.check_forgotten(str(proof.erasure)).holds
    again.close()

    # Only the proof is left of what knew of it: that is enough.
    lose(again)
    proofs = Path(target) / "small" / "proofs"
    shutil.copytree(proofs, Path(factory.books.storage.root) / "proofs")
    once_more = here(tiny_config(tmp_path / "copied"))
    with pytest.raises(StateError, match="a proof in the storage root"):
        once_more.recover(str(older))
    assert not Path(once_more.books.storage.path("state.db")).exists()
    once_more.close()


def left_of_rows(backup: Path, wanted: list[str]) -> list[str]:
    """What the snapshots of a backup hold of them."""
    said = [gzip.decompress(file.read_bytes()).decode() for file in backup.rglob("*.jsonl.gz")]
    return [text for text in wanted for each in said if text in each or json.dumps(text)[1:-1] in each]


def test_a_snapshot_that_knows_less_of_erasures_than_anything_that_is_left_is_refused(
    factory: Factory, again: Again, tmp_path: Path
) -> None:
    target = str(tmp_path / "backup")
    factory.backup(target)
    lose(factory)
    back = again()
    back.books.storage.write_bytes(b"{}", "proofs", "forget-0123.json")

    with pytest.raises(StateError, match=r"forget-0123 \(a proof in the storage root\) had ended"):
        back.recover(target)

    assert not Path(back.books.storage.path("state.db")).exists()
    assert back.books.storage.names("model") == []


def test_no_backup_is_taken_while_an_erasure_is_under_way(factory: Factory, tmp_path: Path) -> None:
    factory.books.erasures.begin('user = "somebody"')

    with pytest.raises(StateError, match="being erased"):
        factory.backup(str(tmp_path / "backup"))


def test_a_database_of_another_history_is_left_alone(factory: Factory, again: Again, tmp_path: Path) -> None:
    target = str(tmp_path / "backup")
    factory.backup(target)
    factory.close()
    for file in Path(factory.books.storage.root).glob("state.db*"):
        file.unlink()
    other = again()
    with other.books.database.write(serialize=True) as connection:
        other.books.journal.write_within(connection, "begun_anew")
        other.books.journal.audit_within(connection, "begun", subject="small", detail={})

    with pytest.raises(StateError, match="found others"):
        other.recover(target)

    assert [event.event for event in other.books.journal.events()] == ["begun_anew"]


def test_rows_of_several_factories_share_a_database_and_keep_their_own_numbers(
    factory: Factory, again: Again, postgres_url: str
) -> None:
    with factory.books.database.write() as connection:  # scores refer to feedback by its number
        (first,) = connection.scalars(sa.select(sa.func.min(feedback.c.seq)))
        values = {
            "factory": "small",
            "feedback": first,
            "metric": "bits",
            "release": 1,
            "value": 2.5,
            "weight": 8.0,
            "at": 1.0,
        }
        connection.execute(scores.insert().values(**values))
    files = {file.table: file.data for file in take(factory.books.database, "small")}
    database = Database(postgres_url)
    neighbour = Journal(database, "neighbour")
    neighbours = FeedbackLog(neighbour)
    for number in range(5):
        neighbour.write("before", detail={"number": number})
        neighbours.log_completion(answer(f"theirs-{number}"))
        neighbours.record(Feedback(idempotency_key=f"theirs-{number}", completion=f"theirs-{number}", score=1.0))

    with database.write(serialize=True) as connection:
        put(connection, files)

    neighbour.write("after")
    neighbours.log_completion(answer("theirs-9"))
    assert neighbours.record(Feedback(idempotency_key="theirs-9", completion="theirs-9", score=1.0))
    moved = again(postgres_url)
    told, theirs = rows_of(factory), rows_of(moved)
    mine = [row for row in theirs["journal"] if row["factory"] == "small"]
    assert [row["event"] for row in mine] == [row["event"] for row in told["journal"]]
    by_number = {row["seq"]: (row["factory"], row["idempotency_key"]) for row in theirs["feedback"]}
    before = {row["seq"]: row["idempotency_key"] for row in told["feedback"]}
    (score,) = theirs["scores"]
    assert by_number[score["feedback"]] == ("small", before[first])
    assert moved.audit().holds
    database.close()


def answer(name: str) -> Completion:
    return Completion(
        id=name, release=1, prompt="?", answer="!", request="{}", finish_reason="stop", prompt_tokens=1, answer_tokens=1
    )


def test_a_snapshot_of_an_older_schema_is_put_into_that_and_migrated(tmp_path: Path) -> None:
    old = Database(f"sqlite:///{tmp_path / 'old.db'}")
    row = {
        "factory": "small",
        "at": 5.0,
        "key_id": "anonymous",
        "action": "promote",
        "subject": "small-r1",
        "detail": "{}",
    }
    with old.write_at("0004") as connection:
        there = sa.MetaData()
        there.reflect(connection)
        connection.execute(there.tables["audit"].insert().values(seq=1, **row))
    assert old.version() == "0004"
    new = Database(f"sqlite:///{tmp_path / 'new.db'}")
    with new.write_at("0004") as connection:
        assert put(connection, {"audit": gzip.compress(json.dumps({"seq": 1, **row}).encode() + b"\n")}) == 1
    old.close()

    with new.read() as connection:
        chained = connection.execute(sa.select(metadata.tables["audit"])).mappings().all()
    assert new.version() == SCHEMA_HEAD
    assert [line["action"] for line in chained] == ["promote", "chain_begun"]
    new.close()


def test_a_backup_that_was_changed_is_refused_before_anything_is_written(
    factory: Factory, again: Again, tmp_path: Path
) -> None:
    target = tmp_path / "backup"
    name = factory.backup(str(target)).snapshot
    lose(factory)
    back = again()
    table = target / "small" / "snapshots" / name / "feedback.jsonl.gz"
    whole = table.read_bytes()
    table.write_bytes(whole[:-1] + b"x")
    with pytest.raises(StorageError, match="it changed"):
        back.recover(str(target))
    table.write_bytes(whole)
    told = target / "small" / "snapshots" / f"{name}.json"
    text = told.read_text()
    told.write_text(text.replace('"erasures": []', '"erasures": ["forget-0"]'))
    with pytest.raises(StorageError, match="found it changed"):
        back.recover(str(target))
    told.write_text(text)
    weights = next(iter(sorted(target.rglob("model.safetensors"))))
    data = weights.read_bytes()
    weights.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(StorageError, match="as its record says"):
        back.recover(str(target))
    assert not Path(back.books.storage.path("state.db")).exists()


def test_a_target_inside_the_storage_root_and_a_backup_that_is_not_there_are_refused(
    factory: Factory, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="outside the storage root"):
        factory.backup(factory.books.storage.path("backup"))
    with pytest.raises(StorageError, match="found none"):
        factory.recover(str(tmp_path / "nothing"))


def test_the_snapshot_sees_one_moment_though_feedback_arrives_meanwhile(kept: Factory) -> None:
    factory = kept
    before = factory.books.feedback.counts()["feedback"]
    files = take(factory.books.database, "small")
    first = next(files)
    say(factory.books, range(100, 110))

    counted = {file.table: file.num_rows for file in [first, *files]}

    assert counted["feedback"] == before < factory.books.feedback.counts()["feedback"]


def test_every_table_is_in_a_snapshot_and_every_reference_by_number_is_known(tmp_path: Path) -> None:
    """A table that a migration adds is in the backup by itself; one that refers to another's numbers must be named."""
    from aifactory.records.tables import _sequence
    from aifactory.upkeep.snapshot import _REFERS_TO

    database = Database(f"sqlite:///{tmp_path / 'state.db'}")
    assert {file.table for file in take(database, "small")} == set(metadata.tables)
    database.close()
    refer = {
        (table.name, column.name)
        for table in metadata.sorted_tables
        for column in table.columns
        if column.type is _sequence and column.name != "seq"
    }
    assert refer == set(_REFERS_TO)
    with sqlite3.connect(tmp_path / "state.db") as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert tables - {"alembic_version", "sqlite_sequence"} == set(metadata.tables)
