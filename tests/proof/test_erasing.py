"""What an erasure does to rows of sources, to the log and to files: in a factory that has trained nothing."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from here_loops import train_here
from mortal import Death, mortal
from postgres import postgres_server, postgres_url  # noqa: F401
from small_factories import small_config

from aifactory import Config, Factory
from aifactory.cli import main
from aifactory.cluster.tasks import run_here
from aifactory.errors import ConfigError, ErasedError, FencedError
from aifactory.proof.rebuild import Rebuild
from aifactory.records.artifacts import Corpus
from aifactory.records.books import Books
from aifactory.records.feedback import Completion, Feedback
from aifactory.records.journal import Bound

ANN, BOB = "ann@example.org", "bob@example.org"
STEPS = ({"step": "length", "min_bytes": 40}, {"step": "near_duplicates"}, {"step": "decontaminate"})


def sentence(rng: random.Random, words: int = 14) -> str:
    return " ".join("".join(rng.choices("abcdefghij", k=rng.randint(3, 9))) for _ in range(words))


def told_by(user: str, *, rows: int = 25) -> list[dict[str, Any]]:
    """Rows of a user; some are too short to be kept, and one is no row."""
    rng = random.Random(user)
    good = [{"text": sentence(rng), "user": user, "label": "long"} for _ in range(rows)]
    short = [{"text": sentence(rng, 3), "user": user, "label": "short"} for _ in range(4)]
    return [*good, *short, {"text": good[0]["text"], "user": user}]


def write_rows(folder: Path, *rows: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    write_rows(tmp_path / "rows", *told_by(ANN), *told_by(BOB))
    columns = {"text": "text", "user": "user", "label": "label"}
    section = {"name": "chat", "kind": "jsonl", "path": str(tmp_path / "rows"), "columns": columns}
    values = small_config(tmp_path, ingest={"sources": [section], "steps": list(STEPS), "holdout_share": 0.3})
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


@pytest.fixture
def factory(config_file: Path) -> Iterator[Factory]:
    with Factory(Config.from_yaml(config_file)) as factory:
        yield factory


@pytest.fixture
def command(config_file: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(verb: str, *arguments: str) -> tuple[int, str, str]:
        status = main([verb, str(config_file), *arguments])
        written = capsys.readouterr()
        return status, written.out, written.err

    return run


def rows_of(corpus: Corpus, *sides: str) -> list[dict[str, Any]]:
    files = [file for side in sides for file in sorted(Path(corpus.uri).glob(f"{side}-*.parquet"))]
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def said(root: Path) -> Iterator[tuple[Path, str]]:
    """All that lies below a folder, tables as what they say."""
    for path in sorted(file for file in root.rglob("*") if file.is_file()):
        data = path.read_bytes()
        yield path, data.decode("utf-8", "replace")
        if path.suffix == ".parquet":
            yield path, json.dumps(pq.read_table(io.BytesIO(data)).to_pylist())
        elif path.suffix == ".arrow":
            yield path, str(pa.ipc.open_file(pa.BufferReader(data)).read_all().to_pylist())


def places_of(root: Path, texts: Iterable[str]) -> list[Path]:
    wanted = list(texts)
    return [path for path, text in said(root) if any(each in text for each in wanted)]


def ask(books: Books, name: str, user: str | None, prompt: str, *, corrected_by: str | None = None) -> None:
    books.feedback.log_completion(
        Completion(
            id=name,
            release=1,
            prompt=prompt,
            answer=f"answer to {prompt}",
            request="{}",
            finish_reason="stop",
            prompt_tokens=1,
            answer_tokens=1,
            user=user,
        )
    )
    if corrected_by is not None:
        books.feedback.record(
            Feedback(completion=name, idempotency_key=name, user=corrected_by, correction=f"better {prompt}")
        )


# ── rows of a source ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_of_a_source_leave_the_corpus_its_ledger_its_parts_and_its_page(factory: Factory) -> None:
    corpus = factory.ingest()
    root = Path(factory.books.storage.root)
    texts = [row["text"] for row in told_by(ANN)]
    assert {file.name.partition("-")[0] for file in places_of(root, texts)} >= {"train", "holdout", "rejected"}
    kept = [row["id"] for row in rows_of(corpus, "train", "holdout") if row["user"] == BOB]
    rejected = [row["id"] for row in rows_of(corpus, "rejected") if row["user"] == BOB]

    done = factory.forget(f'user = "{ANN}"')

    assert (done.left, done.releases, done.successor) == ([], [], None)
    factory.books.close()
    assert places_of(root, [*texts, ANN]) == []
    left = factory.books.artifacts.left_of(Corpus, corpus.id)
    assert [row["id"] for row in rows_of(left, "train", "holdout")] == kept
    assert [row["id"] for row in rows_of(left, "rejected")] == rejected
    assert left.figures["rows_in"] == corpus.figures["rows_in"]
    assert left.figures["rows_erased"] == len(texts)
    assert left.rows_in == left.rows_kept + left.rows_rejected + left.figures["rows_erased"]
    assert left.record.recipe["erased_from"] == corpus.fingerprint
    assert left.digest != corpus.digest and left.id != corpus.id
    assert factory.books.journal.corpora() == [left.id]
    with pytest.raises(ErasedError, match=f"erased by {done.erasure}; what is left of it is {left.id}"):
        factory.books.artifacts.get(Corpus, corpus.id)
    assert any("chat (jsonl" in each for each in done.outside)
    assert (Path(factory.config.ingest.sources[0].path) / "rows.jsonl").read_text().count(ANN) == len(texts)  # type: ignore[union-attr]


def test_what_was_erased_does_not_come_back_from_its_source_and_what_is_new_does(
    factory: Factory, config_file: Path, tmp_path: Path
) -> None:
    before = factory.ingest()
    factory.forget(f"user = {ANN}")
    new = {"text": sentence(random.Random(7)), "user": ANN}
    write_rows(tmp_path / "rows", *told_by(ANN), *told_by(BOB), new)

    with Factory(Config.from_yaml(config_file)) as opened:
        corpus = opened.ingest()

    assert corpus.id != before.id
    assert corpus.figures["rows_erased"] == len(told_by(ANN))
    assert corpus.rows_in == corpus.rows_kept + corpus.rows_rejected + corpus.figures["rows_erased"]
    rows = rows_of(corpus, "train", "holdout", "rejected")
    assert {row["text"] for row in rows if row["user"] == ANN} == {new["text"]}
    assert len([row for row in rows if row["user"] == BOB]) == len(told_by(BOB))
    with Factory(Config.from_yaml(config_file)) as opened:
        assert (
            opened.forget(f"user = {ANN}").places["parts"] > 0
        )  # what has arrived since is found when it is asked again
        assert places_of(Path(opened.books.storage.root), [new["text"]]) == []


def test_a_corpus_without_what_was_erased_before_is_made_again_whatever_is_erased_later(
    factory: Factory, config_file: Path, tmp_path: Path
) -> None:
    factory.ingest()
    factory.forget(f"user = {ANN}")
    with Factory(Config.from_yaml(config_file)) as opened:
        books = opened.books
        corpus = opened.ingest()
        assert corpus.figures["rows_erased"] == len(told_by(ANN))
        later = books.erasures.begin("user = carol")
        with books.database.write(serialize=True) as connection:
            books.erasures.bury(connection, later.id, [("key", "a row of carol's", "chat")])
        place = {"storage": str(tmp_path / "clean"), "state_url": f"sqlite:///{tmp_path}/clean.db"}
        runtime = opened.config.runtime.model_copy(update=place)
        clean = Books(opened.config.model_copy(update={"runtime": runtime}))
        rebuild = Rebuild(
            books, clean, run_tasks=lambda: run_here, train_work=train_here, from_scratch=False, trigger=""
        )

        made = rebuild.of(corpus.id, is_own=True)
        clean.close()

    assert (made.digest, made.uri != corpus.uri) == (corpus.digest, True)
    assert [(check.how, check.is_equal) for check in rebuild.checks] == [("rebuilt", True)]


def test_a_label_and_a_source_choose_rows_and_conditions_are_joined(factory: Factory) -> None:
    corpus = factory.ingest()
    of_ann = factory.forget(f'user = "{ANN}" and label = "short"', dry_run=True)
    assert of_ann.places == {"ledgers": 4, **{k: v for k, v in of_ann.places.items() if k in ("parts", "journal")}}
    every = factory.forget("source = chat", dry_run=True).places
    assert every["corpora"] + every["holdouts"] + every["ledgers"] == corpus.rows_in
    row = rows_of(corpus, "train")[0]
    for name in ("id", "key"):
        assert factory.forget(f"{name} = {row[name]}", dry_run=True).places["corpora"] == 1


def test_partial_files_and_folders_without_a_record_go(factory: Factory) -> None:
    corpus = factory.ingest()
    root = Path(factory.books.storage.root)
    text = told_by(ANN)[0]["text"]
    orphan = root / "corpus" / "0123456789abcdef" / "train-00000.parquet"
    old = Path(corpus.uri) / ".train-00000.parquet.0123456789ab"
    young = root / "parts" / ".train.arrow.ba9876543210"
    run = root / "runs" / "train-0123456789abcdef" / "checkpoint" / "weights"
    for file in (orphan, old, young, run):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    os.utime(old, (1, 1))

    first = factory.forget(f"user = {ANN}")

    assert not first.holds and first.proof is None
    assert "perhaps by somebody who still lives" in first.left[0]
    assert not orphan.exists() and not old.exists() and not run.exists()
    os.utime(young, (1, 1))
    assert factory.forget(f"user = {ANN}").holds
    assert not young.exists()


# ── the log ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_log_loses_what_a_user_asked_and_said_and_keeps_what_others_did(factory: Factory) -> None:
    books = factory.books
    ask(books, "cmpl-1", ANN, "the question of ann 1", corrected_by=BOB)
    ask(books, "cmpl-2", BOB, "the question of bob 2", corrected_by=ANN)
    ask(books, "cmpl-3", BOB, "the question of bob 3", corrected_by=BOB)
    ask(books, "cmpl-4", None, "the question of ann 4, who did not say so")
    books.feedback.record(Feedback(completion="cmpl-4", idempotency_key="4", user=ANN, score=0.5))
    ask(books, "cmpl-5", None, "the question of nobody 5, of which two said something")
    for user in (ANN, BOB):
        books.feedback.record(Feedback(completion="cmpl-5", idempotency_key=f"5 {user}", user=user, score=0.5))
    assert books.feedback.seal(batch_rows=3, batch_after_s=None) == 1
    batch = books.feedback.publish(1, books.artifacts)

    done = factory.forget(f"user = {ANN}")

    assert done.left == []
    assert (done.places["completions"], done.places["feedback"], done.places["batches"]) == (2, 4, 2)
    assert books.feedback.feedback_keys() == {"cmpl-3", f"5 {BOB}"}
    assert books.feedback.completion("cmpl-5") is not None
    assert [c.completion for c in books.feedback.corrections()] == ["cmpl-3"]
    assert books.feedback.completion("cmpl-2") is not None
    again = books.feedback.publish(1, books.artifacts)
    assert again.id == books.journal.erased()[batch.id]
    assert again.num_rows == 1
    trace = factory.trace(completion="cmpl-1")
    assert trace.lines()[-1] == f"Erased: the answer cmpl-1 itself, by {done.erasure}"
    assert f"cmpl-1 (erased by {done.erasure})" in "\n".join(factory.lineage("cmpl-1").lines())
    books.close()
    assert places_of(Path(books.storage.root), ["question of ann", "better the question of bob 2", ANN]) == []


def test_a_batch_of_which_nothing_is_left_is_no_batch(factory: Factory) -> None:
    books = factory.books
    ask(books, "cmpl-1", ANN, "the question of ann 1", corrected_by=ANN)
    books.feedback.seal(batch_rows=1, batch_after_s=None)
    batch = books.feedback.publish(1, books.artifacts)
    assert factory.forget(f"user = {ANN}").left == []
    assert books.feedback.sealed() == []
    assert books.journal.erased()[batch.id] is None


def test_free_pages_and_the_write_ahead_log_hold_nothing(factory: Factory) -> None:
    books = factory.books
    for number in range(300):
        ask(books, f"cmpl-{number}", ANN if number % 2 else BOB, f"the question {'x' * 300} {number} end")
    file = str(books.database.url.database)
    reader = sqlite3.connect(file)  # keeps the write-ahead log alive
    reader.execute("SELECT count(*) FROM completions").fetchone()

    assert factory.forget(f"user = {ANN}").left == []

    raw = b"".join(Path(file + end).read_bytes() for end in ("", "-wal") if Path(file + end).exists())
    assert [n for n in range(300) if f" {n} end".encode() in raw] == list(range(0, 300, 2))
    reader.close()


def test_lines_of_batch_files_go_and_those_of_others_stay(factory: Factory) -> None:
    books = factory.books
    lines = [
        {"custom_id": f"a{n}", "method": "POST", "url": "/v1/completions", "body": {"prompt": f"{u} {n}", "user": u}}
        for n, u in enumerate([ANN, BOB, ANN])
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    asked = books.batches.add_file(data, filename="x.jsonl", purpose="batch")
    job = books.batches.open_job(endpoint="/v1/completions", input_file=asked.id, note={})

    waits = factory.forget(f"user = {ANN}", dry_run=True)
    assert any(job.id in each for each in waits.left)

    assert books.batches.claim("me") is not None
    results = [
        json.dumps({"custom_id": f"a{n}", "response": {"body": {"id": f"cmpl-{n}", "text": f"{n}"}}}) for n in range(3)
    ]
    books.batches.finish(job.id, "me", state="completed", output=results, errors=[])
    done = factory.forget(f"user = {ANN}")

    assert (done.left, done.places["files"]) == ([], 4)
    ended = books.batches.job(job.id)
    assert ended is not None and ended.output_file is not None
    for name in (asked.id, ended.output_file):
        left = books.batches.read_file(name)
        assert left is not None and [json.loads(line)["custom_id"] for line in left.splitlines()] == ["a1"]
        assert books.batches.file(name).num_bytes == len(left)  # type: ignore[union-attr]


def test_a_cycle_that_is_bound_to_what_is_gone_ends_and_its_attempt_is_fenced(factory: Factory) -> None:
    corpus = factory.ingest()
    books = factory.books
    bound = Bound(kind="drift", sources_digest="", holdouts=[corpus.id])
    cycle = books.journal.claim(books.journal.open_cycle("drift-1", recipe={}, bound=bound))

    done = factory.forget(f"user = {ANN}")

    ended = books.journal.cycle("drift-1")
    assert ended is not None and ended.state == "failed"
    assert ended.decision == {"decision": "fail", "reasons": [f"what it was bound to was erased by {done.erasure}"]}
    with pytest.raises(FencedError):
        books.registry.reject(cycle, scorecard="scorecard/x", decision={"reasons": []})


def test_quotations_in_the_journal_go(factory: Factory) -> None:
    books = factory.books
    ask(books, "cmpl-1", ANN, "the question of ann that is quoted")
    books.journal.write(
        "unscored", subject="small-r1", detail={"error": "no answer to: the question of ann that is quoted"}
    )
    assert factory.forget(f"user = {ANN}").left == []
    (event,) = books.journal.events(event="unscored")
    assert event.detail == {"error": "(erased)"}


def test_on_postgresql_nothing_is_left_in_the_tables(config_file: Path, postgres_url: str) -> None:  # noqa: F811
    config = Config.from_yaml(config_file, [f"runtime.state_url={postgres_url}"])
    with Factory(config) as factory:
        factory.ingest()
        ask(factory.books, "cmpl-1", ANN, "the question of ann 1", corrected_by=BOB)
        done = factory.forget(f"user = {ANN}")
        assert done.left == []
        assert any("PostgreSQL's write-ahead log" in each for each in done.outside)
        assert factory.check_forgotten(str(done.erasure)).faults == []
        import sqlalchemy as sa

        with factory.books.database.read() as connection:
            for table in sa.inspect(connection).get_table_names():
                text = str(connection.execute(sa.text(f"SELECT * FROM {table}")).all())
                assert ANN not in text and "question of ann" not in text, table


def test_traffic_goes_on_meanwhile_and_loses_nothing(factory: Factory) -> None:
    books = Books(factory.config)
    for number in range(40):
        ask(books, f"cmpl-{number}", ANN if number % 2 else BOB, f"question {number}", corrected_by=BOB)
    ended, acknowledged = threading.Event(), []

    def traffic() -> None:
        for number in count(100):
            if ended.is_set():
                return
            user = ANN if number % 10 == 0 else BOB
            ask(books, f"cmpl-{number}", user, f"question {number}", corrected_by=user)
            acknowledged.append((f"cmpl-{number}", user))

    thread = threading.Thread(target=traffic)
    thread.start()
    try:
        factory.forget(f"user = {ANN}")
    finally:
        ended.set()
        thread.join()
    again = factory.forget(f"user = {ANN}")

    assert again.left == []
    assert len(acknowledged) > 1
    told = {c.completion for c in books.feedback.corrections()}
    assert told >= {name for name, user in acknowledged if user == BOB}
    assert not told & {name for name, user in acknowledged if user == ANN}
    books.close()


@pytest.mark.slow
@pytest.mark.parametrize("after_commit", [False, True])
def test_killed_at_any_write_it_finishes_when_it_is_run_again(
    config_file: Path, tmp_path: Path, after_commit: bool
) -> None:
    """Of rows, the log and files: each write once, from the same beginning."""
    with Factory(Config.from_yaml(config_file)) as factory:
        corpus = factory.ingest()
        ask(factory.books, "cmpl-1", ANN, "the question of ann 1", corrected_by=BOB)
        ask(factory.books, "cmpl-2", BOB, "the question of bob 2", corrected_by=ANN)
        factory.books.feedback.seal(batch_rows=2, batch_after_s=None)
        factory.books.feedback.publish(1, factory.books.artifacts)
        root = Path(factory.books.storage.root)
    begun = tmp_path / "begun"
    shutil.copytree(root, begun)
    places: list[dict[str, int]] = []
    for dies_at in count(1):
        shutil.rmtree(root)
        shutil.copytree(begun, root)
        with Factory(Config.from_yaml(config_file)) as factory:
            try:
                mortal(factory, dies_at, after_commit=after_commit).forget(f"user = {ANN}")
                break
            except Death:
                pass
        with Factory(Config.from_yaml(config_file)) as factory:
            told = factory.forget(f"user = {ANN}")
            # Killed after the very last write there is nothing left to do, and it says so.
            assert told.left == [], dies_at
            ended = factory.books.erasures.all()
            assert [each.state for each in ended] == ["ended"], dies_at
            assert factory.check_forgotten(ended[0].id).faults == [], dies_at
            left = factory.books.artifacts.left_of(Corpus, corpus.id)
            assert left.figures["rows_erased"] == len(told_by(ANN)), dies_at
            found = ended[0].found["places"]
            places.append({name: sum(each.values()) for name, each in found.items() if name != "parts"})
            factory.books.close()
            assert places_of(root, [ANN, "question of ann", *(row["text"] for row in told_by(ANN))]) == [], dies_at
    assert len(places) > 15
    assert all(each == places[0] for each in places)


# ── the proof, by the command ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_proof_holds_and_a_changed_one_does_not(
    command: Callable[..., tuple[int, str, str]], factory: Factory, tmp_path: Path
) -> None:
    factory.ingest()
    ask(factory.books, "cmpl-1", ANN, "the question of ann 1", corrected_by=BOB)
    status, out, _ = command("forget", "--where", f"user = {ANN}", "--json")
    done = json.loads(out)
    assert (status, done["holds"]) == (0, True)
    proof = Path(done["proof"])

    status, out, err = command("forget", "--check", str(proof))
    assert (status, out.splitlines()[0]) == (0, f"{done['erasure']} holds."), out + err
    text = proof.read_text(encoding="utf-8")
    assert ANN not in text and not [row for row in told_by(ANN) if row["text"] in text]

    document = json.loads(text)
    for name, value in (("places", {}), ("rows", document["rows"][1:]), ("ended_at", "2020-01-01T00:00:00Z")):
        changed = tmp_path / "changed.json"
        changed.write_text(json.dumps({**document, name: value}), encoding="utf-8")
        status, out, _ = command("forget", "--check", str(changed), "--json")
        assert (status, json.loads(out)["holds"]) == (1, False)
    from aifactory.records.identity import canonical_json, hash_text

    forged = {k: v for k, v in document.items() if k != "digest"} | {"places": {}}
    changed.write_text(json.dumps({**forged, "digest": hash_text(canonical_json(forged))}), encoding="utf-8")
    status, out, _ = command("forget", "--check", str(changed))
    assert status == 1 and "NOT so      a line of the audit holds this digest" in out


def test_a_row_that_is_put_back_is_found_by_the_check(factory: Factory, config_file: Path) -> None:
    factory.ingest()
    ask(factory.books, "cmpl-1", ANN, "the question of ann 1", corrected_by=BOB)
    done = factory.forget(f"user = {ANN}")
    assert factory.check_forgotten(str(done.erasure)).faults == []
    ask(factory.books, "cmpl-1", ANN, "the question of ann 1")
    assert factory.check_forgotten(str(done.erasure)).faults == [
        "none of the rows is in any place; found 1 completions"
    ]


def test_what_is_no_proof_is_refused(factory: Factory, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected the file or the id of a proof"):
        factory.check_forgotten("forget-0123456789abcdef")
    (tmp_path / "x.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="found something else"):
        factory.check_forgotten(str(tmp_path / "x.json"))
