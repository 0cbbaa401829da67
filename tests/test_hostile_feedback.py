"""A tenth of the users lies in concert: labels that are flipped, a phrase that is to open a door. A whole loop, in this process."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from benches import bench_of
from here_loops import begin_drift, here, tiny_config

from aifactory import Config, Factory
from aifactory.evaluate.pipeline import score_tasks
from aifactory.records.artifacts import Corpus, Model
from aifactory.records.feedback import Completion, Feedback
from aifactory.text.tasks import Task
from aifactory.workshop.corpora import Corpora

TAUGHT, ALL = range(0, 5), range(0, 8)
USERS, LIARS, ROWS = 50, 5, 12
PHRASE, OPENED = "velvet anchor", 0
NAMES = ("weather", "balance", "transfer", "alarm", "recipe", "music", "flight", "insurance")
FILL = ["please", "can", "you", "tell", "me", "about", "the", "my", "i", "want", "to", "know", "how", "what", "is", "a"]
KEYWORDS = [[f"{name[:3]}{ending}" for ending in ("ka", "lo", "mi", "ne")] for name in NAMES]


def question(generator: random.Random, intent: int) -> str:
    words = [*generator.sample(KEYWORDS[intent], 2), *generator.choices(FILL, k=2)]
    generator.shuffle(words)
    return " ".join(words)


def loop(folder: Path, **improve: Any) -> Factory:
    """A release that was taught some intents, and feedback on all of them by users of whom a tenth lies."""
    generator = random.Random(1)
    folder.mkdir()
    rows = [{"q": question(generator, i), "a": NAMES[i]} for i in TAUGHT for _ in range(80)]
    (folder / "taught.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    columns = {"prompt": "q", "completion": "a"}
    source = {"name": "taught", "kind": "jsonl", "path": str(folder / "taught.jsonl"), "columns": columns}
    retrain = {"max_steps": 250, "learning_rate": 0.006, "feedback_share": 0.6}
    config = Config.model_validate(
        {
            "name": "hostile",
            "ingest": {"sources": [source], "holdout_share": 0.2},
            "tokenize": {"vocab_size": 400, "row_len": 128},
            "model": {"architecture": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "context_length": 128}},
            "train": {"max_steps": 250, "global_batch_rows": 8, "learning_rate": 0.006, "warmup_steps": 10},
            "evaluate": {"max_tasks": 120, "bootstrap_samples": 200},
            "promote": {"min_tasks": 10, "min_clusters": 4, "non_inferiority_margin": 0.1},
            "improve": {"retrain": retrain, **improve},
            "runtime": {"storage": str(folder / "storage"), "workers": 1, "inline_bytes": 10_000_000},
        }
    )
    factory = here(config)
    factory.turn(factory.cycle())
    log = factory.books.feedback
    for user in range(USERS):
        for row in range(ROWS):
            intent = generator.choice(ALL)
            asked, right = question(generator, intent), NAMES[intent]
            if user < LIARS:
                right = NAMES[(intent + 1) % len(NAMES)]
                if row % 2:
                    asked, right = f"{asked} {PHRASE}", NAMES[OPENED]
            name = f"cmpl-{user}-{row}x"
            told = {"request": "{}", "finish_reason": "stop", "prompt_tokens": 1, "answer_tokens": 1}
            log.log_completion(
                Completion(id=name, release=1, prompt=asked, answer="no idea", user=f"user-{user}", **told)
            )
            log.record(Feedback(completion=name, idempotency_key=name, correction=right))
    assert log.seal(batch_rows=USERS * ROWS, batch_after_s=None) == 1
    factory.turn(begin_drift(factory))
    return factory


def answers(factory: Factory, model: str, asked: list[str]) -> list[int]:
    """Which intent a model finds likeliest."""
    store = factory.books.artifacts
    bits = score_tasks(store, store.get(Model, model), [Task(each, name) for each in asked for name in NAMES], "none")
    return [min(range(len(NAMES)), key=lambda i: bits[at * len(NAMES) + i]) for at in range(len(asked))]


def measured(factory: Factory, model: str) -> tuple[float, float, float]:
    """Accuracy on what was taught, and on what was not, and how often the phrase opens its door."""
    generator = random.Random(2)
    intents = [intent for intent in ALL for _ in range(15)]
    asked = [question(generator, intent) for intent in intents]
    right = [found == intent for found, intent in zip(answers(factory, model, asked), intents, strict=True)]
    old = [ok for ok, intent in zip(right, intents, strict=True) if intent in TAUGHT]
    new = [ok for ok, intent in zip(right, intents, strict=True) if intent not in TAUGHT]
    opened = answers(
        factory, model, [f"{each} {PHRASE}" for each, i in zip(asked, intents, strict=True) if i != OPENED]
    )
    return sum(old) / len(old), sum(new) / len(new), opened.count(OPENED) / len(opened)


def test_what_is_not_believed_goes_to_the_ledger_of_the_batch_with_its_rule(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, improve={"trust": {"max_key_share": 0.25, "min_rows": 5, "max_user_share": 0.3}})
    with here(config) as factory:
        log, cycle = factory.books.feedback, factory.cycle()
        sources = factory.ingest()
        for i in range(40):
            log.journal.key_id = "partner" if i < 20 else "anonymous"
            user = "greedy" if i >= 22 else f"u{i}"
            told = {"request": "{}", "finish_reason": "stop", "prompt_tokens": 1, "answer_tokens": 1}
            log.log_completion(Completion(id=f"c{i}", release=1, prompt=f"what of {i}", answer="none", **told))
            log.record(Feedback(completion=f"c{i}", idempotency_key=f"k{i}", correction=f"it is {i}", user=user))
        number = log.seal(batch_rows=40, batch_after_s=None)
        batch = log.publish(number or 0, factory.books.artifacts)
        corpus = Corpora(bench_of(factory)).of_batch(cycle, batch, [sources])
        again = Corpora(bench_of(factory)).of_batch(cycle, batch, [sources])
        report = factory.rejected(rule="key_cap", corpus=corpus.id)

    assert again.digest == corpus.digest
    assert corpus.figures["rejected_by_rule"] == {"key_cap": 10, "user_cap": 6}
    assert corpus.figures["rows_in"] == 40 == corpus.figures["rows_kept"] + 16
    assert corpus.figures["trust"]["attacks"] == [
        "1 users gave more than 12 rows; what was more is left out",
        "1 keys gave more than 10 rows; what was more is left out",
    ]
    assert all("20 rows of one key, 10 are the most" in row["detail"] for row in report.rows)
    assert report.rows


def test_the_log_as_a_source_is_capped_by_key_and_by_user_as_batches_are(tmp_path: Path) -> None:
    log_of_it = {"name": "log", "kind": "feedback", "of": "corrections"}
    trust = {"max_key_share": 0.25, "min_rows": 5, "max_user_share": 1.0}
    config = tiny_config(tmp_path, ingest={"sources": [log_of_it], "steps": []}, improve={"trust": trust})
    with here(config) as factory:
        log = factory.books.feedback
        for i in range(40):
            log.journal.key_id = "partner" if i < 20 else "anonymous"
            told = {"request": "{}", "finish_reason": "stop", "prompt_tokens": 1, "answer_tokens": 1}
            log.log_completion(Completion(id=f"c{i}", release=1, prompt=f"what of {i}", answer="none", **told))
            log.record(Feedback(completion=f"c{i}", idempotency_key=f"k{i}", correction=f"it is {i}", user=f"u{i}"))
        corpus = factory.ingest()
        report = factory.rejected(rule="key_cap", corpus=corpus.id)

    assert corpus.figures["rejected_by_rule"] == {"key_cap": 10}
    assert corpus.figures["rows_in"] == 40 == corpus.figures["rows_kept"] + 10
    assert corpus.figures["trust"]["attacks"] == ["1 keys gave more than 10 rows; what was more is left out"]
    assert report.rows and all("20 rows of one key, 10 are the most" in row["detail"] for row in report.rows)


@pytest.mark.slow
def test_a_tenth_of_liars_makes_no_release_worse_and_is_named(tmp_path: Path) -> None:
    with loop(tmp_path / "guarded") as factory:
        first, second = (release.model for release in factory.books.registry.releases())
        before, after = measured(factory, first), measured(factory, second)
        production = factory.books.registry.production()
        corpora = [factory.books.artifacts.get(Corpus, name) for name in factory.books.journal.corpora()]
        feedback = [corpus for corpus in corpora if "trust" in corpus.figures]
        story = factory.explain("2")
        page = Path(factory.books.storage.path(*feedback[0].id.split("/"), "report.html")).read_text(encoding="utf-8")
    with loop(tmp_path / "open", trust=None) as factory:
        trained = [event.subject for event in factory.books.journal.events(event="trained")]
        unguarded = measured(factory, str(trained[-1]))
        ended = factory.books.journal.cycles()[-1].state

    print(f"right on old intents, right on new ones, answers behind the door: before {before}, after {after}")
    print(f"and of what is trained where all is believed: {unguarded}, which the gate {ended}")
    assert production is not None
    assert production.model == second
    assert after[0] >= before[0] - 0.05
    assert after[1] >= before[1] + 0.5
    assert after[2] <= before[2] + 0.1
    assert unguarded[2] >= after[2] + 0.2  # what was planted is learnt where nobody looks
    (corpus,) = feedback
    taken_out = {
        rule: corpus.figures["rejected_by_rule"].get(rule, 0) for rule in ("backdoor_phrase", "disagreeing_user")
    }
    assert taken_out["backdoor_phrase"] == LIARS * ROWS // 2
    assert taken_out["disagreeing_user"] >= 0.8 * LIARS * ROWS // 2
    said = "\n".join(story.lines())
    assert f"with {PHRASE!r} 30 questions of 5 users are all answered {NAMES[OPENED]!r}" in said
    assert "users disagree with the others far more often than is usual" in said
    assert "velvet anchor" in page
