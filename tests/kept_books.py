"""Factories whose books and artifacts are made by hand, without a model: two releases, feedback, and a cycle that was rejected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from small_factories import small_config

from aifactory import Config, Factory
from aifactory.records.artifacts import Artifact, Record, digest_of
from aifactory.records.books import Books
from aifactory.records.feedback import Completion, Feedback
from aifactory.records.identity import hash_text
from aifactory.records.journal import Bound, Cycle
from aifactory.upkeep.needs import BY_KIND

VERBS = {"corpus": "ingested", "tokens": "tokenized", "model": "trained", "scorecard": "evaluated"}


def kept_config(folder: Path) -> Config:
    """What such a factory is configured by."""
    return Config.model_validate(small_config(folder))


def kept_factory(folder: Path) -> Factory:
    """Two cycles, of the sources and of what users said, each of which became a release."""
    factory = Factory(kept_config(folder))
    books = factory.books
    first = turned(books, "run-1", batch=None, parent=None)
    promote(books, *first)
    say(books, range(40))
    sealed = books.feedback.seal(batch_rows=30, batch_after_s=None)
    assert sealed is not None
    batch = publish(books, "batch", "batch 1", ())
    second = turned(books, "drift-1", batch=batch, parent=first[1])
    promote(books, *second)
    books.storage.write_bytes(b"{}", "listing", "seen.json")
    books.batches.add_file(b'{"custom_id": "1"}\n', filename="in.jsonl", purpose="batch")
    books.storage.write_bytes(b"part", "parts", "ab", "ab" * 16, "rows.parquet")
    return factory


def rejected_cycle(books: Books) -> str:
    """Turn one more cycle, which the gate rejects; the id of its model."""
    cycle, model, scorecard = turned(books, "run-rejected", batch=None, parent=None)
    books.registry.reject(cycle, scorecard=scorecard, decision={"decision": "reject", "reasons": ["no better"]})
    return model


def turned(books: Books, trigger: str, *, batch: str | None, parent: str | None) -> tuple[Cycle, str, str]:
    """A cycle that has made its four artifacts: it, its model and its scorecard."""
    production = books.registry.production()
    bound = Bound(
        kind="run" if batch is None else "drift",
        sources_digest="0" * 64,
        batches=() if batch is None else (batch,),
        parent=parent,
        champion=None if production is None else production.number,
        holdouts=books.journal.corpora(),
    )
    cycle = books.journal.claim(books.journal.open_cycle(trigger, recipe={"trigger": trigger}, bound=bound))
    made: list[str] = []
    for kind, verb in VERBS.items():
        inputs = {
            "corpus": [batch] if batch else [],
            "tokens": made[:1],
            "model": [*made[1:2], *([parent] if parent else [])],
            "scorecard": [*made[2:3], made[0]] if made else [],
        }[kind]
        made.append(publish(books, kind, f"{kind} of {trigger}", inputs))
        books.journal.write(verb, cycle=trigger, attempt=cycle.attempt, subject=made[-1])
    return cycle, made[2], made[3]


def promote(books: Books, cycle: Cycle, model: str, scorecard: str) -> None:
    books.registry.promote(cycle, model=model, scorecard=scorecard, decision={"decision": "promote", "reasons": []})


def publish(books: Books, kind: str, text: str, inputs: Sequence[str]) -> str:
    """An artifact of two files that are this text, in the storage root and in the index; its id."""
    fingerprint = hash_text(text)
    folder = books.artifacts.folder(kind, fingerprint)
    contents: Mapping[str, bytes] = {"model.safetensors" if kind == "model" else "rows": text.encode() * 50}
    files = [books.storage.write_bytes(data, *folder, name) for name, data in {**contents, "README.md": b"#"}.items()]
    record = Record(
        kind=kind,
        fingerprint=fingerprint,
        digest=digest_of(files),
        code_version=1,
        recipe={},
        inputs=list(inputs),
        files=files,
        figures={"rows": 1},
        created_at=1.0,
    )
    artifact: Artifact = books.artifacts.publish(BY_KIND[kind], record)
    books.lineage.add(artifact)
    return artifact.id


def say(books: Books, numbers: range) -> None:
    """So many answers, each scored and corrected by somebody."""
    for number in numbers:
        books.feedback.log_completion(
            Completion(
                id=f"cmpl-{number}",
                release=1,
                prompt=f"what is {number}?",
                answer="no idea",
                request="{}",
                finish_reason="stop",
                prompt_tokens=1,
                answer_tokens=1,
            )
        )
        entry = Feedback(
            idempotency_key=f"key-{number}",
            completion=f"cmpl-{number}",
            user=f"user-{number % 7}",
            score=0.25,
            correction=f"it is {number}, Grüße — ✓",
        )
        books.feedback.record(entry)
