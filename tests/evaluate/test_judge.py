"""Laws of the judge: places make no difference, another judge is noticed, and it counts as far as it agrees with people."""

from __future__ import annotations

import json
import random

import pytest
from judge_servers import judging

from aifactory.config import Evaluate, Judge, PromoteGate
from aifactory.errors import ConfigError, JudgeError
from aifactory.evaluate.gate import Comparison, Evidence, Promote, Reject, judge
from aifactory.evaluate.judge import (
    JudgeClient,
    Pair,
    agreement,
    judgement,
    judgement_of,
    read_labelled,
)
from aifactory.evaluate.statistics import Interval


def longer(_, first, second):
    return "C" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


def asked(server, **options):
    return Judge(url=server.url, model="judge-1", **options)


def client(server, **options):
    return JudgeClient(asked(server, **options), sleep=lambda _: None)


PAIRS = [
    Pair(prompt="p1", first="long one", second="short"),
    Pair(prompt="p2", first="x", second="yy"),
    Pair(prompt="p3", first="same", second="same"),
]


def test_each_pair_is_asked_in_both_orders_without_chance_and_with_the_key(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with judging(longer) as server:
        said = client(server, api_key="${JUDGE_KEY}", rubric="Longer is better.").judge(PAIRS)

    assert [each.preferred for each in said] == ["first", "second", "tie"]
    assert [each.value for each in said] == [1.0, -1.0, 0.0]
    bodies = [body for body, _ in server.asked]
    assert len(bodies) == 6
    assert {(body["model"], body["temperature"], body["seed"]) for body in bodies} == {("judge-1", 0, 0)}
    assert all("Longer is better." in body["messages"][0]["content"] for body in bodies)
    assert {key for _, key in server.asked} == {"Bearer secret"}


def test_a_judge_that_loves_a_place_finds_nothing_but_ties():
    with judging(lambda *_: "A") as server:
        said = client(server).judge(PAIRS)

    found = judgement(asked(server), said, ["a", "b", "c"], None, confidence=0.95, samples=200)
    assert [each.preferred for each in said] == ["tie"] * 3
    assert (found.consistent, found.wins, found.losses, found.ties) == (0.0, 0, 0, 3)
    assert found.preference.estimate == 0


def test_letters_are_found_in_what_is_said_and_what_names_none_is_counted():
    words = iter(["**A**", "Answer: B.", "I can't say", "", "Both are bad, so C", "(C)"])
    with judging(lambda *_: next(words)) as server:
        said = client(server, concurrency=1).judge(PAIRS)

    assert [(each.value, each.unclear) for each in said] == [(1.0, 0), (0.0, 2), (0.0, 0)]


def test_another_judge_than_the_one_that_is_pinned_is_noticed():
    with judging(longer) as server:
        server.version = "judge-2"
        with pytest.raises(JudgeError, match=r"expected the judge judge-1 .* calls itself \['judge-2'\]"):
            client(server).judge(PAIRS)
        assert len(client(server, version="judge-2").judge(PAIRS)) == 3


@pytest.mark.parametrize(("fails", "succeeds"), [([500], True), ([429, 503], True), ([500] * 9, False), ([401], False)])
def test_it_is_asked_again_where_that_may_help(fails, succeeds):
    with judging(longer) as server:
        server.fails = list(fails)
        if succeeds:
            assert client(server, concurrency=1).judge(PAIRS[:1])[0].value == 1.0
        else:
            server.fails = fails * 9
            with pytest.raises(JudgeError, match=f"expected an answer of the judge at .*, found {fails[0]}"):
                client(server, concurrency=1).judge(PAIRS[:1])
            assert len(server.asked) in ((1, 2) if fails == [401] else (3, 4, 5, 6))  # one question, or both orders


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"choices": []}', b"<html>", b'{"choices": [{"message": null}]}']
)
def test_what_is_no_completion_is_an_error_that_shows_it(body):
    with judging(longer) as server:
        server.body = body
        with pytest.raises(JudgeError, match="expected a chat completion from the judge"):
            client(server).judge(PAIRS)


def test_nobody_there_is_an_error_that_says_where():
    with judging(longer) as server:
        gone = client(server, timeout_s=1)
    with pytest.raises(JudgeError, match="expected an answer of the judge at http://127"):
        gone.judge(PAIRS[:1])


# ── people ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def labelled(number, *, errors, seed=0):
    """Pairs in which people prefer the longer answer, but for some."""
    generator = random.Random(seed)
    pairs = []
    for i in range(number):
        first, second = "x" * generator.randint(1, 9), "y" * generator.randint(1, 9)
        right = {"A": "first", "B": "second", "C": "tie"}[longer("", first, second)]
        wrong = generator.choice([each for each in ("first", "second", "tie") if each != right])
        preferred = wrong if generator.random() < errors else right
        pairs.append(Pair(prompt=f"p{i}", first=first, second=second, preferred=preferred))
    return pairs


