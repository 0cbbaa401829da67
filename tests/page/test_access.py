"""Laws of access: strangers are kept out, and nothing is done but by a form of this page that its visitor was given."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from made_books import MadeBooks
from starlette.testclient import TestClient

from aifactory.errors import ConfigError
from aifactory.page.access import TOKEN_KEY, Access
from aifactory.page.command import access_of

TOKEN = "a-token-that-is-long-enough"
KEY = "aif_key_of_somebody"
Client = Callable[..., TestClient]
ROLL_BACK = {"do": "rollback", "release": "1", "reason": "it was better"}


def proof_in(page: TestClient, path: str = "/releases/act?do=rollback&release=1") -> dict[str, str]:
    """What the form on a page carries hidden."""
    found = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', page.get(path).text))
    assert found["proof"]
    return found


def closed(**more: object) -> Access:
    return Access(host="0.0.0.0", token=TOKEN, **more)  # type: ignore[arg-type]


# ── where it is served ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "factory.example"])
def test_an_address_that_others_reach_is_refused_without_keys_and_without_a_token(host: str) -> None:
    with pytest.raises(ConfigError, match="expected keys or a token"):
        Access(host=host)
    assert not Access(host=host, token=TOKEN).is_open
    assert not Access(host=host, has_keys=lambda: True).is_open


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.2"])
def test_loopback_is_open_until_there_is_a_key_or_a_token(host: str) -> None:
    keys: list[str] = []
    access = Access(host=host, has_keys=lambda: bool(keys))

    assert access.is_open
    keys.append("one")
    assert not access.is_open
    assert not Access(host=host, token=TOKEN).is_open


def test_a_token_that_can_be_guessed_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 16 characters"):
        Access(host="127.0.0.1", token="short")


def test_an_open_page_answers_under_names_of_this_machine_alone(page: TestClient) -> None:
    assert page.get("/", headers={"Host": "localhost:8270"}).status_code == 200
    assert page.get("/", headers={"Host": "[::1]:8270"}).status_code == 200
    for name in ("evil.example", "127.0.0.1.evil.example", ""):
        assert page.get("/", headers={"Host": name}).status_code == 421, name
        assert page.get("/data/loop", headers={"Host": name}).status_code == 421, name


# ── who is let in ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stranger_sees_nothing(made: MadeBooks, client: Client) -> None:
    page = client(made, closed())

    for path in ("/", "/releases", "/cycles/2", "/corpora/abc", "/releases/act?do=rollback&release=1"):
        answer = page.get(path)
        assert (answer.status_code, answer.headers["location"]) == (303, "/enter")
    assert page.get("/data/loop").status_code == 401
    assert page.get("/data/loop", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert page.post("/releases/act", data=ROLL_BACK).status_code == 401
    assert page.get("/data/loop", headers={"Authorization": f"Bearer {TOKEN}"}).json()["factory"] == "made"


def test_whoever_gives_the_token_once_has_a_session_until_it_is_left(made: MadeBooks, client: Client) -> None:
    page = client(made, closed())
    wrong = page.post("/enter", data={"key": "wrong", "proof": proof_in(page, "/enter")["proof"]})
    assert wrong.status_code == 401
    assert "set-cookie" not in wrong.headers

    entered = page.post("/enter", data={"key": TOKEN, "proof": proof_in(page, "/enter")["proof"]})
    assert entered.status_code == 303
    assert {"HttpOnly", "SameSite=lax", "Path=/"} <= set(entered.headers["set-cookie"].split("; "))
    assert TOKEN not in entered.headers["set-cookie"]
    assert page.get("/").status_code == 200

    assert page.post("/leave", data={"proof": proof_in(page)["proof"]}).status_code == 303
    assert page.get("/").status_code == 303


def test_a_session_is_worth_nothing_once_its_key_is_revoked_or_its_time_is_over(
    made: MadeBooks, client: Client
) -> None:
    good, now = {KEY: "key-1"}, [0.0]
    access = Access(host="0.0.0.0", has_keys=lambda: True, check_key=good.get, clock=lambda: now[0])
    page = client(made, access)
    page.post("/enter", data={"key": KEY, "proof": proof_in(page, "/enter")["proof"]})
    assert page.get("/").status_code == 200

    good.clear()
    assert page.get("/").status_code == 303
    good[KEY] = "key-1"
    assert page.get("/").status_code == 200
    now[0] += 13 * 3600
    assert page.get("/").status_code == 303


# ── what is done ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_form_of_another_site_does_nothing(made: MadeBooks, page: TestClient) -> None:
    fields = {**proof_in(page), **ROLL_BACK}
    foreign = [
        ({**fields, "proof": "0" * 64}, {}),
        ({name: value for name, value in fields.items() if name != "proof"}, {}),
        (fields, {"Origin": "http://evil.example"}),
        (fields, {"Origin": "null"}),
        (fields, {"Sec-Fetch-Site": "cross-site"}),
        (fields, {"Sec-Fetch-Site": "same-site"}),
    ]
    for data, headers in foreign:
        assert page.post("/releases/act", data=data, headers=headers).status_code == 403, headers
    as_json = page.post("/releases/act", json=fields)
    assert as_json.status_code == 415
    assert page.post("/releases/act", data={**fields, "reason": "x" * 100_000}).status_code == 413

    production = made.books.registry.production()
    assert production is not None
    assert production.number == 2
    assert [line.action for line in made.books.journal.audited().lines] == ["promote", "promote"]


def test_the_proof_of_one_visitor_is_none_for_another(made: MadeBooks, client: Client) -> None:
    access = closed()
    first, second = client(made, access), client(made, access)
    for each in (first, second):
        each.post("/enter", data={"key": TOKEN, "proof": proof_in(each, "/enter")["proof"]})

    assert second.post("/releases/act", data={**proof_in(first), **ROLL_BACK}).status_code == 403
    assert second.post("/releases/act", data={**proof_in(second), **ROLL_BACK}).status_code == 303


def test_the_audit_names_whoever_did_it(made: MadeBooks, client: Client) -> None:
    good = {KEY: "key-1"}
    page = client(made, Access(host="0.0.0.0", token=TOKEN, has_keys=lambda: True, check_key=good.get))

    for key, wanted, release in ((KEY, "key-1", "1"), (TOKEN, TOKEN_KEY, "2")):
        page.post("/enter", data={"key": key, "proof": proof_in(page, "/enter")["proof"]})
        path = f"/releases/act?do=rollback&release={release}"
        assert page.post("/releases/act", data={**proof_in(page, path), "reason": "why"}).status_code == 303
        last = made.books.journal.audited().lines[-1]
        assert (last.action, last.subject, last.key_id) == ("rollback", f"made-r{release}", wanted)


# ── the factory's keys ────────────────────────────────────────────────────────────────────────────────────────────────


def test_from_the_first_key_on_the_page_wants_one_of_the_scope_operate(made: MadeBooks, client: Client) -> None:
    page = client(made, access_of(made.books))
    assert page.get("/").status_code == 200
    infer = made.books.keys.create("asks").token
    operator = made.books.keys.create("operator", scopes=("operate",))

    assert page.get("/").headers["location"] == "/enter"

    def seen_with(token: str) -> int:
        return page.get("/data/loop", headers={"Authorization": f"Bearer {token}"}).status_code

    assert (seen_with(infer), seen_with(operator.token), seen_with(operator.token[:-1] + "x")) == (401, 200, 401)
    unknown = operator.token.replace(operator.key.id.removeprefix("key-"), "0" * 16)
    assert seen_with(unknown) == 401

    page.post("/enter", data={"key": operator.token, "proof": proof_in(page, "/enter")["proof"]})
    assert page.post("/releases/act", data={**proof_in(page), **ROLL_BACK}).status_code == 303
    assert made.books.journal.audited().lines[-1].key_id == operator.key.id

    made.books.keys.revoke(operator.key.id)
    assert page.get("/").status_code == 303
    assert seen_with(operator.token) == 401


def test_where_keys_are_required_no_page_is_open(made: MadeBooks, client: Client) -> None:
    runtime = made.books.config.runtime
    gateway = runtime.gateway.model_copy(update={"keys": "required"})
    made.books.config = made.books.config.model_copy(
        update={"runtime": runtime.model_copy(update={"gateway": gateway})}
    )
    assert client(made, access_of(made.books)).get("/").status_code == 303
