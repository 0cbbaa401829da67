"""Laws of `aifactory keys`: what a command prints once is good, what it lists holds no secret, and wrong words change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aifactory import Config, Factory
from aifactory.cli import main
from aifactory.records.keys import read_token
from aifactory.records.limits import Limits, Subject

CONFIG = """\
name: alpha
ingest: {sources: [{name: docs, kind: text, path: /data/docs}]}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "alpha.yaml"
    file.write_text(CONFIG + f"runtime: {{storage: {tmp_path / 'store'}}}\n")
    return file


@pytest.fixture
def run(config, capsys):
    """Run `aifactory keys …` with --json; what it printed, read."""

    def command(*words: str, status: int = 0):
        assert main(["keys", *words, "--config", str(config), "--json"]) == status
        said = capsys.readouterr()
        return json.loads(said.out) if not status else said.err

    return command


@pytest.fixture
def books(config):
    with Factory(Config.from_yaml(config)) as factory:
        yield factory.books


def is_good(books, token: str) -> bool:
    key_id, secret = read_token(token)
    known = books.keys.known(key_id)
    return known.is_proved_by(secret, books.journal.clock()) and known.key.state(books.journal.clock()) == "active"


def test_a_key_is_made_turned_and_ended_by_commands(run, books):
    made = run("create", "web app", "--team", "search", "--scope", "operate", "--scope", "infer", "--expires", "90d")
    assert (made["name"], made["team"], made["scopes"]) == ("web app", "search", ["infer", "operate"])
    assert made["expires_at"] - made["created_at"] == 90 * 86_400
    assert is_good(books, made["token"])

    turned = run("rotate", "web app", "--overlap", "1h")
    assert turned["id"] == made["id"]
    assert is_good(books, made["token"])
    assert is_good(books, turned["token"])
    again = run("rotate", made["id"])
    assert [is_good(books, each["token"]) for each in (made, turned, again)] == [False, False, True]

    assert run("revoke", "web app", "--reason", "over")["state"] == "revoked"
    assert not is_good(books, again["token"])
    assert [line.action for line in books.journal.audited().lines] == [
        "key_created",
        "key_rotated",
        "key_rotated",
        "key_revoked",
    ]


def test_what_is_listed_holds_no_secret_and_says_what_holds(run, books, config, capsys):
    made = run("create", "app", "--requests-per-minute", "60", "--budget-tokens", "1e6", "--budget-window", "day")
    run("create", "free", "--team", "red")
    run("limit", "red", "--team", "--concurrent", "4")
    run("limit", "anonymous", "--tokens-per-minute", "1000")
    books.allowances.add_joules({made["id"]: 2.5})

    listed = run("list")

    first, second = listed["keys"]
    assert (first["id"], first["state"]) == (made["id"], "active")
    assert first["limits"] == {"requests_per_minute": 60, "budget_tokens": 1_000_000, "budget_window": "day"}
    assert first["used_this_month"]["joules"] == 2.5
    assert second["limits"] == {}
    assert {name: each["limits"] for name, each in listed["others"].items()} == {
        "key anonymous": {"tokens_per_minute": 1000},
        "team red": {"concurrent": 4},
    }
    assert main(["keys", "list", str(config)]) == 0
    text = capsys.readouterr().out
    assert made["id"] in text
    assert "team red" in text
    secret = read_token(made["token"])[1]
    assert secret not in text
    assert secret not in json.dumps(listed)


def test_limits_are_said_anew_and_taken_away(run, books):
    made = run("create", "app", "--concurrent", "2")
    mine = Subject("key", made["id"])
    assert books.keys.limits_of(mine) == {mine: Limits(concurrent=2)}

    run("limit", "app", "--requests-per-minute", "5")
    assert books.keys.limits_of(mine) == {mine: Limits(requests_per_minute=5)}
    assert run("limit", "app")["limits"] == "none"
    assert books.keys.limits_of(mine) == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["create", "key-1"], "expected a name"),
        (["rotate", "nobody"], "expected the id or the name of a key, found 'nobody'"),
        (["revoke", "nobody"], "`aifactory keys list` shows all"),
        (["create", "app", "--budget-money", "5"], "expected a price of tokens"),
    ],
)
def test_what_can_not_be_done_is_said_and_changes_nothing(run, books, words, said):
    assert said in run(*words, status=2)
    assert books.keys.all() == []
    assert books.journal.audited().lines == []


@pytest.mark.parametrize(
    "words",
    [
        ["create", "app", "--expires", "soon"],
        ["create", "app", "--concurrent", "0"],
        ["create", "app", "--concurrent", "1.5"],
        ["create", "app", "--scope", "admin"],
        ["rotate", "app", "--overlap=-1h"],
        ["destroy", "app"],
    ],
)
def test_wrong_words_are_refused_before_anything_is_opened(config, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(["keys", *words, str(config)])
    assert end.value.code == 2
    assert not (config.parent / "store").exists()
