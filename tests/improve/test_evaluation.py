"""Evaluation, tick by tick, over real books."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from aifactory.config import AnswerGuards, LabelByModelStep
from aifactory.errors import FencedError, StorageError
from aifactory.improve.decision import Retrain, Wait
from aifactory.improve.evaluation import (
    BITS,
    SIMILARITY,
    Evaluation,
    decide_now,
    is_settled,
    observe,
    published_batches,
)
from aifactory.records.books import Books
from aifactory.records.feedback import Completion, Feedback
from aifactory.records.journal import Bound, Cycle
from aifactory.report import Report

Tools = Any


def drifts(books: Books) -> list[Cycle]:
    return [cycle for cycle in books.journal.cycles() if cycle.bound.kind == "drift"]


def events(books: Books, event: str) -> list[Any]:
    return books.journal.events(event=event)


def ticks(evaluation: Evaluation, number: int = 4) -> None:
    for _ in range(number):
        evaluation.tick()


def test_an_answer_is_scored_once_by_the_release_that_gave_it(books: Books, tools: Tools) -> None:
    scorer, launcher = tools.Scorer(1.0), tools.FakeLauncher(books)
    tools.correct(books, 3)
    second = books.journal.open_cycle("run-2", recipe={}, bound=Bound(kind="run", sources_digest="y", champion=1))
    tools.promote(books, books.journal.claim(second))
    tools.correct(books, 2, release=2, start=3)

    ticks(Evaluation(books, score=scorer, launcher=launcher))
    ticks(Evaluation(books, score=scorer, launcher=launcher))

    models = {release.number: release.model for release in books.registry.releases()}
    assert scorer.asked == [(models[1 if i < 3 else 2], f"as it should be {i}") for i in range(5)]
    (first, *_) = books.feedback.scores(metric=BITS, release=2)
    assert (first.value, first.weight) == (pytest.approx(1.0, abs=0.03), len("as it should be 3"))
    assert len(books.feedback.scores(metric=SIMILARITY, release=1)) == 3


def test_a_long_queue_is_scored_a_part_a_tick(books: Books, tools: Tools) -> None:
    tools.correct(books, 70)
    scorer = tools.Scorer(1.0)
    evaluation = Evaluation(books, score=scorer, launcher=tools.FakeLauncher(books))

    evaluation.tick()
    assert len(scorer.asked) == 64
    evaluation.tick()
    assert len(scorer.asked) == 70


def test_batches_are_sealed_by_count_and_the_rest_waits(books: Books, tools: Tools) -> None:
    tools.correct(books, 19)

    Evaluation(books, score=tools.Scorer(1.0), launcher=tools.FakeLauncher(books)).tick()

    assert [batch.num_rows for batch in published_batches(books)] == [8, 8]
    assert books.feedback.counts()["waiting"] == 3
    assert books.lineage.tree(published_batches(books)[0].id) is not None


def test_answers_within_the_standard_are_no_reason_to_retrain(books: Books, tools: Tools) -> None:
    tools.correct(books, 16)
    evaluation = Evaluation(books, score=tools.Scorer(0.9), launcher=tools.FakeLauncher(books))

    decision = evaluation.tick()

    assert isinstance(decision, Wait)
    assert decision.awaited == "drift"
    assert drifts(books) == []


def test_answers_below_the_standard_give_one_cycle_bound_to_what_it_reads(books: Books, tools: Tools) -> None:
    tools.correct(books, 16)
    launcher = tools.FakeLauncher(books)
    evaluation = Evaluation(books, score=tools.Scorer(), launcher=launcher)

    assert isinstance(evaluation.tick(), Retrain)
    ticks(evaluation)

    (cycle,) = drifts(books)
    production = books.registry.production()
    assert production is not None
    assert cycle.bound.parent == production.model
    assert cycle.bound.champion == 1
    assert cycle.bound.batches == sorted(batch.id for batch in published_batches(books))
    assert launcher.turned == [(cycle.trigger, 1)]


def test_a_cycle_is_bound_to_the_models_that_its_steps_ask_for(books: Books, tools: Tools) -> None:
    step = LabelByModelStep(step="label_by_model", model="registry:production", prompt="{text}", labels=("a", "b"))
    ingest = books.config.ingest.model_copy(update={"steps": (step,)})
    books.config = books.config.model_copy(update={"ingest": ingest})
    tools.correct(books, 16)

    Evaluation(books, score=tools.Scorer(), launcher=tools.FakeLauncher(books)).tick()

    (cycle,) = drifts(books)
    production = books.registry.production()
    assert production is not None
    assert [tuple(each) for each in cycle.bound.models] == [("registry:production", production.model)]


def test_decisions_are_written_down_when_they_change_and_not_again_after_a_restart(books: Books, tools: Tools) -> None:
    scorer, launcher = tools.Scorer(), tools.FakeLauncher(books)
    evaluation = Evaluation(books, score=scorer, launcher=launcher)

    ticks(evaluation)
    tools.correct(books, 2)
    ticks(evaluation)
    tools.correct(books, 14, start=2)
    ticks(evaluation)
    ticks(Evaluation(books, score=scorer, launcher=launcher))

    said = [
        (event.subject, event.detail["decision"], event.detail.get("awaited")) for event in events(books, "decided")
    ]
    assert said == [("small-r1", "wait", "scores"), ("small-r1", "retrain", None), ("small-r1", "wait", "cycle")]


def test_a_rejected_cycle_is_not_begun_again_until_there_are_new_batches_and_then_all_are_bound(
    books: Books, tools: Tools
) -> None:
    tools.correct(books, 8)
    launcher = tools.FakeLauncher(books, tools.reject)
    evaluation = Evaluation(books, score=tools.Scorer(), launcher=launcher)

    ticks(evaluation)
    assert [cycle.state for cycle in drifts(books)] == ["rejected"]
    assert evaluation.tick().to_json()["awaited"] == "scores"  # what it was begun for is no reason for another

    tools.correct(books, 8, start=8)
    ticks(evaluation)
    first, second = drifts(books)
    assert second.state == "rejected"
    assert len(second.bound.batches) == 2
    assert set(first.bound.batches) < set(second.bound.batches)
    assert len(launcher.turned) == 2


def test_a_batch_that_the_gate_has_named_is_read_by_no_later_cycle(books: Books, tools: Tools) -> None:
    def refuse(books: Books, cycle: Cycle) -> None:
        (batch, *_) = cycle.bound.batches
        books.registry.reject(cycle, scorecard="scorecard/x", decision={"reasons": ["lies"], "refused": [batch]})

    tools.correct(books, 8)
    evaluation = Evaluation(books, score=tools.Scorer(), launcher=tools.FakeLauncher(books, refuse))
    ticks(evaluation)
    (first,) = drifts(books)
    assert books.journal.refused_batches() == set(first.bound.batches)
    assert evaluation.tick().to_json()["decision"] == "wait"

    tools.correct(books, 8, start=8)
    ticks(evaluation)

    second = drifts(books)[1]
    assert len(second.bound.batches) == 1
    assert not set(second.bound.batches) & set(first.bound.batches)


def test_the_cool_down_counts_from_the_end_of_the_last_retrain(tmp_path: Path, tools: Tools) -> None:
    books = tools.small_books(tmp_path, cooldown_s=100)
    tools.first_release(books)
    tools.correct(books, 8)
    evaluation = Evaluation(books, score=tools.Scorer(), launcher=tools.FakeLauncher(books, tools.reject))
    ticks(evaluation)
    tools.correct(books, 8, start=8)

    assert evaluation.tick().to_json()["awaited"] == "cooldown"
    books.journal.clock.at += 100
    assert isinstance(evaluation.tick(), Retrain)


def test_a_cycle_whose_attempts_are_used_up_is_failed_and_says_why(books: Books, tools: Tools) -> None:
    tools.correct(books, 8)
    launcher = tools.FakeLauncher(books)
    evaluation = Evaluation(books, score=tools.Scorer(), launcher=launcher)

    for attempt in range(1, 4):
        evaluation.tick()
        launcher.at_work.clear()
        launcher.why = f"the disk was full in attempt {attempt}"
    evaluation.tick()

    (cycle,) = drifts(books)
    assert cycle.state == "failed"
    assert cycle.decision is not None
    assert cycle.decision["reasons"] == [
        "3 attempts ended without a result",
        "the last: the disk was full in attempt 3",
    ]
    assert [attempt for _, attempt in launcher.turned] == [1, 2, 3]
    ticks(evaluation)
    assert len(launcher.turned) == 3
    assert len(drifts(books)) == 1


def test_attempts_that_end_before_they_claim_the_cycle_are_used_up_too(books: Books, tools: Tools) -> None:
    class Broken(tools.FakeLauncher):  # type: ignore[misc, name-defined]
        def turn(self, cycle: Cycle) -> None:
            self.turned.append((cycle.trigger, cycle.attempt))

    tools.correct(books, 8)
    launcher = Broken(books)

    ticks(Evaluation(books, score=tools.Scorer(), launcher=launcher), 8)

    assert [cycle.state for cycle in drifts(books)] == ["failed"]
    assert len(launcher.turned) == 3


def test_attempts_that_ended_with_the_actor_that_watched_them_are_not_used_up(books: Books, tools: Tools) -> None:
    tools.correct(books, 8)
    for _ in range(6):
        ticks(Evaluation(books, score=tools.Scorer(), launcher=tools.FakeLauncher(books)))
    launcher = tools.FakeLauncher(books, tools.promote)
    ticks(Evaluation(books, score=tools.Scorer(), launcher=launcher))

    assert launcher.turned[0][1] == 7
    assert [cycle.state for cycle in drifts(books)] == ["promoted"]


def test_what_ended_its_cycle_just_now_is_neither_turned_again_nor_counted_as_failed(
    books: Books, tools: Tools
) -> None:
    class EndsWhenAsked(tools.FakeLauncher):  # type: ignore[misc, name-defined]
        def is_turning(self, cycle: Cycle) -> bool:
            if cycle.trigger in self.at_work:
                self.at_work.clear()
                tools.promote(books, cycle)
            return False

    tools.correct(books, 8)
    launcher = EndsWhenAsked(books)

    ticks(Evaluation(books, score=tools.Scorer(), launcher=launcher))

    assert len(launcher.turned) == 1
    assert events(books, "attempt_failed") == []


def test_a_stale_attempt_is_fenced(books: Books, tools: Tools) -> None:
    tools.correct(books, 8)
    Evaluation(books, score=tools.Scorer(), launcher=tools.FakeLauncher(books)).tick()
    (stale,) = drifts(books)
    Evaluation(books, score=tools.Scorer(), launcher=tools.FakeLauncher(books)).tick()

    with pytest.raises(FencedError):
        tools.promote(books, stale)
    tools.promote(books, drifts(books)[0])


def test_a_cycle_of_a_driver_holds_a_retrain_up_only_while_it_can_still_promote(books: Books, tools: Tools) -> None:
    tools.correct(books, 8)
    ingested_only = books.journal.open_cycle(
        "run-2", recipe={}, bound=Bound(kind="run", sources_digest="y", champion=1)
    )
    outdated = books.journal.open_cycle("run-3", recipe={}, bound=Bound(kind="run", sources_digest="z", champion=None))
    books.journal.claim(outdated)
    scorer = tools.Scorer()
    other = tools.FakeLauncher(books)
    Evaluation(books, score=scorer, launcher=other)._score_corrections()
    Evaluation(books, score=scorer, launcher=other)._seal_batches()

    assert isinstance(decide_now(books), Retrain)
    books.journal.claim(ingested_only)
    assert observe(books, published_batches(books)).running == "run-2"


# ── killed ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def end_state(books: Books) -> dict[str, Any]:
    """What must be the same, whatever was killed: no times, no numbers of attempts."""
    return {
        "cycles": [(c.trigger, c.state, list(c.bound.batches), c.bound.champion) for c in books.journal.cycles()],
        "releases": [(r.number, r.trigger, r.model) for r in books.registry.releases()],
        "scores": books.feedback.scores(metric=BITS, release=1),
        "feedback": books.feedback.counts(),
        "decided": [(e.subject, e.detail["decision"], e.detail.get("awaited")) for e in events(books, "decided")],
        "sealed": [e.subject for e in events(books, "sealed")],
        "batches": [batch.digest for batch in published_batches(books)],
    }


def test_one_drift_gives_one_release_whatever_transaction_of_a_tick_it_is_killed_at(
    tmp_path: Path, tools: Tools
) -> None:
    template = tools.small_books(tmp_path / "template")
    tools.first_release(template)
    tools.correct(template, 16)
    template.close()

    def live(name: str, dies_at: int | None, *, after_commit: bool) -> tuple[Books, int]:
        """Killed once, then left in peace; gives the books and the number of transactions that it lived."""
        tools.copied(tmp_path / "template", tmp_path / name)
        books = tools.small_books(tmp_path / name)
        clock = books.journal.clock
        mortal = tools.MortalDatabase(str(books.database.url), dies_at=dies_at, after_commit=after_commit)
        tools.with_database(books, mortal, clock)
        with contextlib.suppress(tools.Death):
            run(books)
        lived = mortal.num_writes
        mortal.close()
        books = tools.small_books(tmp_path / name)
        run(books)
        return books, lived

    def run(books: Books) -> None:
        launcher = tools.FakeLauncher(books, tools.promote)
        ticks(Evaluation(books, score=tools.Scorer(), launcher=launcher), 4)

    uninterrupted, num_writes = live("uninterrupted", None, after_commit=False)
    expected = end_state(uninterrupted)
    assert [state for _, state, *_ in expected["cycles"]] == ["promoted", "promoted"]
    assert num_writes >= 9
    for dies_at in range(1, num_writes + 1):
        for after_commit in (False, True):
            books, lived = live(f"{dies_at}-{after_commit}", dies_at, after_commit=after_commit)
            assert lived == dies_at
            assert end_state(books) == expected, (dies_at, after_commit)
            books.close()


@pytest.mark.parametrize("where", ["score", "turn", "is_turning"])
def test_one_drift_gives_one_release_if_it_is_killed_in_the_scorer_or_the_launcher(
    where: str, books: Books, tools: Tools
) -> None:
    class Dies(tools.FakeLauncher):  # type: ignore[misc, name-defined]
        def turn(self, cycle: Cycle) -> None:
            super().turn(cycle)
            if where == "turn":
                raise tools.Death

        def is_turning(self, cycle: Cycle) -> bool:
            if where == "is_turning":
                raise tools.Death
            return bool(super().is_turning(cycle))

    def score(*_: Any) -> list[float]:
        raise tools.Death

    tools.correct(books, 16)
    scorer = score if where == "score" else tools.Scorer()
    with pytest.raises(tools.Death):
        ticks(Evaluation(books, score=scorer, launcher=Dies(books)))
    ticks(Evaluation(books, score=tools.Scorer(), launcher=tools.FakeLauncher(books, tools.promote)))

    assert [cycle.state for cycle in drifts(books)] == ["promoted"]
    assert [release.number for release in books.registry.releases()] == [1, 2]


# ── poison ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_correction_that_cannot_be_scored_weighs_nothing_and_stops_no_other(books: Books, tools: Tools) -> None:
    tools.correct(books, 16)
    scorer = tools.Scorer()
    scorer.poison = {"as it should be 0"}
    evaluation = Evaluation(books, score=scorer, launcher=tools.FakeLauncher(books))

    assert isinstance(evaluation.tick(), Retrain)
    asked = len(scorer.asked)
    ticks(evaluation)

    assert len(scorer.asked) == asked == 15
    assert [score.weight for score in books.feedback.scores(metric=BITS, release=1)][:2] == [
        0,
        len("as it should be 1"),
    ]
    assert observe(books, []).num_scored == 15
    assert books.feedback.corrections(unscored_by=BITS) == []


def test_bits_that_are_no_number_and_empty_corrections_count_for_nothing(books: Books, tools: Tools) -> None:
    tools.correct(books, 1)
    books.feedback.log_completion(
        Completion(
            id="cmpl-e",
            release=1,
            prompt="",
            answer="",
            request="{}",
            finish_reason="stop",
            prompt_tokens=1,
            answer_tokens=0,
        )
    )
    books.feedback.record(Feedback(completion="cmpl-e", idempotency_key="e", correction=""))

    def score(_store: Any, _model: Any, given: Any) -> list[float]:
        return [math.nan if task.answer else 0.0 for task in given]

    Evaluation(books, score=score, launcher=tools.FakeLauncher(books)).tick()

    assert [(s.value, s.weight) for s in books.feedback.scores(metric=BITS, release=1)] == [(0, 0), (0, 0)]
    assert observe(books, []).num_scored == 0


def test_an_empty_answer_resembles_nothing(books: Books, tools: Tools) -> None:
    tools.correct(books, 1)
    books.feedback.log_completion(
        Completion(
            id="cmpl-e",
            release=1,
            prompt="p",
            answer="",
            request="{}",
            finish_reason="stop",
            prompt_tokens=1,
            answer_tokens=0,
        )
    )
    books.feedback.record(Feedback(completion="cmpl-e", idempotency_key="e", correction="something"))

    Evaluation(books, score=tools.Scorer(), launcher=tools.FakeLauncher(books)).tick()

    assert books.feedback.scores(metric=SIMILARITY, release=1)[-1].value == 0


def test_long_answers_that_are_hard_to_compare_do_not_hold_the_watch_up(books: Books, tools: Tools) -> None:
    books.feedback.log_completion(
        Completion(
            id="cmpl-l",
            release=1,
            prompt="p",
            answer="abcab" * 400,
            request="{}",
            finish_reason="length",
            prompt_tokens=1,
            answer_tokens=512,
        )
    )
    books.feedback.record(Feedback(completion="cmpl-l", idempotency_key="l", correction="bacba" * 400))
    start = time.monotonic()

    Evaluation(books, score=tools.Scorer(), launcher=tools.FakeLauncher(books)).tick()

    assert 0 < books.feedback.scores(metric=SIMILARITY, release=1)[0].value < 1
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("gone", ["artifact", "scorer"])
def test_a_release_that_cannot_be_scored_stops_neither_the_others_nor_sealing_and_is_tried_again(
    gone: str, books: Books, tools: Tools
) -> None:
    tools.correct(books, 70)
    second = books.journal.open_cycle("run-2", recipe={}, bound=Bound(kind="run", sources_digest="y", champion=1))
    tools.promote(books, books.journal.claim(second))
    tools.correct(books, 8, release=2, start=70)
    scorer = tools.Scorer()
    first = books.registry.release(1)
    assert first is not None
    folder = first.model.split("/")
    record = books.storage.read_bytes(*folder, "record.json")
    if gone == "artifact":
        books.storage.delete(*folder)
    else:
        scorer.poison = {first.model}
    evaluation = Evaluation(books, score=scorer, launcher=tools.FakeLauncher(books))

    evaluation.tick()
    assert isinstance(evaluation.tick(), Retrain)
    ticks(evaluation)

    assert len(books.feedback.scores(metric=BITS, release=2)) == 8
    assert books.feedback.scores(metric=BITS, release=1) == []
    (said,) = events(books, "unscored")
    assert said.subject == "small-r1"
    assert "StorageError" in said.detail["error"] or "poison" in said.detail["error"]

    scorer.poison = set()
    assert record is not None
    books.storage.write_bytes(record, *folder, "record.json")
    books.journal.clock.at += 60
    ticks(evaluation)
    assert len(books.feedback.scores(metric=BITS, release=1)) == 70


def test_a_cycle_that_runs_is_seen_through_though_nothing_can_be_observed(books: Books, tools: Tools) -> None:
    tools.correct(books, 8)
    Evaluation(books, score=tools.Scorer(), launcher=tools.FakeLauncher(books)).tick()
    production = books.registry.production()
    assert production is not None
    books.storage.delete(*production.scorecard.split("/"))
    launcher = tools.FakeLauncher(books, tools.reject)

    with pytest.raises(StorageError):
        Evaluation(books, score=tools.Scorer(), launcher=launcher).tick()

    assert [cycle.state for cycle in drifts(books)] == ["rejected"]


# ── what is observed ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_empty_books_observe_nothing_and_wait_for_a_release(tmp_path: Path, tools: Tools) -> None:
    books = tools.small_books(tmp_path)

    found = observe(books, [])

    assert (found.release, found.standard, found.num_scored, found.new_batches) == (None, None, 0, ())
    assert found.seconds_since_cycle == math.inf
    assert decide_now(books).to_json()["awaited"] == "release"


def test_the_standard_is_what_the_scorecard_says_of_rows_that_were_taught(books: Books, tools: Tools) -> None:
    tools.correct(books, 16)
    Evaluation(books, score=tools.Scorer(2.0), launcher=tools.FakeLauncher(books)).tick()

    found = observe(books, published_batches(books))

    assert found.standard == 1.0
    assert found.num_scored == 16
    assert found.live == pytest.approx(2.0, abs=0.03)
    assert found.below.is_established
    assert found.below.number == 16


def test_a_look_begins_no_cycle_and_writes_nothing_into_the_journal(books: Books, tools: Tools) -> None:
    tools.correct(books, 16)
    evaluation = Evaluation(books, score=tools.Scorer(), launcher=tools.FakeLauncher(books))
    evaluation._score_corrections()
    evaluation._seal_batches()
    before = books.journal.events()

    assert isinstance(decide_now(books), Retrain)
    assert books.journal.events() == before
    assert drifts(books) == []


def test_it_is_settled_only_when_all_was_scored_and_what_is_due_was_sealed(books: Books, tools: Tools) -> None:
    scorer = tools.Scorer(0.5)
    evaluation = Evaluation(books, score=scorer, launcher=tools.FakeLauncher(books))
    assert is_settled(books)
    tools.correct(books, 8)
    assert not is_settled(books)
    evaluation._score_corrections()
    assert not is_settled(books)
    evaluation._seal_batches()
    assert is_settled(books)


def test_what_a_retrain_has_read_is_no_evidence_for_another_one_however_many_batches_come(
    books: Books, tools: Tools
) -> None:
    tools.correct(books, 16)
    scorer, launcher = tools.Scorer(), tools.FakeLauncher(books, tools.reject)
    ticks(Evaluation(books, score=scorer, launcher=launcher))
    scorer.bits_per_byte = 0.5
    tools.correct(books, 40, start=16)

    ticks(Evaluation(books, score=scorer, launcher=launcher))

    found = observe(books, published_batches(books))
    assert len(drifts(books)) == 1
    assert (found.num_scored, found.live, len(found.new_batches)) == (40, pytest.approx(0.5, abs=0.03), 5)


def test_so_many_retrains_a_day_and_no_more(tmp_path: Path, tools: Tools) -> None:
    books = tools.small_books(tmp_path, max_retrains_per_day=2)
    tools.first_release(books)
    evaluation = Evaluation(books, score=tools.Scorer(), launcher=tools.FakeLauncher(books, tools.reject))
    for i in range(4):
        tools.correct(books, 8, start=8 * i)
        ticks(evaluation, 2)
        books.journal.clock.at += 3600

    assert len(drifts(books)) == 2
    assert "2 retrains began in the last 24 hours" in evaluation.tick().reasons[-1]
    books.journal.clock.at += 86_400
    ticks(evaluation)
    assert len(drifts(books)) == 3


# ── prompts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def ask(books: Books, number: int, words: str, *, start: int) -> None:
    generator = random.Random(start)
    answer: dict[str, Any] = {
        "answer": "x",
        "request": "{}",
        "finish_reason": "stop",
        "prompt_tokens": 1,
        "answer_tokens": 1,
    }
    given = []
    for i in range(start, start + number):
        prompt = " ".join(generator.choices(words.split(), k=generator.randint(4, 12)))
        given.append(Completion(id=f"cmpl-{i:08x}", release=1, prompt=prompt, **answer))
    books.feedback.log_completion(*given)
    books.journal.clock.at += 60  # type: ignore[attr-defined]


WEATHER = "will it rain or snow in the north tomorrow and how cold are nights there with wind from the sea"
BANKING = "please transfer my balance to another account before midnight because the card was declined twice today"


def test_prompts_that_become_others_are_said_once_whatever_is_killed_and_begin_no_cycle(
    tmp_path: Path, tools: Tools
) -> None:
    def watched(*, restarts: bool) -> list[Any]:
        books = tools.small_books(tmp_path / str(restarts), prompts={"reference": 100})
        tools.first_release(books)
        books.journal.clock.at += 1
        scorer, launcher = tools.Scorer(0.5), tools.FakeLauncher(books)
        evaluation = Evaluation(books, score=scorer, launcher=launcher)
        for at in range(10):
            ask(books, 40, WEATHER if at < 6 else BANKING, start=40 * at)
            if restarts:
                evaluation = Evaluation(books, score=scorer, launcher=launcher)
            ticks(evaluation, 2)
            assert at >= 6 or not events(books, "drifted")
        assert drifts(books) == []
        assert "prompts are others than they were at first" in evaluation.tick().reasons[0]
        return [(event.subject, event.detail) for event in events(books, "drifted")]

    (found,) = watched(restarts=False)
    assert watched(restarts=True) == [found]
    subject, detail = found
    assert subject == "small-r1"
    assert detail["stability"]["trigrams"] > 0.25
    assert 140 < detail["at"] <= 300


def test_other_prompts_give_one_retrain_and_are_watched_anew_from_its_end(tmp_path: Path, tools: Tools) -> None:
    books = tools.small_books(tmp_path, prompts={"reference": 100, "retrain": True})
    tools.first_release(books)
    books.journal.clock.at += 1
    evaluation = Evaluation(books, score=tools.Scorer(0.5), launcher=tools.FakeLauncher(books, tools.reject))
    for at in range(12):
        ask(books, 40, WEATHER if at < 6 else BANKING, start=100 + 40 * at)
        if at == 6:
            tools.correct(books, 8)
        ticks(evaluation)
        books.journal.clock.at += 1

    (cycle,) = drifts(books)
    began = [e.detail["reasons"][0] for e in events(books, "decided") if e.detail["decision"] == "retrain"]
    assert [each.startswith("prompts are others than they were at first: evidence ") for each in began] == [True]
    assert cycle.state == "rejected"
    tools.correct(books, 8, start=8)
    ticks(evaluation)
    assert len(drifts(books)) == 1
    assert len(events(books, "drifted")) == 1


def test_the_other_choices_of_a_request_are_the_same_prompt_and_count_once(books: Books, tools: Tools) -> None:
    for i in range(30):
        answer = {"answer": "x", "request": "{}", "finish_reason": "stop", "prompt_tokens": 1, "answer_tokens": 1}
        same = [Completion(id=f"cmpl-{i:08x}-{n}", release=1, prompt=f"? {i}", **answer) for n in range(3)]
        books.journal.clock.at += 1  # type: ignore[attr-defined]
        books.feedback.log_completion(*same)
    books.journal.clock.at += 60  # type: ignore[attr-defined]
    evaluation = Evaluation(books, score=tools.Scorer(), launcher=tools.FakeLauncher(books))

    evaluation.tick()

    assert evaluation._prompts is not None
    assert len(evaluation._prompts[1]._first) == 30


# ── guards ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_answers_that_break_a_guard_too_often_are_said_once_and_change_nothing(tmp_path: Path, tools: Tools) -> None:
    books = tools.small_books(tmp_path)
    books.config = books.config.model_copy(
        update={"evaluate": books.config.evaluate.model_copy(update={"guards": AnswerGuards(refusal_share=0.05)})}
    )
    tools.first_release(books)
    asked: list[int] = []

    def check(_: Any, answers: Sequence[str]) -> list[frozenset[str]]:
        asked.append(len(answers))
        return [frozenset({"refusal"} if i % 4 == 0 else ()) for i, _ in enumerate(answers)]

    ask(books, 260, WEATHER, start=0)
    for _ in range(2):  # the second after a restart
        launcher = tools.FakeLauncher(books)
        ticks(Evaluation(books, score=tools.Scorer(), launcher=launcher, check=check), 3)

    (broken,) = events(books, "guard_broken")
    assert asked == [200, 60, 200, 60]
    assert (broken.subject, broken.detail["of"], broken.detail["count"]) == ("small-r1", "refusal", 50)
    assert broken.detail["said"].startswith("50 of 200 answers that refuse; at least ")
    assert drifts(books) == []
    assert "Answers of small-r1: 50 of 200 answers that refuse" in "\n".join(Report.of(books).lines())
