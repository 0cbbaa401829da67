"""Rows that are forgotten: no byte of them stays, what saw them is gone, and the proof says so."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from aifactory import Factory
from aifactory.errors import ConfigError, ErasedError, StateError
from aifactory.proof.where import parse_where
from aifactory.records.artifacts import Corpus, Model
from aifactory.text.shards import TokenRows
from aifactory.text.tokenizer import load_tokenizer

Copy = Callable[..., Factory]
USER = "user-7-1"


def texts_of(factory: Factory, user: str) -> list[str]:
    """What a user said to the factory, and was asked about."""
    said = factory.books.feedback.corrections()
    return [text for c in said if c.user == user for text in (c.correction, c.prompt)]


def needles(factory: Factory, user: str) -> list[str]:
    """Pieces of what a user said that nobody else did: whoever holds one holds a row."""
    said = factory.books.feedback.corrections()
    others = " | ".join(text for c in said if c.user != user for text in (c.correction, c.prompt))
    pieces = [text[at : at + 90] for text in texts_of(factory, user) for at in range(0, len(text) - 90, 15)]
    found = [piece for piece in pieces if piece not in others]
    assert len(found) > len(texts_of(factory, user))
    return found


def decoded(root: Path) -> Iterable[tuple[str, str]]:
    """Everything below a folder as text: files as they are, tables and tokens as what they say."""
    for path in sorted(root.rglob("*")):
        if not path.is_file():
            continue
        data = path.read_bytes()
        yield str(path), data.decode("utf-8", "replace")
        if path.suffix == ".parquet":
            yield (
                f"{path} (rows)",
                json.dumps(pq.read_table(io.BytesIO(data)).to_pylist(), default=str, ensure_ascii=False),
            )
        elif path.suffix == ".arrow":
            table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
            if "documents" in table.column_names:
                yield f"{path} (tokens)", "\n".join(spoken(root, path))
            else:
                yield (
                    f"{path} (rows)",
                    "\n".join(str(value) for column in table.columns for value in column.to_pylist()),
                )


def spoken(root: Path, shard: Path) -> Iterable[str]:
    """The documents of a shard in words, by every tokenizer that there is."""
    for folder in sorted({file.parent for file in root.rglob("tokenizer.json")}):
        tokenizer = load_tokenizer(folder)
        for _, ids in TokenRows(shard.parent, [shard.name]).whole_documents():
            if int(np.max(ids)) < tokenizer.vocab_size:
                yield tokenizer.decode([int(each) for each in ids])


def left_of(root: Path, wanted: Iterable[str]) -> list[tuple[str, str]]:
    return [
        (where, text)
        for where, said in decoded(root)
        for text in wanted
        if text in said or json.dumps(text)[1:-1] in said
    ]


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


@pytest.mark.slow
def test_no_byte_of_what_a_user_said_is_left_and_the_successor_serves(copied: Copy) -> None:
    factory = copied()
    root = Path(factory.books.storage.root)
    wanted = needles(factory, USER)
    others = len({c.user for c in factory.books.feedback.corrections()}) - 1
    assert left_of(root, wanted)
    before = factory.forget(f'user = "{USER}"', dry_run=True).places

    told = factory.forget(f'user = "{USER}"')

    assert told.left == [], told.lines()
    assert told.holds and told.releases == ["small-r2"]
    factory.books.close()
    assert left_of(root, [*wanted, USER]) == []
    assert {place: told.places[place] for place in before if place != "journal"} == {
        place: count for place, count in before.items() if place != "journal"
    }
    assert len({c.user for c in factory.books.feedback.corrections()}) == others

    production = factory.books.registry.production()
    assert production is not None and production.name == told.successor
    assert production.name in ("small-r3", "small-r1")
    withdrawn = factory.books.registry.named("small-r2")
    assert withdrawn.withdrawn == told.erasure
    with pytest.raises(ErasedError, match=str(told.erasure)):
        factory.books.artifacts.get(Model, withdrawn.model)
    with pytest.raises(StateError, match="whose model is gone: erased by"):
        factory.rollback(to=2)
    assert factory.books.journal.audited().faults == []
    assert told.proof is not None
    proof = json.loads(Path(told.proof).read_text(encoding="utf-8"))
    assert proof["places"]["feedback"] == before["feedback"]
    again = factory.forget(f'user = "{USER}"')
    assert again.lines() == ["No row is meant by that; nothing was erased."]


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


def unused() -> tuple[Any, Any]:
    return sa, Corpus
