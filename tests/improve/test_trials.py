"""Trials that cycles began, tick by tick, over real books: seen to their ends, once, whatever dies."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from aifactory.improve.decision import Wait
from aifactory.improve.evaluation import BITS, Evaluation, observe, published_batches
from aifactory.improve.trial_decision import Withdraw
from aifactory.records.books import Books
from aifactory.records.journal import Cycle
from aifactory.records.trials import Outcome

Tools = Any
TRIAL = {
    "shadow_share": 0.5,
    "shares": [0.2, 0.6],
    "min_answers": 20,
    "min_scored": 10,
    "cooldown_s": 600.0,
    "longest_s": 5000.0,
}


def put_on_trial(books: Books, cycle: Cycle, tools: Tools) -> None:
    """A candidate that the gate lets pass, where releases are tried."""
    model, card = tools.publish_release(books, f"{cycle.number:016x}" + "0" * 48)
    policy = books.config.improve.trial
    assert policy is not None
    kind, share = policy.steps[0]
    decision = {"decision": "promote", "reasons": ["passed: the gate"]}
    books.registry.begin_trial(
        cycle, kind, share=share, by=policy.by, model=model.id, scorecard=card.id, decision=decision
    )


def answer(books: Books, number: int = 30, *, failed: int = 0, slower: float = 1.0) -> None:
    """Requests to both sides of the trial that is on."""
    trial = books.registry.trial()
    if trial is None:
        return
    told = []
    for i in range(number):
        seconds = 1.0 + 0.1 * (i % 3)
        told.append(Outcome(trial=trial.number, release=1, failed=False, seconds=seconds, first_s=0.1, tokens=10))
        told.append(
            Outcome(
                trial=trial.number,
                release=trial.release,
                failed=i < failed,
                seconds=seconds * slower,
                first_s=0.1,
                tokens=10,
            )
        )
    books.registry.trial_log.add(told)


def evaluation(books: Books, tools: Tools, scorer: Any = None) -> Evaluation:
    launcher = tools.FakeLauncher(books, lambda b, cycle: put_on_trial(b, cycle, tools))
    return Evaluation(books, score=scorer or tools.Scorer(), launcher=launcher)


@pytest.fixture
def tried(tmp_path: Path, tools: Tools) -> Books:
    """A release in production, drift, and a release on trial that a cycle has made."""
    books: Books = tools.small_books(tmp_path, trial=TRIAL)
    tools.first_release(books)
    tools.correct(books, 16)
    evaluation(books, tools).tick()
    trial = books.registry.trial()
    assert trial is not None
    assert (trial.release, trial.kind, trial.share, trial.by) == (2, "shadow", 0.5, "request")
    books.journal.clock.at += 1  # type: ignore[attr-defined]
    return books


def entries(books: Books) -> list[tuple[str, int, float]]:
    return [(entry.action, entry.release, entry.share) for entry in books.registry.trial_entries()]


def drift(books: Books) -> Cycle:
    return [cycle for cycle in books.journal.cycles() if cycle.bound.kind == "drift"][-1]


def test_a_good_release_goes_through_all_steps_to_production(tried: Books, tools: Tools) -> None:
    looking = evaluation(tried, tools)
    for _ in range(3):
        assert looking.tick().to_json()["awaited"] == "cycle"
    assert entries(tried) == [("shadow", 2, 0.5)], "nothing came, so nothing is decided"

    for _ in range(4):
        answer(tried)
        looking.tick()

    assert entries(tried) == [("shadow", 2, 0.5), ("canary", 2, 0.2), ("canary", 2, 0.6), ("promote", 2, 0.0)]
    production = tried.registry.production()
    assert production is not None
    assert production.number == 2
    assert [entry.by for entry in tried.registry.trial_entries()] == ["request", "key", "key", "key"]
    cycle = drift(tried)
    assert cycle.state == "promoted"
    assert cycle.decision is not None
    assert cycle.decision["reasons"][0] == "passed: the gate"
    assert cycle.decision["reasons"][-1] == "passed: canary of 0.6: 30 requests, 20 are needed"
    assert tried.journal.audited().faults == []


@pytest.mark.parametrize("cause", ["errors", "latency", "score"])
def test_a_bad_release_is_withdrawn_quarantined_and_the_loop_cools_down(tried: Books, tools: Tools, cause: str) -> None:
    scorer = tools.Scorer()
    if cause == "score":
        candidate = tried.registry.release(2)
        assert candidate is not None
        scorer.of[candidate.model] = scorer.bits_per_byte + 1
        tools.correct(tried, 40, start=100)
    looking = evaluation(tried, tools, scorer)
    answer(tried, failed=25 if cause == "errors" else 0, slower=9.0 if cause == "latency" else 1.0)

    looking.tick()
    looking.tick()

    assert tried.registry.trial() is None
    end = tried.registry.trial_entries()[-1]
    assert (end.action, end.quarantined) == ("withdraw", True)
    assert any(reason.startswith(f"failed: {cause}") for reason in end.reason["reasons"])
    assert list(tried.registry.quarantined()) == [2]
    production = tried.registry.production()
    assert production is not None
    assert production.number == 1
    cycle = drift(tried)
    assert cycle.state == "rejected"
    assert cycle.decision is not None
    assert {"passed: the gate", *end.reason["reasons"]} == set(cycle.decision["reasons"])

    tools.correct(tried, 16, start=300)
    decision = looking.tick()
    assert isinstance(decision, Wait)
    assert decision.awaited == "cooldown"
    assert "taken back for cause 0 s ago, cool-down 600 s" in decision.reasons[-1]
    tried.journal.clock.at += 600  # type: ignore[attr-defined]
    looking.tick()
    assert drift(tried).number == cycle.number + 1


def test_corrections_of_a_trial_are_scored_once_under_both_and_are_no_drift(tried: Books, tools: Tools) -> None:
    before = observe(tried, published_batches(tried))
    tools.correct(tried, 5, start=100)
    scorer = tools.Scorer()
    for _ in range(3):
        evaluation(tried, tools, scorer).tick()

    models = {release.number: release.model for release in tried.registry.releases()}
    late = [(model, text) for model, text in scorer.asked if int(text.split()[-1]) >= 100]
    assert sorted(late) == sorted((models[r], f"as it should be {i}") for r in (1, 1, 2) for i in range(100, 105))
    assert len(tried.feedback.scores(metric=BITS, release=1)) == before.num_scored + 5
    assert len(tried.feedback.scores(metric="trial_1", release=2)) == 5


def test_what_cannot_be_scored_stops_no_decision(tried: Books, tools: Tools) -> None:
    tools.correct(tried, 12, start=100)
    candidate = tried.registry.release(2)
    assert candidate is not None
    scorer = tools.Scorer()
    scorer.poison = {candidate.model}
    answer(tried)
    evaluation(tried, tools, scorer).tick()
    assert entries(tried)[-1] == ("canary", 2, 0.2)


def test_a_step_that_sees_too_little_ends_without_quarantine(tried: Books, tools: Tools) -> None:
    tried.journal.clock.at += 5000  # type: ignore[attr-defined]
    evaluation(tried, tools).tick()
    assert entries(tried)[-1] == ("withdraw", 2, 0.0)
    assert tried.registry.quarantined() == {}
    assert drift(tried).state == "rejected"


def test_somebodys_own_trial_is_left_to_them(tried: Books, tools: Tools) -> None:
    tried.registry.withdraw(reason={"reason": "test"})
    tried.registry.try_out(2, "canary", share=0.3, reason={"reason": "by hand"})
    looking = evaluation(tried, tools)
    answer(tried, failed=30)
    for _ in range(2):
        looking.tick()
    assert entries(tried)[-1] == ("canary", 2, 0.3)


def test_a_trial_that_was_changed_meanwhile_is_left_as_it_is(tried: Books, tools: Tools) -> None:
    looking = evaluation(tried, tools)
    answer(tried)
    trial, policy = tried.registry.trial(), tried.config.improve.trial
    assert trial is not None
    assert policy is not None
    tried.registry.try_out(2, "canary", share=0.9, reason={"reason": "by hand"})
    with pytest.raises(Exception, match="by the entry 1, found canary small-r2, entry 2"):
        looking._trials._apply(Withdraw(quarantine=True, reasons=("x",)), trial, policy)
    assert entries(tried)[-1] == ("canary", 2, 0.9)


@pytest.mark.slow
@pytest.mark.parametrize("failed", [0, 25], ids=["good", "bad"])
def test_a_trial_ends_the_same_whatever_transaction_of_a_tick_it_is_killed_at(
    tmp_path: Path, tools: Tools, failed: int
) -> None:
    template = tools.small_books(tmp_path / "template", trial=TRIAL)
    tools.first_release(template)
    tools.correct(template, 16)
    evaluation(template, tools).tick()
    template.journal.clock.at += 1
    tools.correct(template, 12, start=100)
    template.close()

    def run(books: Books) -> None:
        looking = evaluation(books, tools)
        for _ in range(4):
            trial = books.registry.trial()
            # What came of each step is there whoever looks, once.
            if trial is not None and not any(
                outcome.trial == trial.number for outcome in books.registry.trial_log.outcomes(since=1)
            ):
                answer(books, failed=failed)
            looking.tick()

    def live(name: str, dies_at: int | None, *, after_commit: bool) -> tuple[Books, int]:
        tools.copied(tmp_path / "template", tmp_path / name)
        books = tools.small_books(tmp_path / name, trial=TRIAL)
        mortal = tools.MortalDatabase(str(books.database.url), dies_at=dies_at, after_commit=after_commit)
        tools.with_database(books, mortal, books.journal.clock)
        with contextlib.suppress(tools.Death):
            run(books)
        lived = mortal.num_writes
        mortal.close()
        books = tools.small_books(tmp_path / name, trial=TRIAL)
        run(books)
        return books, lived

    def end_state(books: Books) -> dict[str, Any]:
        production = books.registry.production()
        return {
            "entries": entries(books),
            "production": production and production.number,
            "cycles": [(cycle.trigger, cycle.state, cycle.decision) for cycle in books.journal.cycles()],
            "quarantined": list(books.registry.quarantined()),
            "audit": [(line.action, line.subject) for line in books.journal.audited().lines],
            "faults": books.journal.audited().faults,
        }

    uninterrupted, num_writes = live("uninterrupted", None, after_commit=False)
    expected = end_state(uninterrupted)
    assert expected["entries"][-1][0] == ("withdraw" if failed else "promote")
    for dies_at in range(1, num_writes + 1):
        for after_commit in (False, True):
            books, lived = live(f"{dies_at}-{after_commit}", dies_at, after_commit=after_commit)
            assert lived == dies_at
            assert end_state(books) == expected, (dies_at, after_commit)
            books.close()
