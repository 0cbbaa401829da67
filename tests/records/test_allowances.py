"""python -m pytest tests/records/test_allowances.py"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable

import pytest
import sqlalchemy as sa

from aifactory.records.allowances import HOLD_S, Allowances, Ask, Refusal, Spent, Use
from aifactory.records.database import Database
from aifactory.records.journal import Journal
from aifactory.records.keys import Keys
from aifactory.records.limits import Limits, Subject
from aifactory.records.tables import open_requests, request_rates

KEY, OTHER = "key-0000000000000001", "key-0000000000000002"
_ids = itertools.count()


@pytest.fixture
def allowances(journal: Journal, clock) -> Allowances:
    clock.at = 1_800_000_000.25
    return Allowances(journal, clock=clock)


@pytest.fixture
def limit(journal: Journal) -> Callable[..., None]:
    """Say what a key or a team may use."""
    keys = Keys(journal)

    def say(name: str, **limited: object) -> None:
        with journal.database.write(serialize=True) as connection:
            subject = Subject("key" if name.startswith("key-") else "team", name)
            keys._limit(connection, subject, Limits(**limited))  # type: ignore[arg-type]

    return say


def ask(key_id: str = KEY, team: str | None = None, **more: object) -> Ask:
    return Ask(id=f"r{next(_ids)}", key_id=key_id, team=team, **more)  # type: ignore[arg-type]


def turn(allowances: Allowances, *asks: Ask) -> list[Refusal | None]:
    return allowances.turn(asks, holder="a")


def end(allowances: Allowances, asked: Ask, prompt: int = 0, answer: int = 0, money: float = 0.0) -> None:
    use = Use(
        id=asked.id, key_id=asked.key_id, team=asked.team, prompt_tokens=prompt, answer_tokens=answer, money=money
    )
    allowances.turn([], [use], holder="a")


# ── rates ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_in_no_60_seconds_are_more_let_in_than_the_limit_and_no_more_are_refused_than_must_be(allowances, limit, clock):
    limit(KEY, requests_per_minute=20)
    rng, let_in = random.Random(5), []
    for _ in range(160):
        clock.at += rng.choice([0.01, 0.4, 2.0, 15.0]) * rng.random()
        (refusal,) = turn(allowances, ask())
        if refusal is None:
            let_in.append(clock.at)
        else:
            # Of a second that is over in part all may count.
            assert sum(clock.at - 61 < at for at in let_in) >= 20

    most = max(sum(begin <= at < begin + 60 for at in let_in) for begin in let_in)
    assert most == 20
    assert len(let_in) > 40


def test_those_that_come_together_are_let_in_in_their_order(allowances, limit):
    limit(KEY, requests_per_minute=3)
    found = turn(allowances, ask(), ask(OTHER), ask(), ask(), ask(), ask(OTHER))

    assert [each is None for each in found] == [True, True, True, True, False, True]


def test_whoever_comes_back_when_he_is_told_to_is_let_in_and_not_before(allowances, limit, clock):
    limit(KEY, requests_per_minute=2)
    turn(allowances, ask())
    clock.at += 7.5
    turn(allowances, ask())
    clock.at += 3.0
    (refusal,) = turn(allowances, ask())
    assert (refusal.meter, refusal.limit, refusal.left) == ("requests_per_minute", 2, 0)
    begun = clock.at

    clock.at = begun + refusal.retry_after_s - 1
    assert turn(allowances, ask())[0] is not None
    clock.at = begun + refusal.retry_after_s
    assert turn(allowances, ask())[0] is None


def test_tokens_are_reserved_and_what_was_not_used_is_given_back(allowances, limit, clock):
    limit(KEY, tokens_per_minute=100)
    first, second = ask(tokens=60), ask(tokens=60)
    found = turn(allowances, first, second)
    assert found[0] is None
    assert (found[1].meter, found[1].left, found[1].asked) == ("tokens_per_minute", 40, 60)

    end(allowances, first, prompt=10, answer=5)
    assert turn(allowances, ask(tokens=85)) == [None]
    assert turn(allowances, ask(tokens=1))[0] is not None

    clock.at += 61
    assert turn(allowances, ask(tokens=100)) == [None]


def test_one_that_can_never_get_so_much_is_told_so_and_not_to_wait(allowances, limit):
    limit(KEY, tokens_per_minute=100)
    (refusal,) = turn(allowances, ask(tokens=101))

    assert (refusal.meter, refusal.retry_after_s) == ("tokens_per_minute", None)


def test_one_that_ends_late_takes_nothing_from_a_later_minute(allowances, limit, clock):
    limit(KEY, tokens_per_minute=100)
    slow = ask(tokens=50)
    turn(allowances, slow)
    clock.at += 70
    turn(allowances, ask(tokens=70))
    end(allowances, slow, prompt=50)

    (refusal,) = turn(allowances, ask(tokens=31))
    assert refusal.left == 30


# ── open ones ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_so_many_are_open_at_once_and_an_end_makes_room(allowances, limit):
    limit(KEY, concurrent=2)
    first, second, third = ask(), ask(), ask()
    found = turn(allowances, first, second, third)
    assert [each is None for each in found] == [True, True, False]
    assert found[2].retry_after_s == 1

    end(allowances, first)
    assert turn(allowances, ask()) == [None]
    assert turn(allowances, ask())[0].meter == "concurrent"
    assert turn(allowances, ask(is_brief=True)) == [None], "what is over at once is never open"


def test_an_end_and_a_request_of_one_turn_fit_one_after_the_other(allowances, limit):
    limit(KEY, concurrent=1)
    first = ask()
    turn(allowances, first)

    use = Use(id=first.id, key_id=KEY, team=None)
    assert allowances.turn([ask(), ask()], [use], holder="a")[0] is None


def test_those_of_a_replica_that_is_lost_count_no_more_after_the_hold_and_those_of_others_do(allowances, limit, clock):
    limit(KEY, concurrent=2)
    allowances.turn([ask()], holder="lost")
    allowances.turn([ask()], holder="alive")
    for _ in range(5):
        clock.at += HOLD_S / 4
        allowances.turn([], holder="alive", renew=True)

    found = turn(allowances, ask(), ask())
    assert [each is None for each in found] == [True, False]


def test_one_that_is_asked_again_since_its_replica_was_lost_is_counted_once(allowances, limit):
    limit(KEY, concurrent=1, requests_per_minute=1, tokens_per_minute=10, budget_tokens=10)
    asked = ask(tokens=10)
    assert allowances.turn([asked], holder="lost") == [None]

    assert allowances.turn([asked], holder="other") == [None]
    with allowances.database.read() as connection:
        assert connection.scalar(sa.select(open_requests.c.holder)) == "other"
        assert connection.execute(sa.select(request_rates.c.requests, request_rates.c.tokens)).all() == [(1, 10)]
    end(allowances, asked, prompt=3, answer=4)
    assert allowances.spent("day") == {Subject("key", KEY): Spent(requests=1, prompt_tokens=3, answer_tokens=4)}


# ── budgets ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_budget_is_never_passed_whatever_is_open(allowances, limit):
    limit(KEY, budget_tokens=100)
    rng, opened, used = random.Random(3), [], 0
    for _ in range(80):
        asked = ask(tokens=rng.randint(1, 30))
        (refusal,) = turn(allowances, asked)
        reserved = sum(each.tokens for each in opened)
        assert (refusal is None) == (used + reserved + asked.tokens <= 100 and used + reserved < 100)
        if refusal is None:
            opened.append(asked)
        if opened and rng.random() < 0.6:
            ended = opened.pop(rng.randrange(len(opened)))
            took = rng.randint(0, ended.tokens) // 4
            end(allowances, ended, answer=took)
            used += took

    assert used > 60
    assert allowances.spent("total")[Subject("key", KEY)].tokens == used


@pytest.mark.parametrize(("window", "days"), [("day", 1), ("month", 31), ("total", None)])
def test_a_budget_is_whole_again_when_its_window_is_over(allowances, limit, clock, window, days):
    limit(KEY, budget_tokens=10, budget_window=window)
    clock.at = 1_798_761_600.0 + 5  # 2027-01-01
    asked = ask(tokens=10)
    assert turn(allowances, asked) == [None]
    end(allowances, asked, prompt=10)
    (refusal,) = turn(allowances, ask(tokens=1))
    assert (refusal.meter, refusal.left, refusal.window) == ("budget_tokens", 0, window)

    clock.at += 86_400 * ((days or 1_000) - 1)
    assert turn(allowances, ask(tokens=1))[0] is not None
    clock.at += 86_400
    assert (turn(allowances, ask(tokens=1))[0] is None) == (days is not None)


def test_money_and_joules_have_budgets_of_their_own(allowances, limit, journal):
    limit(KEY, budget_money=1.0)
    asked = ask(money=0.75)
    assert turn(allowances, asked) == [None]
    assert turn(allowances, ask(money=0.5))[0].meter == "budget_money"
    end(allowances, asked, money=0.25)
    assert turn(allowances, ask(money=0.5)) == [None]

    issued = Keys(journal).create("app", team="red")
    limit("red", budget_joules=10.0)
    mine = {"key_id": issued.key.id, "team": "red"}
    allowances.add_joules({issued.key.id: 6.0, OTHER: 100.0, "anonymous": 1.0})
    assert turn(allowances, ask(**mine)) == [None]
    allowances.add_joules({issued.key.id: 4.5})
    assert turn(allowances, ask(**mine))[0].meter == "budget_joules"
    assert turn(allowances, ask(OTHER)) == [None]
    assert allowances.spent("day")[Subject("team", "red")].joules == 10.5
    assert Subject("key", "anonymous") not in allowances.spent("day"), "nobody's budget"
    with journal.database.write(serialize=True) as connection:
        Keys(journal)._limit(connection, Subject("key", "anonymous"), Limits(budget_joules=2.0))
    allowances.add_joules({"anonymous": 2.0})
    assert turn(allowances, ask("anonymous"))[0].meter == "budget_joules"


def test_work_in_the_background_spends_and_is_not_held_up_by_rates(allowances, limit):
    limit(KEY, requests_per_minute=1, tokens_per_minute=1, concurrent=1, budget_tokens=10)
    behind = [ask(tokens=4, is_rated=False) for _ in range(3)]

    found = turn(allowances, *behind)

    assert [each is None for each in found] == [True, True, False]
    assert found[2].meter == "budget_tokens"
    for each in behind[:2]:
        end(allowances, each, answer=1)
    assert turn(allowances, ask(tokens=1)) == [None], "rates and places are as they were"


# ── keys and teams ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_keys_of_a_team_share_its_limits_and_whoever_is_refused_by_one_takes_nothing_of_the_other(allowances, limit):
    limit("red", requests_per_minute=4)
    limit(KEY, requests_per_minute=1)
    found = turn(allowances, *(ask(KEY, "red") for _ in range(5)), *(ask(OTHER, "red") for _ in range(4)))

    assert [each is None for each in found] == [True, *[False] * 4, *[True] * 3, False]
    assert [str(each.subject) for each in found if each is not None] == [f"key {KEY}"] * 4 + ["team red"]
    assert turn(allowances, ask(OTHER, "blue"), ask(OTHER)) == [None, None]


def test_limits_that_are_taken_away_hold_no_more(allowances, limit):
    limit(KEY, requests_per_minute=1)
    assert [each is None for each in turn(allowances, ask(), ask())] == [True, False]
    limit(KEY)

    assert turn(allowances, ask(), ask()) == [None, None]


def test_factories_count_apart(allowances, limit, journal, clock):
    limit(KEY, requests_per_minute=1)
    other = Allowances(Journal(journal.database, "beta"), clock=clock)
    turn(allowances, ask())

    assert other.turn([ask(), ask()], holder="a") == [None, None]
    assert other.spent("total") == {}


def test_a_sweep_deletes_what_counts_no_more_and_nothing_else(allowances, limit, clock):
    limit(KEY, requests_per_minute=10, concurrent=10)
    turn(allowances, ask())
    clock.at += 4_000
    turn(allowances, ask(), ask())

    allowances.sweep()

    with allowances.database.read() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(open_requests)) == 2
        assert connection.scalar(sa.select(sa.func.sum(request_rates.c.requests))) == 2


# ── many replicas ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_replicas_that_ask_at_once_let_in_exactly_the_limit(open_database: Callable[[], Database], limit):
    limit("red", requests_per_minute=300, tokens_per_minute=100_000, budget_tokens=4_000)
    limit(KEY, requests_per_minute=200)
    let_in: list[str] = []
    errors: list[BaseException] = []

    def replica(name: str) -> None:
        try:
            rng = random.Random(name)
            mine = Allowances(Journal(open_database(), "alpha"))
            for _ in range(25):
                asks = [ask(rng.choice([KEY, OTHER]), "red", tokens=10) for _ in range(rng.randint(1, 8))]
                found = mine.turn(asks, holder=name)
                good = [each for each, refusal in zip(asks, found, strict=True) if refusal is None]
                let_in.extend(each.key_id for each in good)
                uses = [Use(id=each.id, key_id=each.key_id, team="red", answer_tokens=10) for each in good]
                mine.turn([], uses, holder=name)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=replica, args=(f"replica-{n}",)) for n in range(6)]
    begun = time.time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)

    assert errors == []
    assert time.time() - begun < 60, "the test must fit into a window"
    assert len(let_in) == 300
    assert let_in.count(KEY) <= 200
