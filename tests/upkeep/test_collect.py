"""Laws of `aifactory gc`: what nobody needs goes, what anybody needs stays, whatever is killed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from here_loops import give_corrections
from kept_books import rejected_cycle
from mortal import Death, mortal

from aifactory import Factory
from aifactory.errors import FencedError, StateError
from aifactory.evaluate.gate import Reject
from aifactory.improve.evaluation import published_batches
from aifactory.records.artifacts import Model
from aifactory.records.journal import Bound
from aifactory.upkeep.collect import SETTLED_S
from aifactory.upkeep.needs import BY_KIND

Copy = Callable[..., Factory]


def files_of(factory: Factory) -> dict[str, bytes]:
    root = Path(factory.books.storage.root)
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.startswith("state.db")
    }


def really_rejected(copied: Copy) -> tuple[Factory, str]:
    """A factory whose third cycle was rejected, for its gate asks for more than there is: its model is no release's."""
    factory = copied(
        lambda config: config.model_copy(update={"promote": config.promote.model_copy(update={"min_tasks": 10_000})})
    )
    assert give_corrections(factory, range(6, 9), documents=range(6, 8), lie_from=3) == 2
    books = factory.books
    production = books.registry.production()
    assert production is not None
    batches = [batch.id for batch in published_batches(books)]
    books.journal.write(
        "decided", subject=production.name, detail={"decision": "retrain", "reasons": [], "batches": batches}
    )
    bound = Bound(
        kind="drift",
        sources_digest="",
        batches=batches,
        parent=production.model,
        champion=production.number,
        holdouts=books.journal.corpora(),
    )
    recipe = factory.config.recipe("evaluate", "promote", "train", "improve", "tokenize", "ingest")
    cycle = books.journal.open_cycle("drift-fedcba9876543210", recipe=recipe, bound=bound)
    assert isinstance(factory.turn(cycle), Reject)
    (trained,) = books.journal.events(event="trained", cycle=cycle.trigger)
    return factory, str(trained.subject)


def with_checkpoint(factory: Factory) -> str:
    """A checkpoint of the run of small-r1, as a worker leaves it behind that was killed after the export; where it lies."""
    release = factory.books.registry.releases()[0]
    place = ("runs", f"train-{release.model.partition('/')[2]}", "step-00000010")
    factory.books.storage.write_bytes(b"weights", *place, "part-0")
    factory.books.storage.write_bytes(b"{}", *place, "COMMITTED")
    return "/".join(place)


def test_a_factory_whose_cycles_all_became_releases_loses_only_its_checkpoints(factory: Factory) -> None:
    before = files_of(factory)
    checkpoint = with_checkpoint(factory)

    told = factory.gc()

    assert [(thing.what, thing.kind, thing.num_bytes) for thing in told.things] == [(checkpoint, "checkpoint", 9)]
    assert files_of(factory) == before
    assert factory.gc().things == []


def test_a_dry_run_says_the_same_with_bytes_and_reasons_and_changes_nothing(factory: Factory) -> None:
    model = rejected_cycle(factory.books)
    with_checkpoint(factory)
    before = files_of(factory)

    would = factory.gc(dry_run=True)

    assert files_of(factory) == before
    assert {"checkpoint", "model"} <= {thing.kind for thing in would.things}
    assert all(thing.reason for thing in would.things)
    told = factory.gc()
    assert told.things == would.things
    gone = {name: data for name, data in before.items() if name not in files_of(factory)}
    assert any(name.startswith(f"{model}/") for name in gone)
    assert told.num_bytes == sum(map(len, gone.values())) > 0


def test_what_has_a_second_name_counts_only_once_that_is_gone_too(factory: Factory) -> None:
    checkpoint = with_checkpoint(factory)
    factory.books.storage.duplicate([((*checkpoint.split("/"), "part-0"), ("parts", "cd", "cd" * 16, "rows"))])

    (thing,) = factory.gc(dry_run=True).things

    assert thing.num_bytes == len(b"{}")


@pytest.mark.slow
def test_the_model_of_a_rejected_cycle_goes_and_the_books_say_so(copied: Copy) -> None:
    factory, model = really_rejected(copied)

    told = factory.gc()

    assert model in [thing.what for thing in told.things]
    assert factory.books.artifacts.find(Model, model.partition("/")[2]) is None
    assert model in [event.subject for event in factory.books.journal.events(event="collected")]
    # What is left explains itself still, and goes on.
    cycle = factory.books.journal.cycles()[-1]
    assert factory.explain(cycle.trigger).lines()
    assert factory.status().lines()
    for release in factory.books.registry.releases():
        for artifact_id in (release.model, release.scorecard, *origins(factory, release.model)):
            noun, fingerprint = BY_KIND[artifact_id.partition("/")[0]], artifact_id.partition("/")[2]
            artifact = factory.books.artifacts.find(noun, fingerprint)
            assert artifact is not None
            sizes = factory.books.storage.sizes(*artifact_id.split("/"))
            assert {file.name: file.num_bytes for file in artifact.record.files}.items() <= sizes.items()


