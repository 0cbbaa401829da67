"""From text back to rows: what is searched, what is said of the rows, and what can't be traced."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import document, write_topics
from small_factories import small_config

from aifactory import Config, Factory
from aifactory.cli import main
from aifactory.errors import ConfigError, StateError, StorageError
from aifactory.records.artifacts import Artifact, Corpus, Model, Record, TokenSet, digest_of
from aifactory.records.feedback import Completion
from aifactory.records.journal import Bound
from aifactory.tokens.pipeline import part_of, shard_names


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Factory]]:
    """Factories over texts of some topics, in one storage root; they run in this process."""
    made: list[Factory] = []

    def of(*topics: int) -> Factory:
        folder = write_topics(tmp_path / "-".join(map(str, topics)), topics, documents=9)
        source = {"name": "topics", "kind": "text", "path": str(folder)}
        values = small_config(tmp_path, ingest={"sources": [source]})
        made.append(Factory(Config.model_validate(values)))
        return made[-1]

    yield of
    for factory in made:
        factory.close()


def release(factory: Factory, *inputs: Artifact) -> Model:
    """A release of a model that was made from these; nothing of it but the record is there."""
    books = factory.books
    serving = books.registry.production()
    number = len(books.registry.releases())
    record = Record(
        kind="model",
        fingerprint=f"{number:016x}" + "0" * 48,
        digest=digest_of([]),
        code_version=1,
        recipe={},
        inputs=[each.id for each in inputs],
        files=[],
        figures={},
    )
    model = books.artifacts.publish(Model, record)
    bound = Bound(kind="run", sources_digest="x", champion=None if serving is None else serving.number)
    cycle = books.journal.claim(books.journal.open_cycle(f"trigger-{number}", recipe={}, bound=bound))
    books.registry.promote(cycle, model=model.id, scorecard="scorecard/0", decision={})
    return model


def answered(factory: Factory, name: str, text: str, *, by: int) -> None:
    factory.books.feedback.log_completion(
        Completion(
            id=name,
            release=by,
            prompt="p",
            answer=text,
            request="{}",
            finish_reason="stop",
            prompt_tokens=1,
            answer_tokens=1,
        )
    )


def trained_rows(factory: Factory, corpus: Corpus) -> list[dict[str, Any]]:
    folder = Path(corpus.uri)
    return pa.concat_tables([pq.read_table(file) for file in sorted(folder.glob("train-*.parquet"))]).to_pylist()


def test_the_text_of_a_row_traces_to_that_row_first(make: Callable[..., Factory]) -> None:
    factory = make(0, 1, 2)
    tokens = factory.tokenize()
    rows = trained_rows(factory, factory.ingest())
    assert len(rows) > 15

    for row in rows:
        report = factory.trace(row["text"], limit=3, similar=0)
        first, second, _ = report.rows
        assert (first.id, first.source, first.origin, first.position) == tuple(
            row[name] for name in ("id", "source", "origin", "position")
        )
        assert (first.span, first.num_bytes, first.text_byte) == (row["text"], len(row["text"].encode()), 0)
        assert (first.tokens, first.covered_tokens, first.row_token) == (report.text_tokens, report.text_tokens, 1)
        assert second.tokens < first.tokens
        assert (first.token_set, first.corpus) == (tokens.id, tokens.record.inputs[0])


def test_a_span_is_said_with_its_place_in_the_text(make: Callable[..., Factory]) -> None:
    factory = make(0, 1)
    factory.tokenize()
    row = trained_rows(factory, factory.ingest())[0]
    before, after = "größe 日本 ", " ¿qué?"

    report = factory.trace(before + row["text"][40:400] + after, limit=1)

    (found,) = report.rows
    text = (before + row["text"][40:400] + after).encode()
    assert found.span.encode() == text[found.text_byte : found.text_byte + found.num_bytes]
    assert found.num_bytes > 340
    assert found.id == row["id"]
    assert report.num_rows > 1


def test_no_row_that_is_held_out_is_found(make: Callable[..., Factory]) -> None:
    factory = make(0, 1, 2)
    factory.tokenize()
    files = sorted(Path(factory.ingest().uri).glob("holdout-*.parquet"))
    held_out = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert held_out

    for row in held_out:
        report = factory.trace(row["text"], limit=1000, similar=0)
        assert row["id"] not in {found.id for found in report.rows}
        assert len(report.rows) == report.num_rows


def test_what_trained_a_release_and_its_ancestors_is_searched(make: Callable[..., Factory]) -> None:
    old, new, other = make(0, 1), make(2, 3), make(4)
    first = release(old, old.tokenize())
    second_tokens = new.tokenize()
    release(old, second_tokens, first)
    other.tokenize()  # the newest, and nothing was trained on it
    text = {topic: document(topic, 0) for topic in (0, 2, 4)}

    def topics(report: Any) -> set[str]:
        return {row.origin.partition("/")[0] for row in report.rows}

    assert topics(old.trace(text[0])) == {"topic000"}
    assert topics(old.trace(text[2])) == {"topic002"}
    assert old.trace(text[4]).rows == []
    assert old.trace(text[2], release="small-r1").rows == []
    assert topics(old.trace(text[0], release="small-r1")) == {"topic000"}
    assert old.trace(text[0]).release == "small-r2"
    assert set(old.trace(text[0]).token_sets) == {*first.record.inputs, second_tokens.id}


def test_a_completion_traces_its_answer_in_what_trained_the_release_that_gave_it(make: Callable[..., Factory]) -> None:
    old, new = make(0, 1), make(2)
    release(old, old.tokenize())
    release(old, new.tokenize())
    answered(old, "cmpl-1", document(1, 0), by=1)
    answered(old, "cmpl-2", document(1, 0), by=2)

    report = old.trace(completion="cmpl-1")

    assert (report.release, report.completion) == ("small-r1", "cmpl-1")
    assert report.rows == old.trace(document(1, 0), release="small-r1").rows
    assert report.rows[0].origin.startswith("topic001/")
    assert old.trace(completion="cmpl-2").rows == []


def test_the_newest_token_set_is_searched_where_nothing_was_released(make: Callable[..., Factory]) -> None:
    old, new = make(0), make(1)
    old.tokenize()
    newest = new.tokenize()

    report = old.trace(document(1, 0))

    assert (report.release, report.token_sets) == (None, [newest.id])
    assert report.rows


def test_what_cannot_be_traced_is_an_error_that_says_what_to_do(make: Callable[..., Factory], tmp_path: Path) -> None:
    factory = make(0)
    with pytest.raises(StateError, match="aifactory tokenize CONFIG"):
        factory.trace(document(0, 0))
    tokens = factory.tokenize()
    with pytest.raises(ConfigError, match=r"at least 12 tokens to trace, found \d+ \(2 bytes\)"):
        factory.trace("ab")
    with pytest.raises(ConfigError, match="an answer that the factory small gave, found 'cmpl-9'"):
        factory.trace(completion="cmpl-9")
    with pytest.raises(ConfigError, match=r"\(none yet\), found 'small-r7'"):
        factory.trace("text", release="small-r7")
    with pytest.raises(ConfigError, match="a limit of 0"):
        factory.trace("text", limit=0)
    with pytest.raises(ConfigError, match="either a text"):
        factory.trace()
    with pytest.raises(ConfigError, match="either a text"):
        factory.trace("text", completion="cmpl-1")

    corpus = factory.books.artifacts.get(Corpus, tokens.record.inputs[0])
    for shard in shard_names(tokens.record.files):
        part = Path(corpus.uri) / part_of(shard, corpus)
        pq.write_table(pq.read_table(part).slice(0, 0), part)
    with pytest.raises(StorageError, match="made of another corpus"):
        factory.trace(document(0, 0))


def test_the_part_of_a_shard_holds_its_rows(make: Callable[..., Factory]) -> None:
    factory = make(0, 1, 2)
    tokens, corpus = factory.tokenize(), factory.ingest()
    from aifactory.text.shards import TokenRows

    shards = shard_names(tokens.record.files)
    for shard in shards:
        ids = {row for row, _ in TokenRows(Path(tokens.uri), [shard]).whole_documents()}
        part = pq.read_table(Path(corpus.uri) / part_of(shard, corpus), columns=["id"])
        assert ids == set(part["id"].to_pylist())
    assert {f"trace-{shard.removeprefix('shard-')}" for shard in shards} == {
        file.name for file in tokens.record.files if file.name.startswith("trace-")
    }


def test_the_command_says_the_same_in_text_and_json(
    make: Callable[..., Factory], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factory = make(0)
    factory.tokenize()
    text = document(0, 0)
    expected = factory.trace(text, limit=2)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(factory.config.model_dump(mode="json", exclude_defaults=True)), encoding="utf-8")

    assert main(["trace", str(config), "--text", text, "--limit", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(expected.to_json()))
    assert main(["trace", str(config), "--text", text, "--limit", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines() == expected.lines()
    assert all(row.id in shown and row.origin in shown for row in expected.rows)
    assert "whether it comes from them is not known" in shown
    assert main(["trace", str(config), "--text", "ab"]) == 2
    with pytest.raises(SystemExit):
        main(["trace", str(config)])


def test_a_token_set_of_before_is_searched_without_its_index(make: Callable[..., Factory]) -> None:
    factory = make(0, 1)
    tokens = factory.tokenize()
    expected = factory.trace(document(0, 0))
    record = json.loads((Path(tokens.uri) / "record.json").read_text(encoding="utf-8"))
    for file in [file for file in record["files"] if file["name"].startswith("trace-")]:
        record["files"].remove(file)
        (Path(tokens.uri) / file["name"]).unlink()
    (Path(tokens.uri) / "record.json").write_text(json.dumps(record), encoding="utf-8")

    assert not [f for f in factory.books.artifacts.get(TokenSet, tokens.id).record.files if "trace" in f.name]
    assert factory.trace(document(0, 0)) == expected


# ── what resembles it by its words ────────────────────────────────────────────────────────────────────────────────────


def planted(make: Callable[..., Factory], tmp_path: Path, text: str) -> Factory:
    """A factory that was trained on this text, too."""
    factory = make(0, 1, 2)
    (tmp_path / "0-1-2" / "planted.txt").write_text(text, encoding="utf-8")
    return factory


FACT = "Sylvania is the capital of Freedonia, which Rufus Firefly governs since the war over an insult. " * 3


def test_a_planted_row_is_the_most_similar_to_a_short_answer_that_shares_no_span_with_it(
    make: Callable[..., Factory], tmp_path: Path
) -> None:
    factory = planted(make, tmp_path, FACT)
    release(factory, factory.tokenize())
    planted_rows = {row["id"] for row in trained_rows(factory, factory.ingest()) if "planted" in row["origin"]}
    assert planted_rows, "the planted row is held out: plant another"
    factory.books.feedback.log_completion(
        Completion(
            id="cmpl-1",
            release=1,
            prompt="Who governs Freedonia?",
            answer="Firefly, Rufus",
            request="{}",
            finish_reason="stop",
            prompt_tokens=1,
            answer_tokens=1,
        )
    )

    report = factory.trace(completion="cmpl-1", similar=3)

    first, *others = report.similar
    assert first.id in planted_rows and first.origin == "planted.txt"
    assert first.answer > 0.4 and first.prompt is not None and first.prompt > 0.3
    assert {"firefly", "freedonia"} <= set(first.shared)
    assert all(each.similarity < first.similarity / 2 for each in others)
    assert report.rows == []
    assert f"(id {first.id}, {first.corpus})  shares " in "\n".join(report.lines())
    assert json.loads(json.dumps(report.to_json()))["similar"][0]["similarity"] == first.similarity


def test_what_resembles_a_text_is_the_same_however_many_rows_are_read_at_once(
    make: Callable[..., Factory], monkeypatch: pytest.MonkeyPatch
) -> None:
    import aifactory.trace

    factory = make(0, 1, 2)
    factory.tokenize()
    expected = factory.trace(document(1, 0), similar=100).similar
    assert [row.similarity for row in expected] == sorted((row.similarity for row in expected), reverse=True)
    trains = {row["id"]: row for row in trained_rows(factory, factory.ingest())}
    assert {row.id for row in expected} <= set(trains)
    assert expected[0].text == trains[expected[0].id]["text"][: len(expected[0].text)]

    monkeypatch.setattr(aifactory.trace, "_ROWS_AT_ONCE", 2)
    assert factory.trace(document(1, 0), similar=100).similar == expected
    assert factory.trace(document(1, 0), similar=4).similar == expected[:4]
    assert factory.trace(document(1, 0), similar=0).similar == ()
    with pytest.raises(ConfigError, match="no similar row or some, found a number of -1"):
        factory.trace("text", similar=-1)
