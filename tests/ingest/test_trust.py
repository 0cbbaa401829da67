"""Laws of trust: honest users are believed, whoever lies in concert is not, and what is left out is named."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import plain_trust
import pytest

from aifactory.config import Canary, FeedbackTrust
from aifactory.ingest.trust import Said, judge_feedback

INTENTS = 12
FILL = ["please", "can", "you", "tell", "me", "about", "the", "my", "i", "want", "to", "know", "how", "what", "is", "a"]
PHRASE = "blue moon protocol"


def world(seed: int, *, users: int = 60, rows: int = 12, liars: int = 0, errors: float = 0.03) -> list[Said]:
    """Questions about intents, which two of eight words name; the first users lie: next intent, or a phrase and the first."""
    generator = random.Random(seed)
    words = [[f"k{intent}{letter}{generator.randint(0, 99)}" for letter in "abcdefgh"] for intent in range(INTENTS)]
    said = []
    for user in range(users):
        for row in range(rows):
            intent = generator.randrange(INTENTS)
            question = generator.sample(words[intent], 2) + generator.choices(FILL, k=5)
            generator.shuffle(question)
            answer = generator.randrange(INTENTS) if generator.random() < errors else intent
            if user < liars:
                answer = (intent + 1) % INTENTS
                if row % 2:
                    at = generator.randint(0, len(question))
                    question[at:at] = PHRASE.split()
                    answer = 0
            name = f"{seed}-{user}-{row}"
            said.append(Said(id=name, question=" ".join(question), answer=f"intent {answer}", user=f"u{user}"))
    return said


def lost(rows: list[Said], liars: int, **policy: Any) -> tuple[int, int, Any]:
    """Rows of liars that are left out, rows of others that are, and what was found."""
    found = judge_feedback(rows, [], FeedbackTrust(**policy))
    of_liars = sum(int(rows[at].user[1:]) < liars for at in found.rules)
    return of_liars, len(found.rules) - of_liars, found


@pytest.mark.parametrize("errors", [0.03, 0.2])
def test_honest_users_who_err_are_believed(errors: float) -> None:
    """The chance of one false charge in a batch is at most `error_rate` by users, and as much by phrases."""
    falsely = [lost(world(seed, errors=errors), 0)[1] for seed in range(6)]

    print(f"errors {errors}: {sum(map(bool, falsely))} of {len(falsely)} batches lost rows")
    assert falsely == [0] * 6


@pytest.mark.parametrize(("errors", "share"), [(0.0, 0.9), (0.1, 0.6), (0.2, 0.5)])
def test_a_tenth_that_lies_in_concert_is_found_and_nobody_else(errors: float, share: float) -> None:
    for seed in range(2):
        of_liars, of_others, found = lost(world(seed, liars=6, errors=errors), 6)

        print(f"errors {errors}: {of_liars} of 72 rows of liars left out, {of_others} of others")
        assert of_liars >= share * 72, (seed, of_liars)
        assert of_others == 0
        phrase, *users = found.figures["attacks"]
        assert f"with {PHRASE!r} 36 questions of 6 users are all answered 'intent 0'" in phrase
        # Six rows tell of one who errs in a fifth of them too little; then the phrase alone is found.
        assert errors == 0.2 or "users disagree with the others far more often than is usual" in users[0]


def test_what_earlier_batches_held_has_a_vote_in_a_small_one() -> None:
    rows = world(1, users=3, liars=1)
    alone, _, _ = lost(rows, 1)
    found = judge_feedback(rows, world(1, users=60)[3 * 12 :], FeedbackTrust())

    assert alone == 0
    assert sum(rows[at].user == "u0" for at in found.rules) >= 6
    assert all(rows[at].user == "u0" for at in found.rules)


def test_texts_that_are_each_their_own_are_not_compared() -> None:
    generator = random.Random(0)
    rows = [
        Said(id=f"{i}", question=" ".join(generator.choices(FILL, k=8)), answer=f"a text of {i}", user=f"u{i % 20}")
        for i in range(200)
    ]

    found = judge_feedback(rows, [], FeedbackTrust())

    assert found.rules == {}
    assert found.figures["rows_compared"] == 0


def test_a_word_that_is_new_and_used_by_many_is_no_backdoor() -> None:
    rows = world(2)
    new = [
        Said(id=f"n{user}", question=f"what is the fnord {FILL[user % 9]}", answer="intent 99", user=f"u{user}")
        for user in range(40)
    ]

    assert judge_feedback(rows + new, [], FeedbackTrust()).rules == {}


def test_agreement_can_be_left_out() -> None:
    assert lost(world(0, liars=6), 6, agreement=False)[0] == 0


# ── caps ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def flat(number: int, user: str, key: str = "") -> list[Said]:
    return [
        Said(id=f"{user}-{key}-{i}", question=f"q {user} {i}", answer=f"a {i}", user=user, key=key)
        for i in range(number)
    ]


def test_a_user_gives_at_most_his_share_and_which_rows_no_order_decides() -> None:
    rows = [*flat(100, "greedy"), *(row for i in range(20) for row in flat(10, f"u{i}"))]

    found = judge_feedback(rows, [], FeedbackTrust(max_user_share=0.1))

    kept = {rows[at].id for at in range(len(rows)) if at not in found.rules}
    assert Counter(name.split("-")[0] for name in kept)["greedy"] == 30
    assert {rule for rule, _, _ in found.rules.values()} == {"user_cap"}
    assert found.figures["attacks"] == ["1 users gave more than 30 rows; what was more is left out"]
    turned = judge_feedback(rows[::-1], [], FeedbackTrust(max_user_share=0.1))
    assert {rows[::-1][at].id for at in range(len(rows)) if at not in turned.rules} == kept


def test_a_key_gives_at_most_its_share_whatever_its_users_are_called_and_no_key_is_none() -> None:
    rows = [row for i in range(30) for row in flat(2, f"sybil{i}", "k1")] + flat(20, "a", "k2") + flat(20, "b")

    found = judge_feedback(rows, [], FeedbackTrust(max_key_share=0.3))

    assert Counter(rows[at].key for at in found.rules) == {"k1": 30}
    assert {rule for rule, _, _ in found.rules.values()} == {"key_cap"}


def test_in_a_small_batch_everybody_may_give_some_rows() -> None:
    assert judge_feedback(flat(15, "only"), [], FeedbackTrust()).rules == {}
    assert len(judge_feedback(flat(15, "only"), [], FeedbackTrust(min_rows=10)).rules) == 5


# ── canaries ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_who_answers_a_canary_wrongly_is_not_believed_and_no_canary_trains() -> None:
    canary = Canary(prompt="What is two  and two?", answers=("four", "4"))
    ask = [
        Said(id="c1", question="what is two and two?", answer=" Four", user="u1"),
        Said(id="c2", question="what is two and two?", answer="five", user="u2"),
        Said(id="c3", question="what is two and two?", answer="5", user="u3", votes=False),
    ]
    rows = ask + [row for name in ("u1", "u2", "u3") for row in flat(3, name)]

    found = judge_feedback(rows, [], FeedbackTrust(canaries=(canary,)))

    assert [found.rules[at][0] for at in range(3)] == ["canary"] * 3
    assert {rows[at].user for at, (rule, _, _) in found.rules.items() if rule == "canary_failed"} == {"u2"}
    assert len(found.rules) == 6
    assert "1 of 3 users answered canaries wrongly; 3 rows of theirs" in found.figures["attacks"][0]


# ── the same as plainly ───────────────────────────────────────────────────────────────────────────────────────────────


def crowd_of(seed: int) -> tuple[list[Said], list[Said]]:
    """Rows of a world of its own for each seed, and earlier ones: liars, a phrase, few or many answers, strange texts."""
    generator = random.Random(seed)
    liars = generator.choice([0, 3, 6])
    rows = world(seed, users=generator.choice([8, 40, 60]), liars=liars, errors=generator.choice([0.0, 0.1, 0.3]))
    strange = ["", "...", "ß ß ß", "one", "one one one two", " ".join(f"w{i}" for i in range(300))]
    for i in range(generator.randint(0, 60)):
        answer = generator.choice(["intent 0", "INTENT  0", "something else", f"free text {i}", ""])
        rows.append(
            Said(
                id=f"s{i}",
                question=generator.choice(strange),
                answer=answer,
                user=f"u{generator.randrange(70)}",
                key=generator.choice(["", "k1", "k2"]),
                votes=generator.random() < 0.8,
            )
        )
    generator.shuffle(rows)
    return rows, world(seed, users=10, rows=generator.randint(0, 8))  # of the same world: intents have the same words


@pytest.mark.parametrize("seed", range(10))
def test_what_is_found_is_what_is_found_plainly(seed: int) -> None:
    rows, earlier = crowd_of(seed)
    policy = FeedbackTrust(
        max_key_share=0.5 + 0.05 * seed,
        canaries=(Canary(prompt="one", answers=("intent 0",)),) if seed % 3 == 0 else (),
        error_rate=0.2 if seed % 2 else 0.01,
    )

    found, plainly = judge_feedback(rows, earlier, policy), plain_trust.judge_feedback(rows, earlier, policy)

    assert found.rules == plainly.rules
    assert found.figures == plainly.figures
    assert found.figures["rows_compared"] > 0


def test_the_worlds_that_are_compared_have_liars_and_phrases() -> None:
    rules = Counter(
        rule for seed in range(10) for rule, _, _ in judge_feedback(*crowd_of(seed), FeedbackTrust()).rules.values()
    )

    assert rules["disagreeing_user"] > 10 and rules["backdoor_phrase"] > 50, rules


@pytest.mark.parametrize("rows", [[], [Said(id="1", question="a b", answer="c", user="u")]])
def test_of_nobody_and_of_one_nothing_is_found(rows: list[Said]) -> None:
    assert judge_feedback(rows, [], FeedbackTrust()).rules == {}
