"""The budget: what is expected of a retrain, and what is done where it does not pay or there is no room for it."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from aifactory import Factory
from aifactory.config import Budget
from aifactory.improve.budget import Spending, Tried, Usage, afford
from aifactory.improve.decision import Retrain
from aifactory.improve.evaluation import Evaluation, decide_now
from aifactory.improve.spending import spending
from aifactory.proof.explain import explain_cycle
from aifactory.records.books import Books
from aifactory.records.journal import Bound

Tools = Any
HOUR = Usage(cpu_hours=1.0, joules=36_000.0)


def tried(gain: float = 0.0, *, steps: int = 100, hours: float = 1.0) -> Tried:
    return Tried(gain=gain, steps=steps, training=HOUR.times(hours), rest=HOUR.times(0.1))


def seen(*retrains: Tried, spent: Usage | None = None, first: Tried | None = None) -> Spending:
    return Spending(spent=spent or Usage(), retrains=retrains, first=first)


def test_before_anything_was_tried_the_gain_is_what_is_lost_and_the_cost_that_of_the_first_training() -> None:
    found = afford(Budget(cpu_hours=3), seen(first=tried(steps=100)), max_steps=200, lost=0.5)

    assert found.steps == 200
    assert found.reasons == (
        "budget: a gain of 0.5 bits per byte is expected (answers are 0.5 below the standard); 200 steps are expected to cost "
        "2.1 CPU-hours, 75,600 J",
    )


def test_each_retrain_that_brought_nothing_lowers_what_is_expected_until_it_is_refused() -> None:
    budget = Budget(min_gain=0.15)
    expected = []
    for number in range(6):
        found = afford(budget, seen(*[tried()] * number, first=tried()), max_steps=100, lost=0.6)
        expected.append(found.steps)

    assert expected == [100, 100, 100, 100, 0, 0]  # 0.6 / 4 is 0.15, 0.6 / 5 no more
    assert "0 of 5 retrains before it gained, 0 in all" in found.reasons[0]
    assert found.reasons[1] == "refused: it must bring 0.15 bits per byte or more"
    assert afford(budget, seen(*[tried()] * 5, tried(2.0)), max_steps=100, lost=0.6).steps == 100


def test_what_is_worth_less_than_it_costs_is_refused() -> None:
    budget = Budget(price_per_cpu_hour=2.0, price_per_kwh=0.5, worth_per_bit=10.0)

    assert afford(budget, seen(first=tried()), max_steps=100, lost=0.3).steps == 100
    refused = afford(budget, seen(first=tried()), max_steps=100, lost=0.2)
    assert refused.steps == 0
    assert "2.21 of money" in refused.reasons[0]  # 1.1 h at 2 and 0.011 kWh at 0.5
    assert refused.reasons[1] == "refused: that is worth 2, less than it costs"


@pytest.mark.parametrize(
    ("limits", "spent", "steps", "reason"),
    [
        ({"cpu_hours": 5}, 2.0, 100, ""),
        ({"cpu_hours": 2}, 1.2, 70, "shrunk: 1.2 of 2 CPU-hours are spent in 86400 s; there is room for 70 steps"),
        ({"cpu_hours": 2}, 1.6, 0, "deferred: 1.6 of 2 CPU-hours"),
        (
            {"cpu_hours": 0.5},
            0.0,
            0,
            "refused: 0 of 0.5 CPU-hours are spent in 86400 s; that is too little for it at any time",
        ),
        ({"joules": 72_000}, 1.2, 70, "shrunk: 4.32e+04 of 72000 J"),
        ({"money": 2, "price_per_cpu_hour": 1}, 1.2, 70, "shrunk: 1.2 of 2 of money"),
        ({"cpu_hours": 9, "joules": 72_000}, 1.2, 70, "shrunk: 4.32e+04 of 72000 J"),
        ({"gpu_hours": 1}, 5.0, 100, ""),
    ],
)
def test_it_is_shrunk_deferred_or_refused_by_the_limit_that_leaves_the_least(
    limits: dict[str, float], spent: float, steps: int, reason: str
) -> None:
    found = afford(Budget(**limits), seen(tried(1.0), spent=HOUR.times(spent)), max_steps=100, lost=1.0)

    assert found.steps == steps
    assert found.reasons[-1].startswith(reason or "budget")


def test_nothing_is_begun_that_is_expected_to_go_beyond_a_limit() -> None:
    generator = random.Random(3)
    begun = 0
    for _ in range(3000):
        budget = Budget(cpu_hours=generator.uniform(0.1, 9), least_steps_share=generator.uniform(0.1, 1))
        spent, hours = generator.uniform(0, 9), generator.uniform(0.1, 5)
        found = afford(budget, seen(tried(hours=hours), spent=HOUR.times(spent)), max_steps=100, lost=1.0)
        assert 0 <= found.steps <= 100
        if found.steps:
            begun += 1
            assert spent + 0.1 + hours * found.steps / 100 <= (budget.cpu_hours or 0) + 1e-9
            assert found.steps + 1 >= budget.least_steps_share * 100
    assert begun > 300


def test_money_without_a_price_is_a_mistake() -> None:
    with pytest.raises(ValidationError, match="expected a price"):
        Budget(money=3)


# ── over books ────────────────────────────────────────────────────────────────────────────────────────────────────────


def evaluated(books: Books, trigger: str, *, seconds: float, change: float | None = None) -> None:
    """What a cycle leaves in the journal."""
    target = None if change is None else {"over_champion": {"estimate": change}}
    for event, detail in (("trained", {"steps": 100}), ("evaluated", {"target": target})):
        books.journal.write(
            event, cycle=trigger, subject=f"{event}/{trigger}", detail=detail, seconds=seconds, joules=9.0
        )


def test_costs_and_gains_come_from_the_journal_and_only_what_was_promoted_has_gained(
    tmp_path: Path, tools: Tools
) -> None:
    books = tools.small_books(tmp_path)
    tools.first_release(books)
    evaluated(books, "run-1", seconds=1800.0)
    for name, end, change in (("drift-1", tools.reject, -0.4), ("drift-2", tools.promote, -0.3)):
        bound = Bound(kind="drift", sources_digest="", champion=1)
        cycle = books.journal.claim(books.journal.open_cycle(name, recipe={}, bound=bound))
        evaluated(books, name, seconds=3600.0, change=change)
        end(books, cycle)

    found = spending(books, Budget(window_s=100))

    runtime = books.config.runtime
    assert found.first is not None and found.first.training.cpu_hours == pytest.approx(
        0.5 * runtime.most_workers * runtime.cpus_per_worker
    )
    assert [(each.gain, each.steps) for each in found.retrains] == [(0.0, 100), (0.3, 100)]
    assert found.spent.joules == 36.0
    books.journal.clock.at += 100
    assert spending(books, Budget(window_s=100)).spent == Usage()
    assert spending(books, Budget(memory_s=50)).retrains == []


def test_a_retrain_that_does_not_pay_is_refused_in_the_journal_and_one_that_is_shrunk_says_so_in_its_story(
    tmp_path: Path, tools: Tools
) -> None:
    books = tools.small_books(tmp_path, budget={"joules": 20.0, "least_steps_share": 0.2}, retrain={"max_steps": 200})
    tools.first_release(books)
    evaluated(books, "run-1", seconds=36.0)  # 9 J for 100 steps, and 9 J beside
    tools.correct(books, 16)

    decision = Evaluation(books, score=tools.Scorer(), launcher=tools.FakeLauncher(books, tools.promote)).tick()

    assert isinstance(decision, Retrain)
    assert decision.max_steps == 122  # (20 - 9) of 18 J
    (cycle,) = [cycle for cycle in books.journal.cycles() if cycle.bound.kind == "drift"]
    assert cycle.bound.max_steps == 122
    why = explain_cycle(books, cycle.trigger).why_begun
    assert why[-1] == "shrunk: 0 of 20 J are spent in 86400 s; there is room for 122 steps"

    stingy = tools.small_books(tmp_path, budget={"joules": 10.0}, retrain={"max_steps": 200})
    tools.correct(stingy, 16, release=2, start=16)
    refusal = Evaluation(stingy, score=tools.Scorer(), launcher=tools.FakeLauncher(stingy)).tick().to_json()
    assert (refusal["decision"], refusal["awaited"]) == ("wait", "budget")
    assert stingy.journal.events(event="decided")[-1].detail == refusal
    assert refusal["reasons"][-1].startswith("refused: 0 of 10 J")
    assert decide_now(stingy).to_json() == refusal


def test_the_steps_of_a_shrunk_retrain_are_those_that_are_trained(tmp_path: Path, tools: Tools) -> None:
    books = tools.small_books(tmp_path)
    material = SimpleNamespace(token_sets=[SimpleNamespace(num_rows=9), SimpleNamespace(num_rows=3)])
    with Factory(books.config) as factory:
        steps = []
        for name, max_steps in (("drift-1", None), ("drift-2", 17)):
            bound = Bound(kind="drift", sources_digest="", parent="model/1", max_steps=max_steps)
            cycle = factory.books.journal.open_cycle(name, recipe={}, bound=bound)
            (recipe,), _ = factory._recipes_of(cycle, material)  # type: ignore[arg-type]
            steps.append(recipe.max_steps)

    assert steps == [books.config.improve.retrain.max_steps, 17]
