"""The arithmetic of the loop's benchmark: who says what, what is sealed, and what is drawn."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import clinc
import loop_picture
import loop_story
import pytest
import runner
from loop_users import Phase, Users
from test_benchmarks import benchmark

loop = benchmark("loop")
INTENTS = [f"intent {number}" for number in range(60)]
PHASE = Phase(name="a part", per_s=1, intents=INTENTS, corrects=0.5, mistakes=0.1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file in the form of the data set: 60 intents; one query of the test is also asked by users."""
    parts = {
        part: [[f"{part} query {i} of {n}", f"intent_{n}"] for n in range(60) for i in range(number)]
        for part, number in (("train", 5), ("val", 2), ("test", 3))
    }
    parts["test"] += [parts["val"][0], parts["train"][-1]]
    file = tmp_path / "data.json"
    file.write_text(json.dumps(parts), encoding="utf-8")
    return file


def users() -> Users:
    return Users([{"prompt": f"{intent}: {number}", "intent": intent} for intent in INTENTS for number in range(4)])


def test_every_key_is_told_of_in_the_docstring_and_quick_takes_less_of_everything() -> None:
    assert all(f" {key} " in loop.__doc__ or f" {key}\n" in loop.__doc__ for key in loop._FIGURES)
    for name in ("first_steps", "retrain_steps", "batch_rows", "cycles", "kills", "longest_s", "sealed"):
        assert getattr(loop.QUICK, name) < getattr(loop.FULL, name)


def test_nothing_that_is_sealed_is_taught_or_asked_and_what_is_new_is_not_taught(data: Path) -> None:
    found = clinc.Clinc.read(data)

    assert (len(found.old), len(found.new)) == (10, 50)
    assert not set(found.old) & set(found.new)
    assert {intent for _, intent in found.taught()} == set(found.old)
    assert {intent for _, intent in found.asked()} == {*found.old, *found.new}
    sealed = found.sealed([*found.old, *found.new])
    assert len(sealed) == 180
    assert not {query for query, _ in sealed} & {query for query, _ in found.taught() + found.asked()}
    assert not {query for query, _ in found.taught()} & {query for query, _ in found.asked()}


@pytest.mark.parametrize("text", ["{}", "not json", '{"train": [1]}'])
def test_another_file_is_an_error_that_says_where_the_data_can_be_had(tmp_path: Path, text: str) -> None:
    file = tmp_path / "data.json"
    file.write_text(text, encoding="utf-8")

    with pytest.raises(SystemExit, match="clinc/oos-eval"):
        clinc.Clinc.read(file)
    with pytest.raises(SystemExit, match="FileNotFoundError"):
        clinc.Clinc.read(tmp_path / "nowhere.json")


def test_users_ask_about_all_intents_alike_and_come_again_only_when_all_was_asked() -> None:
    some = users()
    asked = [some.question(PHASE) for _ in range(6000)]

    by_intent = Counter(intent for _, intent in asked)
    assert set(by_intent) == set(INTENTS)
    assert max(by_intent.values()) < 2 * min(by_intent.values())
    for intent in INTENTS:
        prompts = [prompt for prompt, of in asked if of == intent]
        assert all(len(set(prompts[i : i + 4])) == 4 for i in range(0, len(prompts) - 3, 4))
    assert {users().question(replace(PHASE, intents=INTENTS[:2]))[1] for _ in range(50)} <= set(INTENTS[:2])


def test_users_correct_the_share_of_wrong_answers_that_is_stated_and_err_in_the_share_that_is_stated() -> None:
    some = users()
    said = [some.correction(PHASE, INTENTS[3], INTENTS[4]) for _ in range(4000)]
    given = [each for each in said if each is not None]

    assert len(given) / 4000 == pytest.approx(0.5, abs=0.03)
    assert sum(each != INTENTS[3] for each in given) / len(given) == pytest.approx(0.1, abs=0.02)
    assert INTENTS[4] not in given, "nobody corrects an answer into itself"
    assert all(some.correction(PHASE, INTENTS[3], INTENTS[3]) is None for _ in range(100))


def test_liars_correct_right_answers_too_and_are_never_right() -> None:
    some, phase = users(), replace(PHASE, are_liars=True)
    for answer in (INTENTS[3], INTENTS[4]):
        given = [each for _ in range(500) if (each := some.correction(phase, INTENTS[3], answer)) is not None]
        assert len(given) > 200
        assert not set(given) & {INTENTS[3], answer}


