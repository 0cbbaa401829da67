"""Requests for a retrain, and retrains by the clock, over real books: each gives one cycle, whatever is killed."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import pytest

from aifactory.config import Improve, PromptWatch, ReleaseTrial, RetrainSchedule
from aifactory.errors import ConfigError, StateError
from aifactory.evaluate.sequential import Found
from aifactory.improve.decision import Observation, Retrain, Wait, decide
from aifactory.improve.evaluation import Evaluation, published_batches
from aifactory.improve.requests import ask, withdraw_open
from aifactory.improve.schedule import Slot
from aifactory.records.books import Books
from aifactory.records.journal import Cycle
from aifactory.records.retrain_requests import RetrainRequest

Tools = Any
GOOD = Observation(
    release="small-r1",
    standard=1.0,
    num_scored=100,
    live=1.0,
    below=Found(won=1.0, needed=20.0, number=100),
    new_batches=("batch/1",),
    running=None,
)
ASKED = RetrainRequest(id="retrain-a", at=0.0, reason="new tone of voice", despite_cooldown=False)
URGENT = RetrainRequest(id="retrain-b", at=1.0, reason="now", despite_cooldown=True)
SLOT = Slot(at=500.0, said="schedule: 03:00 in UTC has come")


def seen(**changes: Any) -> Observation:
    return Observation(**{name: getattr(GOOD, name) for name in Observation.__dataclass_fields__} | changes)


def retrains(books: Books) -> list[Cycle]:
    return [cycle for cycle in books.journal.cycles() if cycle.bound.is_retrain]


def requested(books: Books, **asked: Any) -> RetrainRequest:
    (request,) = ask(books, **{"reason": "asked for", "despite_cooldown": False, "key": None, **asked}).requests
    return request


# ── decided, purely ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_request_is_reason_enough_and_is_named_with_its_reason() -> None:
    assert isinstance(decide(Improve(), seen()), Wait)

    decision = decide(Improve(), seen(requests=(ASKED, URGENT), num_scored=3))

    assert isinstance(decision, Retrain)
    assert decision.requests == ("retrain-a", "retrain-b")
    assert decision.reasons[0] == "request: retrain-a asks for a retrain: new tone of voice"
    assert decision.to_json()["requests"] == ["retrain-a", "retrain-b"]


def test_a_request_learns_from_what_was_there_before_where_nothing_is_new() -> None:
    decision = decide(Improve(), seen(requests=(ASKED,), new_batches=()))

    assert isinstance(decision, Retrain)
    assert decision.reasons[-1] == "no new feedback: it learns from what was there before"


def test_a_slot_of_the_schedule_is_reason_enough_where_something_is_new() -> None:
    decision = decide(Improve(), seen(slot=SLOT))

    assert isinstance(decision, Retrain)
    assert (decision.slot, decision.reasons[0]) == (500.0, SLOT.said)
    assert decide(Improve(), seen(slot=SLOT, new_batches=())).to_json()["awaited"] == "feedback"


COOL = Improve(cooldown_s=60, trial=ReleaseTrial(cooldown_s=100))


@pytest.mark.parametrize("cooling", [{"seconds_since_cycle": 10.0}, {"seconds_since_withdrawal": 10.0}])
@pytest.mark.parametrize("asked", [{"requests": (ASKED,)}, {"slot": SLOT}, {"requests": (ASKED,), "slot": SLOT}])
def test_cool_downs_hold_for_requests_and_the_schedule(cooling: dict[str, Any], asked: dict[str, Any]) -> None:
    assert decide(COOL, seen(**cooling, **asked)).to_json()["awaited"] == "cooldown"


def test_a_request_that_says_so_waits_for_no_cool_down_and_the_reasons_say_which_it_passed_over() -> None:
    decision = decide(COOL, seen(requests=(ASKED, URGENT), seconds_since_cycle=10.0, seconds_since_withdrawal=20.0))

    assert isinstance(decision, Retrain)
    passed = [reason for reason in decision.reasons if "not waited for, as retrain-b asks" in reason]
    assert [reason.split(" s ago")[0] for reason in passed] == [
        "the last cycle ended 10",
        "a release was taken back for cause 20",
    ]


def test_the_daily_limit_and_a_running_cycle_hold_whoever_asks() -> None:
    assert decide(Improve(), seen(requests=(URGENT,), retrains_today=24)).to_json()["awaited"] == "cooldown"
    assert decide(Improve(), seen(requests=(URGENT,), running="drift-1")).to_json()["awaited"] == "cycle"
    assert decide(Improve(), seen(requests=(URGENT,), release=None)).to_json()["awaited"] == "release"


def test_whatever_is_seen_only_a_request_begins_without_feedback_and_only_one_that_says_so_within_a_cool_down() -> None:
    generator = random.Random(1)
    begun = 0
    for _ in range(5000):
        given = seen(
            requests=generator.choice([(), (ASKED,), (URGENT,), (ASKED, URGENT)]),
            slot=generator.choice([None, SLOT]),
            new_batches=generator.choice([(), ("batch/1",)]),
            below=generator.choice([GOOD.below, Found(won=20.0, needed=20.0, number=100, at=60, since=20)]),
            prompts=generator.choice([None, "moved"]),
            seconds_since_cycle=generator.uniform(0, 120),
            retrains_today=generator.randrange(20, 28),
            running=generator.choice([None, None, "drift-1"]),
        )
        policy = Improve(cooldown_s=60, prompts=PromptWatch(retrain=generator.random() < 0.5))
        decision = decide(policy, given)
        if isinstance(decision, Retrain):
            begun += 1
            assert given.running is None and given.retrains_today < 24
            assert given.requests or given.new_batches
            assert given.seconds_since_cycle >= 60 or URGENT in given.requests
            assert given.is_asked_for or given.below.is_established or (given.prompts and policy.prompts.retrain)
    assert begun > 500


# ── over books ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_request_seals_what_waits_gives_one_cycle_bound_to_it_and_is_in_the_audit(books: Books, tools: Tools) -> None:
    tools.correct(books, 3)  # a batch has 8
    evaluation = Evaluation(books, score=tools.Scorer(0.9), launcher=tools.FakeLauncher(books, end=tools.reject))
    evaluation.tick()
    assert published_batches(books) == [] and not retrains(books)

    request = requested(books, reason="new tone of voice")
    for _ in range(4):
        evaluation.tick()

    (cycle,) = retrains(books)
    assert (cycle.bound.kind, cycle.bound.requests) == ("request", [request.id])
    assert cycle.bound.batches == [batch.id for batch in published_batches(books)] != []
    assert cycle.state == "rejected"
    assert books.retrain_requests.named(request.id).state == cycle.trigger
    assert books.feedback.counts()["waiting"] == 0
    (line,) = [line for line in books.journal.audited().lines if line.action == "retrain"]
    assert (line.subject, line.detail) == (
        request.id,
        {"reason": "new tone of voice", "despite_cooldown": False},
    )


def test_a_second_request_gives_a_second_cycle_also_without_new_feedback(books: Books, tools: Tools) -> None:
    evaluation = Evaluation(books, score=tools.Scorer(0.9), launcher=tools.FakeLauncher(books, end=tools.reject))
    for _ in range(2):
        requested(books)
        evaluation.tick()
        evaluation.tick()

    first, second = retrains(books)
    assert first.trigger != second.trigger
    assert len(first.bound.requests) == len(second.bound.requests) == 1


def test_who_repeats_himself_by_key_has_asked_once_and_can_t_ask_for_something_else(books: Books) -> None:
    assert requested(books, key="k") == requested(books, key="k")
    assert len(books.retrain_requests.open()) == 1
    with pytest.raises(ConfigError, match=r"expected the request of the key 'k' again, found another one"):
        requested(books, key="k", despite_cooldown=True)
    assert requested(books) != requested(books)


def test_without_a_release_nothing_can_be_asked_for(tmp_path: Path, tools: Tools) -> None:
    with pytest.raises(StateError, match="in production to retrain, found none"):
        requested(tools.small_books(tmp_path))


def test_a_request_that_is_withdrawn_gives_no_cycle_and_one_that_began_goes_on(books: Books, tools: Tools) -> None:
    evaluation = Evaluation(books, score=tools.Scorer(0.9), launcher=tools.FakeLauncher(books))
    began = requested(books)
    evaluation.tick()
    asked = requested(books)
    found = withdraw_open(books, reason="thought better of it")

    assert [each.id for each in found.requests] == [asked.id]
    assert found.requests[0].state == "withdrawn"
    assert books.retrain_requests.named(began.id).state == retrains(books)[0].trigger
    tools.reject(books, books.journal.claim(retrains(books)[0]))
    evaluation.tick()
    assert len(retrains(books)) == 1


def test_within_a_cool_down_what_waits_is_not_sealed_bit_by_bit(tmp_path: Path, tools: Tools) -> None:
    books = tools.small_books(tmp_path, cooldown_s=100)
    tools.first_release(books)
    evaluation = Evaluation(books, score=tools.Scorer(0.9), launcher=tools.FakeLauncher(books, end=tools.reject))
    requested(books)
    evaluation.tick()
    evaluation.tick()
    requested(books)
    for i in range(3):
        tools.correct(books, 1, start=i)
        evaluation.tick()
    assert len(retrains(books)) == 1 and books.feedback.counts()["waiting"] == 3

    books.journal.clock.at += 101
    evaluation.tick()
    assert [batch.num_rows for batch in published_batches(books)] == [3]
    assert len(retrains(books)) == 2


def test_a_schedule_gives_a_cycle_for_each_interval_in_which_something_was_said(tmp_path: Path, tools: Tools) -> None:
    books = tools.small_books(tmp_path, schedule=RetrainSchedule(interval_s=100).model_dump())
    tools.first_release(books)
    launcher = tools.FakeLauncher(books, end=tools.reject)
    evaluation = Evaluation(books, score=tools.Scorer(0.9), launcher=launcher)
    for i in range(28):
        if i % 5 == 0 and i < 20:
            tools.correct(books, 1, start=i)
        evaluation.tick()
        books.journal.clock.at += 25

    begun = retrains(books)
    assert [cycle.bound.kind for cycle in begun] == ["schedule"] * 4
    assert [cycle.opened_at for cycle in begun] == [1100.0, 1200.0, 1300.0, 1400.0]


@pytest.mark.parametrize("after_commit", [False, True])
def test_killed_at_any_write_one_request_and_one_slot_give_one_cycle_each(
    tmp_path: Path, tools: Tools, after_commit: bool
) -> None:
    """The actor dies at its n-th write, for every third n; another one goes on."""
    template = tools.small_books(
        tmp_path / "template", schedule=RetrainSchedule(interval_s=100).model_dump(), cooldown_s=10
    )
    tools.first_release(template)
    tools.correct(template, 3)
    template.close()
    deaths = 0
    for n in range(1 + after_commit, 60, 3):
        folder = tools.copied(tmp_path / "template", tmp_path / f"{after_commit}{n}")
        books = tools.small_books(folder, schedule=RetrainSchedule(interval_s=100).model_dump(), cooldown_s=10)
        url = books.database.url.render_as_string(hide_password=False)
        clock, mortal = books.journal.clock, tools.MortalDatabase(url, dies_at=n, after_commit=after_commit)
        tools.with_database(books, mortal, clock)

        def looks(books: Books, clock: Any) -> None:
            evaluation = Evaluation(
                books, score=tools.Scorer(0.9), launcher=tools.FakeLauncher(books, end=tools.reject)
            )
            for _ in range(3):
                evaluation.tick()
            clock.at = 1_200.0  # the slot has come, and the cool-down is over
            if books.feedback.completion("cmpl-3") is None:
                tools.correct(books, 1, start=3)
            for _ in range(3):
                evaluation.tick()

        with contextlib.suppress(tools.Death):
            requested(books, key="k")
            looks(books, clock)
        died = mortal.num_writes >= n
        deaths += died
        if not died:
            break
        whole = tools.with_database(books, tools.MortalDatabase(url), clock)
        requested(whole, key="k")
        looks(whole, clock)
        kinds = [cycle.bound.kind for cycle in retrains(whole)]
        taken = [request for cycle in retrains(whole) for request in cycle.bound.requests]
        assert kinds.count("request") == 1 and len(taken) == 1, (n, kinds)
        assert kinds.count("schedule") <= 1, (n, kinds)
        assert not whole.retrain_requests.open()
        lines = [line for line in whole.journal.audited().lines if line.action == "retrain"]
        assert len(lines) == 1
        whole.close()
    assert deaths >= 6
