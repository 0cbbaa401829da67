"""Laws of actions: confirmed, with a reason, only while what was looked at still holds, and written into the audit."""

from __future__ import annotations

import re

import pytest
from made_books import MadeBooks
from starlette.testclient import TestClient


def hidden(page: TestClient, do: str, release: int) -> dict[str, str]:
    answer = page.get(f"/releases/act?do={do}&release={release}")
    assert answer.status_code == 200, answer.text
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', answer.text))


def act(page: TestClient, do: str, release: int, **fields: str) -> int:
    data = {**hidden(page, do, release), "reason": "since it is so", **fields}
    return page.post("/releases/act", data=data).status_code


def serving(made: MadeBooks) -> int:
    release = made.books.registry.production()
    assert release is not None
    return release.number


def last_line(made: MadeBooks) -> tuple[str, str, str]:
    line = made.books.journal.audited().lines[-1]
    return line.action, line.subject, str(line.detail["reason"])


def test_looking_changes_nothing(made: MadeBooks, page: TestClient) -> None:
    before = len(made.books.journal.audited().lines), made.books.journal.events()[-1].seq
    for do in ("rollback", "canary", "shadow", "promote", "withdraw"):
        assert page.get(f"/releases/act?do={do}&release=1&reason=x&percent=5").status_code == 200
    assert (len(made.books.journal.audited().lines), made.books.journal.events()[-1].seq) == before


def test_a_rollback_serves_the_release_again_and_says_so(made: MadeBooks, page: TestClient) -> None:
    data = {**hidden(page, "rollback", 1), "reason": "since it is so"}
    done = page.post("/releases/act", data=data)

    assert (done.status_code, serving(made)) == (303, 1)
    assert last_line(made) == ("rollback", "made-r1", "since it is so")
    assert "made-r1 serves again." in page.get(done.headers["location"]).text
    assert "made-r1 serves again." not in page.get("/releases?said=made-r1+serves+again.").text


def test_a_rollback_may_put_what_it_replaces_into_quarantine(made: MadeBooks, page: TestClient) -> None:
    assert act(page, "rollback", 1, quarantine="yes") == 303
    assert set(made.books.registry.quarantined()) == {2}
    assert "is in quarantine" in page.get("/alerts").text


def test_a_canary_is_begun_widened_and_promoted(made: MadeBooks, page: TestClient) -> None:
    assert act(page, "canary", 1, percent="5", by="request") == 303
    trial = made.books.registry.trial()
    assert trial is not None
    assert (trial.release, trial.kind, trial.share, trial.by) == (1, "canary", 0.05, "request")

    assert act(page, "canary", 1, percent="12.5") == 303
    trial = made.books.registry.trial()
    assert trial is not None
    assert (trial.share, trial.by) == (0.125, "request")
    assert last_line(made) == ("canary", "made-r1", "since it is so")
    assert "12.5\u00a0% of the requests" in page.get("/releases").text

    assert act(page, "promote", 1) == 303
    assert (serving(made), made.books.registry.trial()) == (1, None)
    assert last_line(made) == ("promote", "made-r1", "since it is so")


def test_a_trial_that_a_cycle_began_ends_with_the_cycle(made: MadeBooks, page: TestClient) -> None:
    number = made.on_trial("drift-9", champion=2)
    assert act(page, "withdraw", number, quarantine="yes") == 303

    assert made.books.registry.trial() is None
    assert made.books.journal.cycle("drift-9").state == "rejected"  # type: ignore[union-attr]
    assert set(made.books.registry.quarantined()) == {number}


def test_a_shadow_is_begun(made: MadeBooks, page: TestClient) -> None:
    assert act(page, "shadow", 1, percent="50") == 303
    trial = made.books.registry.trial()
    assert trial is not None
    assert (trial.kind, trial.share) == ("shadow", 0.5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"reason": " "}, "expected a reason"),
        ({"percent": "101"}, "expected a share from 0 to 100"),
        ({"percent": "nan"}, "expected a share from 0 to 100"),
        ({"percent": "<b>"}, "expected a share from 0 to 100"),
        ({"do": "erase"}, "expected one of"),
        ({"release": "99"}, "found none: made-r99"),
        ({"release": "2"}, "beside the one in production"),
        ({"expected": ""}, "has changed since"),
    ],
)
def test_what_can_not_be_done_is_said_and_not_done(
    made: MadeBooks, page: TestClient, fields: dict[str, str], said: str
) -> None:
    lines = len(made.books.journal.audited().lines)
    data = {**hidden(page, "canary", 1), "reason": "why", "percent": "5", **fields}
    answer = page.post("/releases/act", data=data)

    assert answer.status_code == 409
    assert said in answer.text
    assert "<b>" not in re.findall(r'role="alert"[^>]*>(.*?)</p>', answer.text)[0]
    assert len(made.books.journal.audited().lines) == lines


def test_nothing_is_done_where_something_else_serves_than_was_seen(made: MadeBooks, page: TestClient) -> None:
    seen = {**hidden(page, "rollback", 1), "reason": "why"}
    made.released("run-9", champion=2)
    answer = page.post("/releases/act", data=seen)

    assert answer.status_code == 409
    assert "has changed since" in answer.text
    assert serving(made) == 3
    again = {**dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', answer.text)), "reason": "why"}
    assert page.post("/releases/act", data=again).status_code == 303
    assert serving(made) == 1


def test_the_registry_rolls_back_from_what_was_named_alone(made: MadeBooks) -> None:
    from aifactory.errors import StateError

    with pytest.raises(StateError, match="expected made-r1 on the channel production"):
        made.books.registry.rollback(reason="x", of=1)
    before = made.books.registry.before_production()
    assert before is not None
    assert made.books.registry.rollback(reason="x", of=2).number == before.number == 1
    assert made.books.registry.before_production() is None
