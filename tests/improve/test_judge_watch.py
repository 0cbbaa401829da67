"""Laws of the judge on answers that are given: measured before it is used, a sample, once each; it triggers, and promotes nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from judge_servers import JudgeServer, judging

from aifactory.config import Config, Improve, LiveJudge
from aifactory.errors import ConfigError
from aifactory.evaluate.judge import Judged, Pair
from aifactory.evaluate.judge_agreement import (
    LabelledAnswer,
    agreement_on_answers,
    agreement_on_pairs,
    read_labels,
)
from aifactory.improve.decision import Retrain, Wait, decide
from aifactory.improve.evaluation import Evaluation, observe, published_batches
from aifactory.improve.judge_watch import JUDGED_BAD, UNJUDGED
from aifactory.records.books import Books
from aifactory.records.feedback import Completion
from aifactory.records.verdicts import Verdict
from aifactory.workshop.judging import GradeAnswers, measure_judge, require_measured

Tools = Any


def is_bad(answer: str) -> bool:
    return answer.startswith("wrong")


def graded(prompt: str, answer: str) -> str:
    return "B" if is_bad(answer) else "A"


def watched(books: Books, server: JudgeServer, **live: Any) -> Books:
    """The same books, with a judge of answers that are given."""
    plain = books.config.model_dump(mode="json")
    plain["evaluate"] |= {"judge": {"url": server.url, "model": "judge-1"}}
    plain["improve"]["live_judge"] = {"share": 1.0, **live}
    books.config = Config.model_validate(plain)
    return books


def labelled(folder: Path, *, errors: int = 0, good: int = 30, bad: int = 30) -> str:
    rows = [{"prompt": f"p{i}", "answer": f"right {i}", "good": i >= errors} for i in range(good)]
    rows += [{"prompt": f"q{i}", "answer": f"wrong {i}", "good": False} for i in range(bad)]
    file = folder / "labelled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def give(books: Books, answers: list[str], *, start: int = 0) -> None:
    books.journal.clock.at += 1  # type: ignore[attr-defined]
    for i, answer in enumerate(answers, start):
        books.feedback.log_completion(
            Completion(
                id=f"cmpl-{i:05}",
                release=1,
                prompt=f"question {i}",
                answer=answer,
                request="{}",
                finish_reason="stop",
                prompt_tokens=1,
                answer_tokens=1,
            )
        )
    books.journal.clock.at += 10  # type: ignore[attr-defined]


def looking(books: Books, tools: Tools) -> Evaluation:
    judge = books.config.evaluate.judge
    assert judge is not None
    return Evaluation(books, score=tools.Scorer(0.9), launcher=tools.FakeLauncher(books), grade=GradeAnswers(judge))


def look(evaluation: Evaluation, times: int = 1) -> None:
    for _ in range(times):
        evaluation.tick()
        assert evaluation._judge is not None
        evaluation._judge.settle(10.0)


# ── measured ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_judge_is_measured_on_labelled_answers_and_pairs_and_that_is_kept(books: Books, tmp_path: Path) -> None:
    file = Path(labelled(tmp_path, errors=3))
    pair = {"prompt": "p", "first": "longer", "second": "short", "preferred": "first"}
    file.write_text(file.read_text() + json.dumps(pair) + "\n")
    with judging(lambda _, first, second: "A" if len(first) > len(second) else "B") as server:
        server.grade = graded
        found = measure_judge(watched(books, server), str(file))

    answers = {each.kind: each for each in found.agreements}["answers"]
    assert (answers.number, answers.accuracy.estimate, answers.unclear) == (60, 57 / 60, 0)
    assert 0.85 < answers.accuracy.low < 0.95 < answers.accuracy.high
    assert answers.kappa == pytest.approx(0.9) and 0.75 < answers.kappa_low < 0.9 < answers.kappa_high <= 1
    plain = json.loads(json.dumps(found.to_json()))
    assert [each["kind"] for each in plain["agreements"]] == ["pairs", "answers"]
    assert found.lines()[0].startswith("The judge judge-1 on ")
    # One pair is too few for evaluate.judge.min_agreement, whatever was said of it.
    assert not found.holds and "of pairs" in found.shortcomings[0]
    require_measured(books)


def test_a_judge_that_was_not_measured_or_is_too_bad_is_refused_with_what_to_do(books: Books, tmp_path: Path) -> None:
    with judging(lambda *_: "C") as server:
        server.grade = graded
        watched(books, server)
        with pytest.raises(
            ConfigError, match=r"found that it was not; measure it: aifactory judge measure FILE CONFIG"
        ):
            require_measured(books)
        assert not measure_judge(books, labelled(tmp_path, errors=25)).holds
        with pytest.raises(ConfigError, match=r"to agree with people on at least 70% of answers.*take another judge"):
            require_measured(books)
        assert measure_judge(books, labelled(tmp_path)).holds
        require_measured(books)
        # Other words, or another version, are another judge.
        judge = books.config.evaluate.judge
        assert judge is not None
        for change in ({"answer_rubric": "Be kind."}, {"version": "judge-2"}):
            other = books.config.evaluate.model_copy(update={"judge": judge.model_copy(update=change)})
            changed = books.config.model_copy(update={"evaluate": other})
            books.config, kept = changed, books.config
            with pytest.raises(ConfigError, match="found that it was not"):
                require_measured(books)
            books.config = kept


def test_who_says_the_same_of_all_agrees_by_chance_alone(tmp_path: Path, books: Books) -> None:
    with judging(lambda *_: "C") as server:  # it grades everything A
        found = measure_judge(watched(books, server), labelled(tmp_path, good=57, bad=3))

    (answers,) = found.agreements
    assert answers.accuracy.low > 0.8 and answers.kappa == 0.0
    assert not found.holds


def test_the_love_of_a_place_is_measured() -> None:
    generator = random.Random(0)
    pairs = [
        Pair(prompt="p", first="a", second="b", preferred=generator.choice(["first", "second"])) for _ in range(200)
    ]
    right = [1.0 if pair.preferred == "first" else -1.0 for pair in pairs]

    fair = agreement_on_pairs(pairs, [Judged(forward=r, backward=r) for r in right])
    assert fair.first_place is not None
    assert (fair.first_place.estimate, fair.consistent, fair.accuracy.estimate) == (0.5, 1.0, 1.0)

    # Of three pairs it looks at one; of the others it says what stands first.
    judged = [Judged(forward=r if i % 3 == 0 else 1.0, backward=r if i % 3 == 0 else -1.0) for i, r in enumerate(right)]
    biased = agreement_on_pairs(pairs, judged)
    assert biased.first_place is not None and biased.first_place.low > 0.75
    assert biased.consistent == pytest.approx(1 / 3, abs=0.01)


def test_the_intervals_of_accuracy_and_kappa_hold_what_is_true_as_often_as_they_say() -> None:
    """2,000 labelled sets of 80: people find 30 % bad, the judge errs in 15 % of what is good and 25 % of what is bad."""
    generator = random.Random(1)
    true_accuracy = 0.7 * 0.85 + 0.3 * 0.75
    said_bad = 0.7 * 0.15 + 0.3 * 0.75
    chance = 0.3 * said_bad + 0.7 * (1 - said_bad)
    true_kappa = (true_accuracy - chance) / (1 - chance)
    held = [0, 0]
    for _ in range(400):
        good = [generator.random() < 0.7 for _ in range(80)]
        bad = [(generator.random() < 0.15) if each else (generator.random() >= 0.25) for each in good]
        found = agreement_on_answers([LabelledAnswer(prompt="", answer="", is_good=each) for each in good], list(bad))
        held[0] += found.accuracy.low <= true_accuracy <= found.accuracy.high
        held[1] += found.kappa_low <= true_kappa <= found.kappa_high
    print(f"95 % intervals hold the accuracy in {held[0] / 4:.1f} % and kappa in {held[1] / 4:.1f} % of 400 sets of 80")
    assert all(0.92 <= each / 400 <= 0.99 for each in held)


def test_a_wrong_line_of_labels_is_named() -> None:
    line = json.dumps({"prompt": "p", "answer": "a", "good": True})
    assert read_labels(f"{line}\n\n", origin="l.jsonl")[1] == [LabelledAnswer(prompt="p", answer="a", is_good=True)]
    for wrong in ("x", "[]", '{"prompt": "p", "answer": "a"}', line.replace("true", '"yes"')):
        with pytest.raises(ConfigError, match=r"l\.jsonl:2: expected"):
            read_labels(f"{line}\n{wrong}", origin="l.jsonl")
    with pytest.raises(ConfigError, match="found none"):
        read_labels("", origin="l.jsonl")


# ── watching ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_answers_that_are_bad_too_often_are_said_once_and_are_a_reason_to_retrain(
    books: Books, tools: Tools, tmp_path: Path
) -> None:
    with judging(lambda *_: "C") as server:
        server.grade = graded
        watched(books, server)
        measure_judge(books, labelled(tmp_path))
        evaluation = looking(books, tools)
        give(books, ["right"] * 40)
        look(evaluation, 5)
        judge = books.config.evaluate.judge
        assert judge is not None
        assert books.verdicts.of(1, judge=judge.measured_as("answers"), since=0.0) == [False] * 40
        assert not books.journal.events(event=JUDGED_BAD)

        give(books, ["wrong", "right"] * 20, start=40)
        look(evaluation, 6)
        again = looking(books, tools)  # it was killed: another one goes on, and judges nothing twice
        look(again, 3)

    (event,) = books.journal.events(event=JUDGED_BAD)
    assert event.subject == "small-r1" and event.detail["bad"] <= 20
    assert len([asked for asked, _ in server.asked if "Answer:\n" in asked["messages"][1]["content"]]) == 60 + 80
    seen = observe(books, published_batches(books))
    assert seen.judged == event.detail["said"]
    assert isinstance(decide(books.config.improve, seen), Wait)  # nothing is new
    tools.correct(books, 8, start=0)
    with_feedback = observe(books, [])
    decision = decide(
        books.config.improve,
        type(seen)(**{n: getattr(with_feedback, n) for n in seen.__dataclass_fields__} | {"new_batches": ("batch/1",)}),
    )
    assert isinstance(decision, Retrain)
    assert decision.reasons[0].startswith("the judge finds too many answers bad: ")
    quiet = Improve(live_judge=LiveJudge(retrain=False))
    only_said = decide(
        quiet, type(seen)(**{n: getattr(seen, n) for n in seen.__dataclass_fields__} | {"new_batches": ("batch/1",)})
    )
    assert isinstance(only_said, Wait) and only_said.reasons[0] == decision.reasons[0]


def test_a_sample_is_judged_and_no_more_than_so_many_an_hour(books: Books, tools: Tools, tmp_path: Path) -> None:
    with judging(lambda *_: "C") as server:
        server.grade = graded
        watched(books, server, share=0.3, per_hour=20)
        measure_judge(books, labelled(tmp_path))
        measured = len(server.asked)
        evaluation = looking(books, tools)
        give(books, ["right"] * 30)
        look(evaluation, 4)
        few = len(server.asked) - measured
        assert 3 <= few <= 16
        give(books, ["right"] * 200, start=30)
        look(evaluation, 6)
        assert len(server.asked) - measured == 20
        books.journal.clock.at += 3600  # type: ignore[attr-defined]
        look(evaluation, 3)
        assert len(server.asked) - measured == 20  # what was given beyond is passed over
        give(books, ["right"] * 30, start=230)
        look(evaluation, 3)
        assert len(server.asked) - measured > 20


def test_a_judge_that_is_away_or_was_changed_stops_nothing_and_is_said_once(
    books: Books, tools: Tools, tmp_path: Path
) -> None:
    with judging(lambda *_: "C") as server:
        server.grade = graded
        watched(books, server)
        measure_judge(books, labelled(tmp_path))
        evaluation = looking(books, tools)
        give(books, ["right"] * 5)
        server.version = "judge-2"
        for _ in range(3):
            look(evaluation, 2)
            books.journal.clock.at += 61  # type: ignore[attr-defined]
        (event,) = books.journal.events(event=UNJUDGED)
        assert "expected the judge judge-1" in event.detail["error"]
        server.version = "judge-1"
        look(evaluation, 3)
        judge = books.config.evaluate.judge
        assert judge is not None
        assert len(books.verdicts.of(1, judge=judge.measured_as("answers"), since=0.0)) == 5


def test_an_unmeasured_judge_is_asked_nothing_of_answers_that_are_given(books: Books, tools: Tools) -> None:
    with judging(lambda *_: "C") as server:
        watched(books, server)
        give(books, ["right"] * 5)
        look(looking(books, tools), 3)

    assert server.asked == []
    (event,) = books.journal.events(event=UNJUDGED)
    assert "aifactory judge measure FILE CONFIG" in event.detail["error"]


def test_verdicts_go_with_the_answers_they_are_on_and_one_on_what_is_gone_is_dropped(books: Books) -> None:
    give(books, ["right", "wrong"])
    books.verdicts.add(
        [
            Verdict(completion=f"cmpl-0000{i}", release=1, judge="j", is_bad=bad)
            for i, bad in enumerate([False, True, True])
        ]
    )
    books.verdicts.add([Verdict(completion="cmpl-00000", release=1, judge="j", is_bad=True)])

    assert books.verdicts.of(1, judge="j", since=0.0) == [False, True]
    assert books.verdicts.known(["cmpl-00000", "cmpl-00002"]) == {"cmpl-00000"}
    with books.database.write() as connection:
        connection.exec_driver_sql("DELETE FROM completions WHERE id = 'cmpl-00001'")
    assert books.verdicts.of(1, judge="j", since=0.0) == [False]
