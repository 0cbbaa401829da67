"""Laws of trials: one at a time, by shares that are stable, ended by whatever moves production; and of quarantines."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest

from aifactory.errors import FencedError, StateError
from aifactory.records.feedback import Completion, FeedbackLog
from aifactory.records.journal import Cycle, Journal
from aifactory.records.registry import Registry
from aifactory.records.trials import Outcome, ShadowAnswer, Trial

Begin = Callable[..., Cycle]
WHY = {"reason": "test"}


def trial(share: float, *, release: int = 2) -> Trial:
    return Trial(factory="alpha", number=1, begun=1, release=release, kind="canary", share=share, by="key", at=0.0)


def promoted(registry: Registry, begin: Begin, number: int) -> None:
    """So many releases, the last one in production."""
    for i in range(1, number + 1):
        serving = registry.production()
        cycle = begin(f"t{i}", None if serving is None else serving.number)
        registry.promote(cycle, model=f"model/{i}", scorecard=f"scorecard/{i}", decision={})


def rolled_back(registry: Registry, begin: Begin) -> None:
    """Three releases of which the first is in production."""
    promoted(registry, begin, 3)
    registry.rollback(to=1, reason="test")


@pytest.fixture
def registry(journal: Journal) -> Registry:
    return Registry(journal)


# ── shares ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.99, 1.0])
def test_a_share_is_met_within_binomial_bounds(share: float) -> None:
    number = 20_000
    taken = sum(trial(share).takes(f"key-{i}") for i in range(number))
    assert abs(taken - share * number) <= 4 * math.sqrt(number * share * (1 - share))


def test_whoever_is_one_of_a_share_stays_one_while_it_rises() -> None:
    keys = [f"key-{i}" for i in range(2_000)]
    sides = [{key for key in keys if trial(share).takes(key)} for share in (0.0, 0.05, 0.2, 0.5, 0.9, 1.0)]
    assert all(before < after for before, after in itertools.pairwise(sides))
    assert (sides[0], sides[-1]) == (set(), set(keys))


def test_another_release_is_tried_on_others() -> None:
    keys = [f"key-{i}" for i in range(2_000)]
    first, second = ({key for key in keys if trial(0.1, release=number).takes(key)} for number in (2, 3))
    assert len(first & second) < 60  # by chance 20


# ── one trial ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_trial_goes_from_shadow_to_canary_to_its_end_and_all_of_it_is_audited(
    registry: Registry, begin: Begin
) -> None:
    rolled_back(registry, begin)
    assert registry.trial() is None

    registry.try_out(2, "shadow", share=0.2, reason=WHY)
    registry.try_out(2, "canary", share=0.1, reason=WHY)
    grown = registry.try_out(2, "canary", share=0.5, reason=WHY)

    assert (grown.kind, grown.share, grown.by, grown.number, grown.begun) == ("canary", 0.5, "key", 3, 1)
    assert registry.trial() == grown
    standing = registry.standing()
    assert standing.production is not None
    assert standing.tried is not None
    assert (standing.production.number, standing.tried.number) == (1, 2)

    registry.withdraw(reason={"reason": "slow"})
    assert registry.trial() is None
    registry.try_out(3, "canary", share=1.0, by="request", reason=WHY)
    assert [(e.action, e.release, e.share, e.by, e.begun) for e in registry.trial_entries()] == [
        ("shadow", 2, 0.2, "request", 1),
        ("canary", 2, 0.1, "key", 1),
        ("canary", 2, 0.5, "key", 1),
        ("withdraw", 2, 0.0, "key", 1),
        ("canary", 3, 1.0, "request", 5),
    ]
    audited = registry.journal.audited()
    assert audited.faults == []
    assert [(a.action, a.subject) for a in audited.lines[4:]] == [
        ("shadow", "alpha-r2"),
        ("canary", "alpha-r2"),
        ("canary", "alpha-r2"),
        ("withdraw", "alpha-r2"),
        ("canary", "alpha-r3"),
    ]
    assert audited.lines[6].detail == {"reason": "test", "share": 0.5, "by": "key"}


def test_what_can_not_be_tried_is_refused_and_changes_nothing(registry: Registry, begin: Begin) -> None:
    rolled_back(registry, begin)
    for release, what in ((1, "one that is in production"), (7, "none")):
        with pytest.raises(StateError, match=f"to try, found {what}"):
            registry.try_out(release, "canary", share=0.1, reason=WHY)
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(StateError, match="expected a share from 0 to 1"):
            registry.try_out(2, "canary", share=share, reason=WHY)
    for end in (registry.withdraw, registry.promote_trial):
        with pytest.raises(StateError, match="expected a release on trial, found none"):
            end(reason=WHY)
    assert registry.trial_entries() == []

    registry.try_out(2, "canary", share=0.1, by="request", reason=WHY)
    with pytest.raises(StateError, match="expected no other release on trial, found alpha-r2"):
        registry.try_out(3, "shadow", share=0.1, reason=WHY)
    with pytest.raises(StateError, match="change sides"):
        registry.try_out(2, "canary", share=0.2, by="key", reason=WHY)
    with pytest.raises(StateError, match="on trial by the entry 7, found canary alpha-r2, entry 1"):
        registry.promote_trial(reason=WHY, of=7)
    assert len(registry.trial_entries()) == 1


def test_promoted_it_takes_production_and_a_rollback_goes_back_to_the_one_beside_which_it_was_tried(
    registry: Registry, begin: Begin
) -> None:
    rolled_back(registry, begin)
    tried = registry.try_out(3, "canary", share=1.0, reason=WHY)

    assert registry.promote_trial(reason={"reason": "good"}, of=tried.number).number == 3

    assert registry.trial() is None
    last = registry.promotions()[-1]
    assert (last["release"], last["previous"], last["action"]) == (3, 1, "promote")
    assert registry.journal.audited().faults == []
    assert registry.rollback(reason="test").number == 1


@pytest.mark.parametrize("move", ["promote", "rollback"])
def test_a_trial_ends_when_another_release_takes_production(registry: Registry, begin: Begin, move: str) -> None:
    promoted(registry, begin, 3)
    registry.rollback(to=2, reason="test")
    registry.try_out(3, "canary", share=0.1, reason=WHY)

    if move == "promote":
        registry.promote(begin("t4", 2), model="model/4", scorecard="scorecard/4", decision={})
    else:
        registry.rollback(reason="test")

    assert registry.trial() is None
    end = registry.trial_entries()[-1]
    assert (end.action, end.release, end.quarantined) == ("withdraw", 3, False)
    assert "took production" in end.reason["reason"]
    assert registry.journal.audited().faults == []


# ── of a cycle ────────────────────────────────────────────────────────────────────────────────────────────────────────


def tried_by_a_cycle(registry: Registry, begin: Begin) -> Cycle:
    promoted(registry, begin, 1)
    cycle = begin("t2", 1)
    made = registry.begin_trial(
        cycle,
        "shadow",
        share=0.5,
        by="request",
        model="model/2",
        scorecard="scorecard/2",
        decision={"decision": "promote", "reasons": ["passed: the gate"]},
    )
    assert (made.number, made.trigger) == (2, "t2")
    return cycle


@pytest.mark.parametrize(("end", "state"), [("promote_trial", "promoted"), ("withdraw", "rejected")])
def test_a_cycle_ends_with_the_trial_of_its_release(registry: Registry, begin: Begin, end: str, state: str) -> None:
    tried_by_a_cycle(registry, begin)
    cycle = registry.journal.cycle("t2")
    assert cycle is not None
    assert (cycle.state, cycle.closed_at) == ("trial", None)
    assert registry.journal.claim(cycle).attempt == cycle.attempt  # nobody turns it any more

    getattr(registry, end)(reason={"reasons": ["passed: the trial"]})

    cycle = registry.journal.cycle("t2")
    assert cycle is not None
    assert (cycle.state, cycle.closed_at) == (state, 1_000.0)
    assert cycle.decision == {
        "decision": state.removesuffix("ed").replace("promot", "promote"),
        "reasons": ["passed: the gate", "passed: the trial"],
    }


def test_a_cycle_on_trial_is_neither_promoted_nor_rejected_by_its_old_attempt(registry: Registry, begin: Begin) -> None:
    cycle = tried_by_a_cycle(registry, begin)
    with pytest.raises(FencedError):
        registry.promote(cycle, model="model/2", scorecard="scorecard/2", decision={})
    with pytest.raises(FencedError):
        registry.reject(cycle, scorecard="scorecard/2", decision={})
    assert registry.trial() is not None


def test_a_cycle_begins_no_trial_beside_another_one(registry: Registry, begin: Begin) -> None:
    rolled_back(registry, begin)
    registry.try_out(3, "canary", share=0.1, reason=WHY)
    cycle = begin("t4", 1)
    options = {"share": 0.5, "by": "key", "model": "model/4", "scorecard": "scorecard/4", "decision": {}}
    with pytest.raises(StateError, match="expected no release on trial, found alpha-r3"):
        registry.begin_trial(cycle, "canary", **options)  # type: ignore[arg-type]
    assert len(registry.releases()) == 3
    assert registry.journal.cycle("t4") == cycle


# ── quarantine ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_was_withdrawn_for_cause_is_tried_again_only_by_who_says_so(registry: Registry, begin: Begin) -> None:
    rolled_back(registry, begin)
    registry.try_out(2, "canary", share=0.1, reason=WHY)
    registry.withdraw(reason={"reason": "it swears"}, quarantine=True)

    assert registry.quarantined() == {2: {"reason": "it swears"}}
    for kind in ("shadow", "canary"):
        with pytest.raises(StateError, match=r"in quarantine, found alpha-r2, which is: it swears.*despite-quarantine"):
            registry.try_out(2, kind, share=0.1, reason=WHY)  # type: ignore[arg-type]
    with pytest.raises(StateError, match="which is: it swears"):
        registry.rollback(to=2, reason="test")

    registry.try_out(2, "canary", share=0.1, reason=WHY, despite_quarantine=True)
    assert registry.quarantined() == {}
    assert registry.journal.audited().lines[-1].detail["despite_quarantine"] is True
    registry.promote_trial(reason=WHY)
    assert registry.quarantined() == {}


def test_what_was_rolled_back_for_cause_is_served_again_only_by_who_says_so(registry: Registry, begin: Begin) -> None:
    promoted(registry, begin, 2)
    registry.rollback(reason="it swears", quarantine=True)

    assert registry.quarantined() == {2: {"reason": "it swears"}}
    with pytest.raises(StateError, match="which is: it swears"):
        registry.rollback(to=2, reason="test")
    assert registry.rollback(to=2, reason="test", despite_quarantine=True).number == 2
    assert registry.quarantined() == {}
    assert registry.journal.audited().faults == []


def test_a_rollback_passes_over_what_is_in_quarantine(registry: Registry, begin: Begin) -> None:
    promoted(registry, begin, 2)
    registry.rollback(reason="2 is bad", quarantine=True)
    registry.rollback(to=2, reason="or not", despite_quarantine=True)
    registry.promote(begin("t3", 2), model="model/3", scorecard="scorecard/3", decision={})
    registry.rollback(to=1, reason="3 is bad")
    registry.try_out(2, "canary", share=0.1, reason=WHY)
    registry.withdraw(reason={"reason": "2 is bad after all"}, quarantine=True)
    registry.rollback(to=3, reason="3 is not")

    assert registry.rollback(reason="3 is bad after all").number == 1


def test_withdrawn_without_cause_it_may_be_tried_again(registry: Registry, begin: Begin) -> None:
    rolled_back(registry, begin)
    registry.try_out(2, "canary", share=0.1, reason=WHY)
    registry.withdraw(reason=WHY)
    assert registry.try_out(2, "shadow", share=0.1, reason=WHY).begun == 3


# ── what came of it ───────────────────────────────────────────────────────────────────────────────────────────────────


def completion(name: str) -> Completion:
    return Completion(
        id=name,
        release=1,
        prompt="?",
        answer="!",
        request="{}",
        finish_reason="stop",
        prompt_tokens=1,
        answer_tokens=1,
    )


def shadow(name: str, answer: str = "hm") -> ShadowAnswer:
    return ShadowAnswer(
        completion=name, release=2, answer=answer, finish_reason="stop", prompt_tokens=1, answer_tokens=1
    )


def test_outcomes_come_back_in_order_from_an_entry_on(registry: Registry) -> None:
    told = [Outcome(trial=t, release=1 + t % 2, failed=t == 3, seconds=t / 8, tokens=t) for t in (1, 3, 2, 3)]
    registry.trial_log.add(told)
    registry.trial_log.add([])
    assert registry.trial_log.outcomes(since=1) == told
    assert registry.trial_log.outcomes(since=3) == [told[1], told[3]]


def test_a_shadow_is_no_completion_and_goes_with_the_one_that_it_shadows(registry: Registry) -> None:
    feedback = FeedbackLog(registry.journal)
    feedback.log_completion(completion("cmpl-1"), completion("cmpl-2"))

    registry.trial_log.add_shadows([shadow("cmpl-1", "a\0b"), shadow("cmpl-2"), shadow("cmpl-gone")])
    registry.trial_log.add_shadows([shadow("cmpl-2", "again")])

    assert registry.trial_log.shadows(release=2) == [shadow("cmpl-1", "a\ufffdb"), shadow("cmpl-2")]
    assert feedback.counts()["completions"] == 2
    assert feedback.completions_by_release() == {1: 2}
    with registry.database.write() as connection:
        connection.exec_driver_sql("DELETE FROM completions WHERE id = 'cmpl-1'")
    assert registry.trial_log.shadows(release=2) == [shadow("cmpl-2")]