def origins(factory: Factory, artifact_id: str) -> set[str]:
    """All that an artifact was made from, as the books say."""
    waiting, found = [factory.lineage(artifact_id)], set()
    while waiting:
        node = waiting.pop()
        found.add(node.id)
        waiting += [parent for parent in node.parents if parent.id not in found]
    return found


def test_while_a_cycle_runs_nothing_that_it_could_use_goes_and_given_up_it_does(factory: Factory) -> None:
    model = rejected_cycle(factory.books)
    books = factory.books
    cycle = books.journal.claim(
        books.journal.open_cycle("run-abandoned", recipe={}, bound=books.journal.cycles()[0].bound)
    )
    before = files_of(factory)

    told = factory.gc(caches=True)

    assert told.waits_for == ["the cycle run-abandoned"]
    assert files_of(factory) == before
    assert any("--give-up" in line for line in told.lines())

    assert model in [thing.what for thing in factory.gc(give_up="run-abandoned").things]
    ended = books.journal.cycle("run-abandoned")
    assert ended is not None
    assert ended.state == "failed"
    with pytest.raises(FencedError), books.database.write(serialize=True) as connection:
        books.journal.close_cycle(connection, cycle, "promoted", decision={})
    with pytest.raises(StateError, match="expected a running cycle"):
        factory.gc(give_up="run-abandoned")


def test_a_cycle_that_begins_meanwhile_stops_it(factory: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    model = rejected_cycle(factory.books)
    books = factory.books

    def begin_too(*_: object) -> list[object]:
        books.journal.open_cycle("run-late", recipe={}, bound=books.journal.cycles()[0].bound)
        return []

    monkeypatch.setattr("aifactory.upkeep.collect._empty_trash", begin_too)
    with pytest.raises(StateError, match="found that one did"):
        factory.gc()

    assert books.artifacts.find(Model, model.partition("/")[2]) is not None


@pytest.mark.parametrize("after_commit", [False, True])
def test_killed_at_any_write_it_leaves_all_or_nothing_and_the_next_one_ends_it(
    factory: Factory, again: Callable[..., Factory], after_commit: bool
) -> None:
    model = rejected_cycle(factory.books)
    whole = files_of(factory)
    tokens = {path for path in whole if path.startswith("tokens/")}
    needed = {path for path in whole if not path.startswith((model, "tokens/"))}
    for at in range(1, 100):
        dying = mortal(again(), at, after_commit=after_commit)
        try:
            dying.gc()
        except Death:
            found = factory.books.artifacts.find(Model, model.partition("/")[2])
            if found is not None:  # then all of it is there
                names = {f"{model}/{file.name}" for file in found.record.files}
                assert names <= set(files_of(factory))
            continue
        break
    else:
        raise AssertionError("it never came to its end")

    left = files_of(factory)
    assert {path: left[path] for path in needed if path in left} == {path: whole[path] for path in needed}
    assert not [path for path in left if path.startswith(("trash/", model))]
    assert len(tokens & set(left)) == 2 * len(tokens) // 3, "the token sets of two releases stay"
    assert [e.subject for e in factory.books.journal.events(event="collected")].count(model) == 1


def test_what_was_never_finished_goes_once_nobody_can_be_writing_it(factory: Factory) -> None:
    storage = factory.books.storage
    storage.write_bytes(b"half a model", "model", "0123456789abcdef", "model.safetensors")
    storage.write_bytes(b"an upload", "files", "file-nobody-knows")

    assert not {"model/0123456789abcdef", "files/file-nobody-knows"} & {t.what for t in factory.gc(dry_run=True).things}

    old = time.time() - SETTLED_S - 60
    for path in ("model/0123456789abcdef/model.safetensors", "files/file-nobody-knows"):
        os.utime(storage.path(*path.split("/")), (old, old))
    told = {thing.what: thing.kind for thing in factory.gc().things}
    assert told["model/0123456789abcdef"] == "unfinished"
    assert told["files/file-nobody-knows"] == "upload"
    assert len(storage.names("files")) == 1, "what the books know stays"


def test_caches_go_only_when_asked(factory: Factory) -> None:
    told = factory.gc()
    assert told.caches is not None
    assert factory.books.storage.names("parts")

    factory.gc(caches=True)

    assert factory.books.storage.names("parts") == []
