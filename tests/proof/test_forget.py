"""Rows that are forgotten: no byte of them stays, what saw them is gone, and the proof says so."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from here_loops import here, rows_of, rows_that_train, tiny_config, train_here
from leftovers import left_of, needles, texts_of
from mortal import Death, mortal

from aifactory import Factory
from aifactory.cluster.tasks import run_here
from aifactory.errors import ConfigError, ErasedError, StateError
from aifactory.proof.forget import Forgotten
from aifactory.proof.verify import Verification, verify_release
from aifactory.proof.where import parse_where
from aifactory.records.artifacts import Model
from aifactory.records.tables import erasure_keys

Copy = Callable[..., Factory]
USER = "user-7-1"


def verified(factory: Factory, release: str, *, from_scratch: bool = False) -> Verification:
    return verify_release(
        factory.books, release, run_tasks=lambda: run_here, from_scratch=from_scratch, train_work=train_here
    )


def test_a_dry_run_names_everything_and_changes_nothing(copied: Copy) -> None:
    factory = copied()
    root = Path(factory.books.storage.root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and "state.db" not in path.name}
    counts = factory.books.feedback.counts()

    told = factory.forget(f'user = "{USER}"', dry_run=True)

    assert (told.dry_run, told.proof, told.releases, told.starts_from) == (True, None, ["small-r2"], "small-r1")
    assert told.tokenizers == []
    assert told.places["feedback"] == len(texts_of(factory, USER)) // 2 > 0
    assert told.places["batches"] == told.places["feedback"]
    assert told.places["corpora"] + told.places.get("holdouts", 0) == told.places["feedback"]
    assert told.places["token sets"] == told.places["corpora"]
    assert {path: path.read_bytes() for path in before} == before
    assert factory.books.feedback.counts() == counts
    assert factory.books.erasures.all() == []


# ── what a user said, forgotten once ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Done:
    """A loop of which one user was forgotten."""

    folder: Path
    would: Forgotten
    told: Forgotten
    wanted: list[str]
    before: list[tuple[str, str]]
    others: set[str]
    completion: str

    @property
    def root(self) -> Path:
        return self.folder / "storage" / "small"


def with_secret(factory: Factory) -> Factory:
    """With a known secret of the keyed hashes, two copies of a loop come to the same artifacts."""
    with factory.books.database.write() as connection:
        connection.execute(erasure_keys.insert().values(factory="small", secret="5a" * 32, made_at=0.0))
    return factory


@pytest.fixture(scope="module")
def done(turned_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("forgotten") / "copied"
    shutil.copytree(turned_folder, folder)
    factory = with_secret(here(tiny_config(folder)))
    root = Path(factory.books.storage.root)
    wanted = needles(factory, USER)
    said = factory.books.feedback.corrections()
    would = factory.forget(f'user = "{USER}"', dry_run=True)
    before = left_of(root, wanted)
    told = factory.forget(f'user = "{USER}"')
    factory.close()
    return Done(
        folder=folder,
        would=would,
        told=told,
        wanted=wanted,
        before=before,
        others={c.user for c in said} - {USER},
        completion=next(c.completion for c in said if c.user != USER),
    )


@pytest.fixture
def after(done: Done) -> Iterator[Factory]:
    """The factory of that loop, to be read."""
    factory = here(tiny_config(done.folder))
    yield factory
    factory.close()


@pytest.mark.slow
def test_no_byte_of_what_a_user_said_is_left(done: Done) -> None:
    places = {Path(where.split()[0]).relative_to(done.root).parts[0] for where, _ in done.before}
    assert {"batch", "corpus", "parts", "tokens", "state.db"} <= places

    assert (done.told.left, done.told.holds) == ([], True)
    assert left_of(done.root, [*done.wanted, USER]) == []
    counted = {place: count for place, count in done.would.places.items() if place != "journal"}
    assert {place: done.told.places[place] for place in counted} == counted


@pytest.mark.slow
def test_the_release_that_saw_it_is_withdrawn_and_a_successor_serves(done: Done, after: Factory) -> None:
    books = after.books
    assert (done.told.releases, done.told.starts_from, done.told.successor) == (["small-r2"], "small-r1", "small-r3")
    production = books.registry.production()
    assert production is not None and production.name == "small-r3"
    assert {c.user for c in books.feedback.corrections()} == done.others
    model = books.artifacts.get(Model, production.model)
    assert books.registry.named("small-r1").model in model.record.inputs
    withdrawn = books.registry.named("small-r2")
    assert withdrawn.withdrawn == done.told.erasure
    with pytest.raises(ErasedError, match=str(done.told.erasure)):
        books.artifacts.get(Model, withdrawn.model)
    assert not (done.root / "runs" / f"train-{withdrawn.model.partition('/')[2]}").exists()
    assert any("superiority" in reason for reason in done.told.reasons)
    assert books.journal.audited().faults == []


@pytest.mark.slow
def test_nobody_goes_back_to_a_release_that_was_withdrawn(after: Factory) -> None:
    with pytest.raises(StateError, match="whose model is gone: erased by"):
        after.rollback(to=2)
    current = after.books.registry.production()
    assert current is not None
    with after.books.database.read() as connection:
        assert after.books.registry._before(connection, "production", current.number) == 1


@pytest.mark.slow
def test_what_can_be_asked_of_an_erased_release_is_answered(done: Done, after: Factory) -> None:
    report = verify_release(after.books, "small-r2", run_tasks=lambda: run_here, train_work=train_here)
    assert (report.verdict, report.reason.partition(" (")[0]) == ("not rebuildable", f"erased by {done.told.erasure}")
    assert verify_release(after.books, "small-r1", run_tasks=lambda: run_here, train_work=train_here).holds

    story = after.explain("2")
    (erased,) = [corpus for corpus in story.corpora if corpus.erased_by]
    assert (erased.erased_by, erased.erased_rows) == (done.told.erasure, done.told.places["batches"])
    assert f"erased by {done.told.erasure}, what is left is {erased.left}" in "\n".join(story.lines())
    successor = after.explain("small-r3")
    assert successor.why_begun == ["the release in production had learnt from rows that were erased"]
    assert erased.left in [corpus.id for corpus in successor.corpora]

    row = rows_that_train(after, str(erased.left))[0]
    trace = after.trace(row["text"], release="small-r2")
    assert row["id"] in [each.id for each in trace.rows]
    assert trace.origin is not None
    assert (trace.origin.model, trace.origin.recipe) == (after.books.registry.named("small-r2").model, None)
    assert str(erased.left) in trace.origin.rows
    assert [line for line in trace.lines() if line.startswith("Erased: ") and str(done.told.erasure) in line]
    assert "(erased)" in "\n".join(after.lineage("small-r2").lines())
    assert after.lineage(done.completion).parents
    assert after.status().production == "small-r3"


@pytest.mark.slow
def test_the_successor_is_made_again_from_what_is_left_and_nobody_makes_that(done: Done, after: Factory) -> None:
    (left,) = [erased for erased in after.books.journal.erased().values() if str(erased).startswith("corpus/")]

    report, whole = (verified(after, "small-r3", from_scratch=each) for each in (False, True))

    for found in (report, whole):
        assert (found.verdict, found.reason) == ("equal", ""), found.lines()
        assert {check.id: check.how for check in found.checks if check.left_by} == {left: "taken"}
        assert f"  left     {left}: {done.told.erasure} erased rows of what it was made from" in "\n".join(
            found.lines()
        )
    assert {check.left_by for check in whole.checks} == {None, done.told.erasure}
    model = after.books.registry.named("small-r3").model
    assert [check.how for check in report.checks if check.id == model] == ["rebuilt"]
    first = after.books.registry.named("small-r1").model
    assert {found.from_scratch: _how(found, first) for found in (report, whole)} == {False: "taken", True: "rebuilt"}


def _how(found: Verification, artifact: str) -> str:
    return next(check.how for check in found.checks if check.id == artifact)


@pytest.mark.slow
def test_what_is_left_must_be_what_the_erasure_has_noted(done: Done, tmp_path: Path) -> None:
    folder = tmp_path / "copied"
    shutil.copytree(done.folder, folder)
    factory = here(tiny_config(folder))
    books = factory.books
    (old,) = [each for each in books.journal.erased() if each.startswith("corpus/")]
    with books.database.write(serialize=True) as connection:
        told = {"successor": "corpus/0000000000000000", "successor_digest": "0" * 64}
        books.erasures.note(connection, str(done.told.erasure), "artifacts", old, value=told)

    report = verified(factory, "small-r3")

    assert report.verdict == "differs"
    assert f"says that it is what an erasure left of {old}" in report.reason
    assert "the books say corpus/0000000000000000 with digest 0000000000000000" in report.reason
    factory.close()


@pytest.mark.slow
def test_a_model_that_never_saw_the_rows_is_made_again_and_what_did_see_them_names_the_proof(copied: Copy) -> None:
    factory = copied()
    books = factory.books
    corpus = books.journal.corpora()[-1]
    held_out = rows_of(factory, corpus, "holdout")
    card = str(books.registry.named("small-r2").scorecard)
    scored = pq.read_table(Path(books.storage.path(*card.split("/"))) / "examples.parquet")["row"].to_pylist()
    row = next(row for row in held_out if row["id"] in scored)

    told = factory.forget(f"key = {row['key']}")
    report = verified(factory, "small-r2")

    assert (told.releases, told.holds) == ([], True)
    assert (report.verdict, report.reason) == ("not rebuildable", f"erased by {told.erasure} ({card})")
    assert all(check.is_equal for check in report.checks)
    assert _how(report, books.registry.named("small-r2").model) == "rebuilt"
    (tokens,) = [check for check in report.checks if check.left_by and check.id.startswith("tokens/")]
    assert (tokens.how, tokens.left_by) == ("taken", told.erasure)


@pytest.mark.slow
def test_the_proof_of_a_retrain_holds(done: Done, after: Factory) -> None:
    check = after.check_forgotten(str(done.told.proof))
    assert check.faults == [], check.lines()
    assert "small-r2 is withdrawn" in check.checked
    proof = json.loads(Path(str(done.told.proof)).read_text(encoding="utf-8"))
    assert proof["successor"]["release"] == "small-r3"
    assert list(proof["releases"]) == ["small-r2"]
    assert after.forget(f'user = "{USER}"').lines() == [
        f"No row is meant by that; nothing was erased. What was there before fell to {done.told.erasure}."
    ]


@pytest.mark.slow
def test_nothing_is_decided_anew_after_it(after: Factory) -> None:
    decision = after.look()
    assert decision.to_json()["decision"] == "wait"
    known = after.books.journal.erased()
    assert (
        not {
            batch
            for cycle in after.books.journal.cycles()
            if cycle.bound.kind == "forget"
            for batch in cycle.bound.batches
        }
        & known.keys()
    )


# ── rows that a first release was trained on ──────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_where_every_release_saw_them_training_starts_from_the_base_and_what_the_gate_refuses_does_not_serve(
    copied: Copy,
) -> None:
    """So small a model from the base does not pass the gate of a loop that has feedback; the rows are gone all the same."""
    factory = copied()
    corpus = factory.books.journal.corpora()[0]
    row = rows_that_train(factory, corpus)[0]
    old = factory.books.registry.production()
    assert old is not None
    shutil.rmtree(Path(factory.config.ingest.sources[0].path))  # type: ignore[union-attr]

    told = factory.forget(f"key = {row['key']}")

    assert (told.releases, told.starts_from, len(told.tokenizers)) == (["small-r1", "small-r2"], "base", 1)
    assert told.successor is None
    (why,) = told.left
    assert why.startswith(f"{old.name} still serves: its successor was refused (")
    assert "failed: integrity" in why
    assert factory.books.registry.production() == old
    (cycle,) = [each for each in factory.books.journal.cycles() if each.bound.kind == "forget"]
    assert (cycle.state, cycle.bound.parent) == ("rejected", None)
    factory.books.close()
    # So long that no other document says the same by chance.
    said = [row["text"][at : at + 400] for at in range(0, len(row["text"]) - 400, 100)]
    assert said and left_of(Path(factory.books.storage.root), said) == []


# ── killed ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_killed_at_one_write_after_another_it_comes_to_the_same_end(copied: Copy, done: Done) -> None:
    """The n-th attempt dies with its n-th write. Each write by itself: see test_erasing.py."""
    factory = with_secret(copied())
    deaths = 0
    while True:
        deaths += 1
        try:
            told = mortal(factory, deaths, after_commit=deaths % 2 == 0).forget(f'user = "{USER}"')
            break
        except Death:
            factory.close()
            factory = copied()

    assert deaths > 8
    assert_same_end(factory, told, done)


@pytest.mark.slow
def test_killed_by_the_system_amid_a_deletion_it_goes_on(copied: Copy, done: Done) -> None:
    factory = with_secret(copied())
    folder = Path(factory.books.storage.root).parent.parent
    factory.close()
    code = """