@pytest.mark.parametrize(("errors", "share", "kappa"), [(0.0, 1.0, 1.0), (0.2, 0.8, 0.66), (0.67, 0.33, 0.0)])
def test_its_agreement_with_people_is_measured_beyond_chance(errors, share, kappa):
    pairs = labelled(60, errors=errors)
    with judging(longer) as server:
        found = agreement(pairs, client(server, concurrency=8).judge(pairs))

    print(f"errors {errors}: agreement {found.share:.2f} [{found.low:.2f}, {found.high:.2f}], kappa {found.kappa:.2f}")
    assert found.share == pytest.approx(share, abs=0.15)
    assert found.kappa == pytest.approx(kappa, abs=0.25)
    assert found.low <= found.share <= found.high
    assert found.number == 60


def test_labelled_pairs_are_read_and_a_wrong_line_is_named():
    line = json.dumps({"prompt": "p", "first": "a", "second": "b", "preferred": "tie"})
    assert (
        read_labelled(f"{line}\n\n{line}\n", origin="pairs.jsonl")
        == [Pair(prompt="p", first="a", second="b", preferred="tie")] * 2
    )
    for wrong in ('{"prompt": "p"}', "[]", "x", line.replace("tie", "both")):
        with pytest.raises(ConfigError, match=r"pairs\.jsonl:2: expected"):
            read_labelled(f"{line}\n{wrong}", origin="pairs.jsonl")
    with pytest.raises(ConfigError, match="found none"):
        read_labelled("\n", origin="pairs.jsonl")


# ── the gate ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def interval(estimate, width=0.01):
    return Interval(
        estimate=estimate,
        low=estimate - width,
        high=estimate + width,
        confidence=0.95,
        num_examples=99,
        num_clusters=99,
    )


BETTER = Comparison(name="holdout", candidate=interval(1.0), over_champion=interval(-0.1), over_unigram=interval(-1.0))


def verdict_of(judge_said, people, *, errors):
    """What the gate says of a candidate that has fewer bits per byte, and of which a judge says this."""
    with judging(longer) as server:
        options = asked(server, min_agreement=0.6, concurrency=8)
        agreed = agreement(people, JudgeClient(options).judge(people)) if people else None
        pairs = [Pair(prompt="p", first=first, second=second) for first, second in judge_said]
        said = JudgeClient(options).judge(pairs)
    found = judgement(options, said, [str(i) for i in range(len(said))], agreed, confidence=0.95, samples=200)
    assert judgement_of(json.loads(json.dumps(found.to_json()))) == found
    return judge(Evidence(fixed=BETTER, target=None, parity_error=0.0, judge=found), PromoteGate())


def test_a_candidate_whose_answers_are_worse_is_rejected_where_the_judge_agrees_with_people():
    worse = [("x", "xx")] * 40 + [("xx", "x")] * 5

    rejected = verdict_of(worse, labelled(40, errors=0.05), errors=0.05)
    assert isinstance(rejected, Reject)
    (reason,) = [each for each in rejected.reasons if each.startswith("failed")]
    assert (
        "judge-1 prefers the candidate in 5, production in 40 and neither in 0 answers (100% the same in both" in reason
    )
    assert "it agrees with people on" in reason
    assert isinstance(verdict_of([(b, a) for a, b in worse], labelled(40, errors=0.05), errors=0.05), Promote)


@pytest.mark.parametrize(("errors", "why"), [(0.6, "too little, so that is not heeded"), (None, "was not measured")])
def test_a_judge_that_does_not_agree_with_people_is_heard_and_not_heeded(errors, why):
    people = [] if errors is None else labelled(40, errors=errors)

    verdict = verdict_of([("x", "xx")] * 40, people, errors=errors)

    assert isinstance(verdict, Promote)
    assert any(why in each for each in verdict.reasons if each.startswith("passed: judge"))


# ── identity ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_where_it_is_bears_no_identity_and_what_it_is_does(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    base = Judge(url="http://a/v1", model="m", labelled=str(tmp_path / "pairs.jsonl"))
    told = base.recipe()

    assert told["version"] == "m"
    same = base.model_copy(update={"url": "https://b/v1", "api_key": "${K}", "timeout_s": 9.0, "concurrency": 1})
    assert same.recipe() == told
    for change in ({"model": "n"}, {"version": "m-2"}, {"rubric": "Be kind."}, {"max_pairs": 7}):
        assert base.model_copy(update=change).recipe() != told
    (tmp_path / "pairs.jsonl").write_text("{ }\n")
    assert base.recipe() != told


def test_a_recipe_without_a_judge_is_the_one_that_it_was():
    assert "judge" not in Evaluate().model_dump(mode="json")
    with pytest.raises(ConfigError, match="correct the path"):
        Judge(url="http://a/v1", model="m", labelled="/nowhere/at/all").recipe()
