"""Which release is the best so far on a holdout, over real books."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from small_factories import small_config

from aifactory.config import Config
from aifactory.records.artifacts import Corpus, Model, Record, Scorecard, digest_of
from aifactory.records.books import Books
from aifactory.records.journal import Bound, Cycle
from aifactory.workshop.fixed_best import fixed_best


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    made = Books(Config.model_validate(small_config(tmp_path)))
    yield made
    made.close()


def publish(books: Books, noun: type, number: int, inputs: tuple[str, ...] = (), **figures: object):  # type: ignore[no-untyped-def]
    record = Record(
        kind=noun.kind,
        fingerprint=f"{number:016x}" + "0" * 48,
        digest=digest_of([]),
        code_version=1,
        recipe={},
        inputs=list(inputs),
        files=[],
        figures=figures,
    )
    return books.artifacts.publish(noun, record)


def release(books: Books, number: int, high: float, corpora: tuple[Corpus, ...]) -> Model:
    model = publish(books, Model, number)
    inputs = (model.id, *(corpus.id for corpus in corpora))
    card = publish(books, Scorecard, number, inputs, holdout={"candidate": {"estimate": 0.0, "low": 0.0, "high": high}})
    serving = books.registry.production()
    bound = Bound(kind="run", sources_digest="x", champion=None if serving is None else serving.number)
    cycle = books.journal.claim(books.journal.open_cycle(f"run-{number}", recipe={}, bound=bound))
    books.registry.promote(cycle, model=model.id, scorecard=card.id, decision={})
    return model


def begun(books: Books, name: str) -> Cycle:
    return books.journal.open_cycle(name, recipe={}, bound=Bound(kind="drift", sources_digest=""))


def test_it_is_the_first_of_those_with_the_lowest_upper_end_on_the_same_holdout(books: Books) -> None:
    ours, other, feedback = (publish(books, Corpus, number) for number in (1, 2, 3))
    assert fixed_best(books, begun(books, "drift-0"), ours) is None
    first = release(books, 1, 2.0, (ours,))
    best = release(books, 2, 1.0, (ours, feedback))
    release(books, 3, 1.0, (ours, feedback))
    elsewhere = release(books, 4, 0.1, (other, ours))
    release(books, 5, float("nan"), (ours,))

    cycle = begun(books, "drift-1")
    found = fixed_best(books, cycle, ours)
    assert found is not None and (found.release, found.model.id) == ("small-r2", best.id)
    found = fixed_best(books, cycle, other)
    assert found is not None and found.model.id == elsewhere.id
    assert first.id != best.id


def test_what_is_promoted_after_a_cycle_began_changes_nothing_of_it(books: Books) -> None:
    ours = publish(books, Corpus, 1)
    release(books, 1, 2.0, (ours,))
    cycle = begun(books, "drift-1")
    release(books, 2, 1.0, (ours,))

    before, after = fixed_best(books, cycle, ours), fixed_best(books, begun(books, "drift-2"), ours)
    assert before is not None and after is not None
    assert (before.release, after.release) == ("small-r1", "small-r2")