import os, signal, sys
from pathlib import Path
from here_loops import here, tiny_config
from aifactory.records.storage import Storage
delete_file, left = Storage.delete_file, [int(sys.argv[2])]
def dying(self, *parts):
    delete_file(self, *parts)
    left[0] -= parts[-1] == "record.json"
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
Storage.delete_file = dying
here(tiny_config(Path(sys.argv[1]))).forget('user = "' + sys.argv[3] + '"')
"""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    for number in (1, 2):
        command = [sys.executable, "-c", code, str(folder), str(number), USER]
        ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, timeout=300)
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]

    factory = copied()
    assert_same_end(factory, factory.forget(f'user = "{USER}"'), done)


def assert_same_end(factory: Factory, told: Forgotten, done: Done) -> None:
    assert told.left == [], told.lines()
    counted = {place for place in done.told.places if place not in ("journal", "parts")}
    assert {place: told.places[place] for place in counted} == {place: done.told.places[place] for place in counted}
    assert (told.erasure, told.successor, told.releases) == (done.told.erasure, "small-r3", ["small-r2"])
    production = factory.books.registry.production()
    with_all = here(tiny_config(done.folder))
    expected = with_all.books.registry.production()
    assert production is not None and expected is not None
    assert production.model == expected.model
    assert (
        factory.books.artifacts.get(Model, production.model).digest
        == with_all.books.artifacts.get(Model, expected.model).digest
    )
    with_all.close()
    assert factory.check_forgotten(str(told.erasure)).faults == []
    factory.books.close()
    assert left_of(Path(factory.books.storage.root), [*done.wanted, USER]) == []


# ── what is meant ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_conditions_have_one_form() -> None:
    assert str(parse_where('user = "a b" and source=x')) == str(parse_where("source = 'x' AND user='a b'"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected --where as FIELD = VALUE"),
        ("usr = a", "did you mean user?"),
        ("colour = a", "fields: user, key, source, label, id"),
        ("user", "expected --where as FIELD = VALUE"),
        ("user = a b", "found 'b' after a condition"),
        ("user = a or user = b", "found 'or user = b' after a condition"),
        ("user = a and", "'the end' is none"),
        ("user = a and user = b", "one value of user"),
        ('user = ""', "expected a value of user"),
        ("user != a", "expected --where as FIELD = VALUE"),
    ],
)
def test_what_is_no_condition_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as found:
        parse_where(text)
    assert said in str(found.value)
