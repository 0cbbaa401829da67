"""Reports from the books alone, whole and half-finished; and lineage by any name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aifactory.config import Config
from aifactory.errors import StateError
from aifactory.records.artifacts import Corpus, Model, Record, Scorecard, TokenSet, digest_of
from aifactory.records.books import Books
from aifactory.records.feedback import Completion, Feedback
from aifactory.records.journal import Bound, Cycle
from aifactory.report import Report, lineage_of

INTERVAL = {"estimate": 1.5, "low": 1.25, "high": 1.75, "confidence": 0.95, "num_examples": 40, "num_clusters": 9}
BETTER = {**INTERVAL, "estimate": -0.5, "low": -0.75, "high": -0.25}
HOLDOUT = {"name": "holdout", "candidate": INTERVAL, "champion": None, "over_champion": None}
TARGET = {"name": "target", "candidate": INTERVAL, "champion": INTERVAL, "over_champion": BETTER}
FIGURES: dict[str, dict[str, Any]] = {
    "ingested": {"rows_in": 13, "rows_kept": 10, "rows_rejected": 3, "rejected_by_rule": {"empty": 1, "length": 2}},
    "tokenized": {"tokens": 1_234, "packed_rows": 5},
    "trained": {"tokens_per_s": 4_567.8, "steps": 9},
    "evaluated": {
        "holdout": HOLDOUT,
        "target": TARGET,
        "known": None,
        "unigram_bits_per_byte": 5.0,
        "gzip_bits_per_byte": 2.5,
    },
}
NOUNS: dict[str, Any] = {"ingested": Corpus, "tokenized": TokenSet, "trained": Model, "evaluated": Scorecard}


@pytest.fixture
def books(tmp_path: Path) -> Books:
    source = {"name": "docs", "kind": "text", "path": "nowhere"}
    values = {"name": "small", "ingest": {"sources": [source]}, "runtime": {"storage": str(tmp_path)}}
    return Books(Config.model_validate(values))


def begin(books: Books, trigger: str, champion: int | None = None) -> Cycle:
    bound = Bound(kind="run", sources_digest="x", champion=champion)
    return books.journal.claim(books.journal.open_cycle(trigger, recipe={}, bound=bound))


def make(books: Books, cycle: Cycle, event: str, *inputs: str, source: str = "estimate") -> str:
    """An artifact as the workshop enters it."""
    noun = NOUNS[event]
    record = Record(
        kind=noun.kind,
        fingerprint=f"{cycle.number:04x}{len(books.journal.events()):012x}" + "0" * 48,
        digest=digest_of([]),
        code_version=1,
        recipe={},
        inputs=list(inputs),
        files=[],
        figures=FIGURES[event],
        seconds=2.0,
        joules=100.0,
        joules_source=source,
    )
    artifact = books.artifacts.publish(noun, record)
    books.lineage.add(artifact)
    books.journal.write(
        event,
        cycle=cycle.trigger,
        attempt=cycle.attempt,
        subject=artifact.id,
        detail=FIGURES[event],
        seconds=2.0,
        joules=100.0,
        joules_source=source,
    )
    return str(artifact.id)


def turn(books: Books, trigger: str, *, sources: str = "estimate", champion: int | None = None) -> list[str]:
    """A whole cycle; the ids of what it made."""
    cycle = begin(books, trigger, champion)
    corpus = make(books, cycle, "ingested", source=sources)
    tokens = make(books, cycle, "tokenized", corpus, source=sources)
    model = make(books, cycle, "trained", tokens, source=sources)
    card = make(books, cycle, "evaluated", model, corpus, source=sources)
    books.registry.promote(
        cycle, model=model, scorecard=card, decision={"decision": "promote", "reasons": ["it beat it"]}
    )
    return [corpus, tokens, model, card]


def answer(books: Books, number: int, release: int) -> None:
    books.feedback.log_completion(
        Completion(
            id=f"cmpl-{number}",
            release=release,
            prompt="p",
            answer="a",
            request="{}",
            finish_reason="stop",
            prompt_tokens=1,
            answer_tokens=1,
        )
    )


def test_empty_books_make_a_report(books: Books) -> None:
    report = Report.of(books)

    assert (report.production, report.releases, report.cycles, report.joules) == (None, [], [], 0)
    assert report.lines()[0].startswith("Factory small: no release yet in production")
    assert "0 on 0 answers, 0 batches" in report.lines()[-1]


def test_the_numbers_of_the_cycles_add_up(books: Books) -> None:
    first = turn(books, "run-1", sources="rapl")
    turn(books, "run-2", sources="estimate", champion=1)
    answer(books, 1, 1)
    books.feedback.record(Feedback(completion="cmpl-1", idempotency_key="k", score=0.5))

    report = Report.of(books)

    one, two = report.cycles
    assert (one.rows_kept, one.rows_rejected, one.tokens, one.tokens_per_s) == (10, 3, 1_234, 4_567.8)
    assert sum(one.rejected_by_rule.values()) == one.rows_rejected
    assert (one.seconds, one.joules, one.joules_source) == (8, 400, "rapl")
    assert two.joules_source == "estimate"
    assert (report.joules, report.joules_source) == (800, "estimate+rapl")
    assert one.artifacts == first
    assert report.releases == ["small-r1", "small-r2"]
    assert report.production == "small-r2"
    assert report.feedback == {"completions": 1, "feedback": 1, "waiting": 0, "batches": 0}


def test_sources_of_joules_are_named_once(books: Books) -> None:
    mixed = begin(books, "run-1")
    make(books, mixed, "ingested", source="estimate")
    make(books, mixed, "tokenized", source="rapl")
    make(books, begin(books, "run-2"), "ingested", source="rapl")

    assert Report.of(books).joules_source == "estimate+rapl"


def test_what_two_attempts_entered_counts_once(books: Books) -> None:
    cycle = begin(books, "run-1")
    corpus = make(books, cycle, "ingested")
    books.journal.write(
        "ingested", cycle="run-1", subject=corpus, detail=FIGURES["ingested"], seconds=2.0, joules=100.0
    )

    (found,) = Report.of(books).cycles
    assert (found.rows_kept, found.joules, found.artifacts) == (10, 100, [corpus])


def test_lines_say_what_was_made_and_found_with_intervals_and_reasons(books: Books) -> None:
    corpus, *_ = turn(books, "run-1")
    books.journal.write("decided", subject="small-r1", detail={"decision": "wait", "reasons": ["all", "is well"]})
    seen = {"requests": 9, "failed": 2, "failures": ["k1: 500"], "answered_by": {"small-r1": 7}, "corrections": 6}
    books.journal.write("rehearsed", subject="x", detail={**seen, "cycle": None})

    text = "\n".join(Report.of(books).lines())

    assert "10 kept, 3 rejected (1 empty, 2 length)" in text
    assert f"  page        {books.storage.root}/{corpus}/report.html\n" in text
    assert "1,234, trained at 4,568 tokens/s" in text
    assert "8 s in the stages, 400 J (estimate)" in text
    assert "holdout     1.500 [1.250, 1.750] bits per byte, 40 tasks" in text
    assert "before 1.500 [1.250, 1.750], change -0.500 [-0.750, -0.250], 40 tasks" in text
    assert "unigram 5.000, gzip 2.500" in text
    assert "  it beat it" in text
    assert "9 requests, 2 failed (the first: k1: 500); answered 7 by small-r1; 6 corrections." in text
    assert "decided to wait: all; is well" in text


def test_a_report_survives_json(books: Books) -> None:
    turn(books, "run-1")

    plain = Report.of(books).to_json()

    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["cycles"][0]["scores"]["target"]["over_champion"]["high"] == -0.25


def test_half_a_cycle_is_reported_as_far_as_it_came(books: Books) -> None:
    begin(books, "run-1")
    half = begin(books, "run-2")
    make(books, half, "ingested")

    report = Report.of(books)

    assert [(cycle.state, cycle.rows_kept, cycle.tokens_per_s, cycle.scores) for cycle in report.cycles] == [
        ("running", 0, None, {}),
        ("running", 10, None, {}),
    ]
    text = "\n".join(report.lines())
    assert "Cycle 1 (run-1): running\n  nothing made\nCycle 2" in text
    assert "trained at" not in text


def test_artifacts_that_are_gone_do_not_stop_a_report(books: Books) -> None:
    for artifact in turn(books, "run-1"):
        books.storage.delete(*artifact.split("/"))

    (cycle,) = Report.of(books).cycles
    assert (cycle.rows_kept, cycle.tokens, cycle.joules) == (10, 1_234, 400)


def test_users_that_got_no_answer_at_all_are_reported(books: Books) -> None:
    seen = {"requests": 1, "failed": 1, "failures": ["k: gone"], "answered_by": {}, "corrections": 0, "cycle": None}
    books.journal.write("rehearsed", subject="x", detail=seen)

    assert "answered none" in "\n".join(Report.of(books).lines())


def test_lineage_is_found_by_an_answer_a_release_or_an_artifact(books: Books) -> None:
    corpus, tokens, model, card = turn(books, "run-1")
    answer(books, 1, 1)

    tree = lineage_of(books, "cmpl-1")

    assert (tree.kind, tree.parents[0].id) == ("completion", "small-r1")
    assert [parent.id for parent in tree.parents[0].parents] == [model, card]
    lines = tree.lines()
    assert [line.split()[0] for line in lines[:5]] == ["cmpl-1", "small-r1", model, tokens, corpus]
    assert lineage_of(books, "small-r1") == tree.parents[0]
    assert lineage_of(books, tokens).parents[0].id == corpus
    assert json.loads(json.dumps(tree.to_json()))["parents"][0]["id"] == "small-r1"


@pytest.mark.parametrize("subject", ["cmpl-9", "small-r9", "model/9", "other-r1", ""])
def test_what_nobody_knows_is_an_error_that_says_what_was_expected(subject: str, books: Books) -> None:
    turn(books, "run-1")

    with pytest.raises(
        StateError, match=r"expected the id of an answer, a release or an artifact of the factory small"
    ):
        lineage_of(books, subject)


def test_candidates_are_told_apart_and_the_figures_are_those_of_the_chosen(books: Books) -> None:
    cycle = begin(books, "run-1")
    corpus = make(books, cycle, "ingested")
    tokens = make(books, cycle, "tokenized", corpus)
    models = [make(books, cycle, "trained", tokens) for _ in range(2)]
    cards = [make(books, cycle, "evaluated", model, corpus) for model in models]
    compared = [
        {"model": model, "scorecard": card, "differs": differs, "holdout": INTERVAL}
        for model, card, differs in zip(models, cards, [{}, {"seed": 2}], strict=True)
    ]
    # It was made in this cycle, and the next one takes it over: there it stands in no event but this.
    again = begin(books, "run-2")
    for each in (cycle, again):
        detail = {"candidates": compared, "scorecard": cards[1]}
        books.journal.write("chosen", cycle=each.trigger, attempt=1, subject=models[1], detail=detail)
    first, second = Report.of(books).cycles

    for report in (first, second):
        assert [(each["model"], each["chosen"]) for each in report.candidates] == [
            (models[0], False),
            (models[1], True),
        ]
        assert (report.tokens_per_s, report.scores["holdout"]["candidate"]) == (4_567.8, INTERVAL)
    lines = "\n".join(Report.of(books).lines())
    assert f"candidate   as train says: 1.500 [1.250, 1.750] bits per byte, {models[0]}\n" in lines
    assert f"candidate   seed: 2: 1.500 [1.250, 1.750] bits per byte, {models[1]} (chosen)" in lines