def test_shares_and_their_changes_are_those_of_the_queries() -> None:
    intents = [intent for intent in INTENTS for _ in range(5)]
    right = [number % 5 < 4 for number in range(300)]
    before = [number % 5 < 2 for number in range(300)]

    found, change = loop_story.accuracy(right, intents), loop_story.accuracy(right, intents, minus=before)

    assert (found.estimate, found.num_examples, found.num_clusters) == (0.8, 300, 60)
    assert change.estimate == pytest.approx(0.4)
    assert loop_story.accuracy(right, intents, minus=right).high == 0


def test_what_users_saw_is_told_apart_by_old_and_new(data: Path) -> None:
    found = clinc.Clinc.read(data)
    old, new = found.old[0], found.new[0]
    lines: list[dict[str, Any]] = [
        {"intent": old, "answer": old},
        {"intent": old, "answer": new, "key": "1", "said": old},
        {"intent": new, "answer": old, "key": "2", "said": old},
        {"intent": new, "failed": "502 lost"},
    ]

    told = loop_story.told(lines, found)

    assert (told["requests"], told["failed"], told["failures"]) == (4, 1, {"502 lost": 1})
    assert (told["right_old"], told["right_new"], told["said"], told["said_wrongly"]) == (0.5, 0.0, 2, 1)


def test_a_cycle_is_disturbed_by_what_was_killed_while_it_ran_and_by_nothing_before_or_after_it() -> None:
    kills = [1602.5, 1611.2, 1700.6]
    spans = {
        "long before": (1160.4, 1368.9),
        "before": (1369.9, 1592.8),
        "in it": (1593.6, 1959.5),
        "after": (1960.0, 2100.0),
    }

    found = {name: loop_story.was_disturbed(*span, kills) for name, span in spans.items()}

    assert found == {"long before": False, "before": False, "in it": True, "after": False}
    assert not loop_story.was_disturbed(0.0, 2000.0, [])


def test_the_picture_stands_alone_and_shows_each_release_part_and_rejection() -> None:
    points = [
        loop_picture.Point(
            at_s=60.0 * n, label=f"r{n}", old=(0.8, 0.9, 1.0), new=(0.1 * n, 0.1 * n + 0.05, 0.2 * n + 0.1)
        )
        for n in range(3)
    ]
    spans = [loop_picture.Span(name="a & b", begin=0, end=100), loop_picture.Span(name="c", begin=100, end=200)]

    drawn = loop_picture.picture(points, spans, rejected=[150.0])

    root = ElementTree.fromstring(drawn)
    assert len(root.findall(".//{*}circle")) == 6
    assert len(root.findall(".//{*}path")) == 1
    assert {"a & b", "c"} <= {text.text for text in root.findall(".//{*}text")}
    assert "http" not in drawn.replace("http://www.w3.org/2000/svg", "")
    assert drawn == loop_picture.picture(points, spans, rejected=[150.0])


def test_a_result_lies_beside_its_picture_and_the_data_is_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "benchmarks" / "results"
    folder.parent.mkdir()
    monkeypatch.setattr(runner, "RESULTS", folder)
    monkeypatch.setattr(runner, "__file__", str(tmp_path / "benchmarks" / "runner.py"))
    monkeypatch.setattr(sys, "argv", ["x.py", "--data", str(tmp_path / "some.json")])

    def measure(quick: bool, rounds: int | None, data: Path) -> runner.Measured:
        return runner.Measured(figures={"a": 1.0}, raw={}, details={"file": data.name}, picture="<svg/>")

    runner.main("x", measure, data="what it holds")

    assert json.loads(capsys.readouterr().out) == {"a": 1.0}
    (result,), (drawn,) = folder.glob("x-*.json"), folder.glob("x-*.svg")
    found = json.loads(result.read_text(encoding="utf-8"))
    assert (found["details"], found["figures"], "picture" in found) == ({"file": "some.json"}, {"a": 1.0}, False)
    assert drawn.read_text(encoding="utf-8") == "<svg/>"
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit):
        runner.main("x", measure, data="what it holds")
    assert "--data" in capsys.readouterr().err
