"""Laws of the feedback log as a source: every answer is a row, and traffic that comes later changes nothing that was listed."""

from __future__ import annotations

import itertools

import pytest
from postgres import postgres_server, postgres_url  # noqa: F401
from pydantic import TypeAdapter

from aifactory.config.sources import Source
from aifactory.ingest.databases import keys_of_log
from aifactory.ingest.listing import list_pieces
from aifactory.ingest.readers import read_piece
from aifactory.records.database import Database
from aifactory.records.feedback import Completion, Feedback, FeedbackLog
from aifactory.records.journal import Journal
from aifactory.records.tables import feedback

SOURCES = TypeAdapter(Source)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    return f"sqlite:///{tmp_path}/state.db" if request.param == "sqlite" else request.getfixturevalue("postgres_url")


@pytest.fixture
def log(url):
    """The log of a factory in which two answers fall into every tick of the clock."""
    database = Database(url)
    ticks = itertools.count(10)
    yield FeedbackLog(Journal(database, "shop", clock=lambda: 1.7e9 + next(ticks) // 2 + 0.125))
    database.close()


def answer(log, number, *, corrected=False, user=None):
    completion = Completion(
        id=f"cmpl-{(number * 7919) % 1000:03d}",
        release=1,
        prompt=f"question {number}",
        answer=f"answer {number}",
        request="{}",
        finish_reason="stop",
        prompt_tokens=2,
        answer_tokens=2,
        user=user,
    )
    log.log_completion(completion)
    if corrected:
        log.record(Feedback(completion=completion.id, idempotency_key=completion.id, correction=f"better {number}"))
    return completion


def listed(url, of, *, factory="shop", **options):
    source = SOURCES.validate_python({"name": "log", "kind": "feedback", "of": of, **options})
    return list_pieces([source.belonging_to(factory, url)]).pieces


def rows_of(pieces):
    return [row for piece in pieces for block in read_piece(piece) for row in block.rows.to_pylist()]


def keys_of(pieces):
    return keys_of_log(pieces[0].section, [span.stop for piece in pieces for span in piece.spans])


def test_every_answer_is_a_row_in_the_order_of_time(log, url):
    given = [answer(log, number, user="ann" if number % 2 else None) for number in range(6)]

    rows = rows_of(listed(url, "completions"))

    assert sorted((row["prompt"], row["text"], row["user"], row["origin"]) for row in rows) == [
        (each.prompt, each.answer, each.user or each.id, each.id) for each in given
    ]
    assert [row["timestamp"] for row in rows] == sorted(row["timestamp"] for row in rows)


def test_corrections_are_answers_and_preferences_are_pairs(log, url):
    for number in range(6):
        answer(log, number, corrected=number % 2 == 0)

    wanted = {f"question {number}": (f"better {number}", f"answer {number}") for number in (0, 2, 4)}
    corrections, preferences = (rows_of(listed(url, of)) for of in ("corrections", "preferences"))
    assert {row["prompt"]: row["text"] for row in corrections} == {name: pair[0] for name, pair in wanted.items()}
    assert [row["rejected"] for row in corrections] == ["", "", ""]
    found = {row["prompt"] or row["messages"]: (row["text"], row["rejected"]) for row in preferences}
    assert sorted(found.values()) == sorted(wanted.values())


def test_scores_are_answers_with_a_label(log, url):
    for number, score in enumerate((1.0, 0.0, 0.5, 0.49, None)):
        completion = answer(log, number)
        log.record(Feedback(completion=completion.id, idempotency_key=f"key {number}", score=score, comment="so"))

    def labels(**options):
        return {row["text"]: row["label"] for row in rows_of(listed(url, "scores", **options))}

    assert labels() == {"answer 0": "true", "answer 1": "false", "answer 2": "true", "answer 3": "false"}
    assert labels(liked_from=0.9) == {"answer 0": "true", "answer 1": "false", "answer 2": "false", "answer 3": "false"}
    with pytest.raises(ValueError, match="liked_from beside of: scores alone"):
        listed(url, "corrections", liked_from=0.9)


def test_a_choice_is_a_pair_of_the_answer_that_was_preferred_and_each_other(log, url):
    for name in ("a-0", "a-1", "a-2", "b-0"):
        text = f"said {name}"
        log.log_completion(
            Completion(
                id=name,
                release=1,
                prompt=f"question {name[0]}",
                answer=text,
                request="{}",
                finish_reason="stop",
                prompt_tokens=2,
                answer_tokens=2,
            )
        )
    log.record(Feedback(completion="a-1", idempotency_key="one", rejected=("a-0", "a-2"), user="ann"))
    log.record(Feedback(completion="b-0", idempotency_key="two", correction="better"))

    rows = rows_of(listed(url, "preferences"))

    assert sorted((row["text"], row["rejected"], row["origin"]) for row in rows) == [
        ("better", "said b-0", "b-0"),
        ("said a-1", "said a-0", "a-1"),
        ("said a-1", "said a-2", "a-1"),
    ]
    assert {row["user"] for row in rows if row["origin"] == "a-1"} == {"ann"}
    assert rows_of(listed(url, "corrections"))[0]["text"] == "better"


@pytest.mark.parametrize("of", ["completions", "corrections", "preferences"])
def test_traffic_that_comes_later_changes_nothing_that_was_listed(log, url, of):
    for number in range(5):
        answer(log, number, corrected=True)
    before = listed(url, of)
    rows = rows_of(before)

    for number in range(5, 9):
        answer(log, number, corrected=True)

    assert rows_of(before) == rows
    after = listed(url, of)
    assert [piece.digest for piece in after] != [piece.digest for piece in before]
    assert len(rows_of(after)) == 9


def test_the_key_by_which_feedback_came_identifies_it_and_is_no_column_of_its_row(log, url):
    answer(log, 1, corrected=True)
    without = listed(url, "corrections")
    rows = rows_of(without)
    log.journal.key_id = "partner"
    keyed = [answer(log, number, corrected=True) for number in (2, 3)]
    both = listed(url, "corrections")

    assert [row.keys() for row in rows_of(both)] == [rows[0].keys()] * 3
    assert keys_of(both) == {each.id: "partner" for each in keyed}
    assert keys_of(without) == keys_of(listed(url, "corrections", factory="other")) == {}
    with log.database.write() as connection:
        connection.execute(feedback.update().values(key_id="anonymous"))
    assert [piece.digest for piece in listed(url, "corrections")] != [piece.digest for piece in both]


def test_where_all_feedback_came_by_one_key_it_is_told_apart_from_nothing(log, url):
    log.journal.key_id = "application"
    for number in range(3):
        answer(log, number, corrected=True)

    assert keys_of(listed(url, "corrections")) == {}


def test_an_empty_log_has_no_rows_and_stays_so_for_who_listed_it(log, url):
    assert log.counts()["completions"] == 0  # the tables are there
    before = listed(url, "corrections")
    answer(log, 1, corrected=True)

    assert rows_of(before) == []
    assert len(rows_of(listed(url, "corrections"))) == 1


def test_the_log_of_another_factory_is_not_seen(log, url):
    answer(log, 1, corrected=True)

    assert rows_of(listed(url, "completions", factory="other")) == []


def test_a_source_that_names_a_database_keeps_its_permissions():
    told = {"name": "log", "kind": "feedback", "of": "completions", "url": "postgresql://db.example/f", "factory": "a"}
    source = SOURCES.validate_python(told).belonging_to("mine", "sqlite:///mine.db")

    assert (source.factory, source.url, source.allow_private) == ("a", told["url"], False)
    assert "url" not in source.recipe()
