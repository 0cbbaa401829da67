"""The audit by the command: what it shows, what it finds, its exit status."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml
from small_factories import small_config

from aifactory import Config, Factory
from aifactory.cli import main
from aifactory.errors import ConfigError
from aifactory.records.journal import Bound

Command = Callable[..., tuple[int, Any]]


@pytest.fixture
def factory(tmp_path: Path) -> Factory:
    """A factory with two releases and a rollback in its books; nothing was trained."""
    factory = Factory(Config.model_validate(small_config(tmp_path)))
    journal, registry = factory.books.journal, factory.books.registry
    at = iter(range(1_764_115_200, 1_764_115_200 + 100_000, 3_600))  # 2025-11-26, an hour each
    journal.clock = lambda: float(next(at))
    for number in range(2):
        bound = Bound(kind="run", sources_digest="x", champion=number or None)
        cycle = journal.claim(journal.open_cycle(f"run-{number}", recipe={}, bound=bound))
        registry.promote(
            cycle, model=f"model/{number}", scorecard="scorecard/0", decision={"reasons": ["it is better"]}
        )
    factory.rollback(reason="it swears")
    return factory


@pytest.fixture
def command(factory: Factory, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(small_config(tmp_path)), encoding="utf-8")

    def run(*arguments: str) -> tuple[int, Any]:
        status = main(["audit", str(config), *arguments])
        out = capsys.readouterr().out
        return status, json.loads(out) if "--json" in arguments else out

    return run


def test_it_says_who_did_what_and_that_the_chain_holds(factory: Factory, command: Command) -> None:
    status, told = command("--json")

    assert (status, told["holds"], told["num_lines"], told["faults"]) == (0, True, 3, [])
    assert [(line["action"], line["subject"]) for line in told["lines_found"]] == [
        ("promote", "small-r1"),
        ("promote", "small-r2"),
        ("rollback", "small-r1"),
    ]
    assert told["head"] == told["lines_found"][-1]["hash"] == factory.audit().head
    status, text = command()
    assert status == 0
    assert text.splitlines() == factory.audit().lines()
    assert "it swears" in text
    assert f"Head: {told['head']}" in text


def test_lines_are_chosen_by_subject_action_and_time(factory: Factory, command: Command) -> None:
    def numbers(*arguments: str) -> list[int]:
        status, told = command("--json", *arguments)
        assert (status, told["num_lines"]) == (0, 3)
        return [line["number"] for line in told["lines_found"]]

    second = factory.audit().lines_found[1]
    assert numbers("--subject", "small-r1") == [1, 3]
    assert numbers("--action", "rollback") == [3]
    assert numbers("--action", "promote", "--subject", "small-r2") == [2]
    assert numbers("--limit", "2") == [2, 3]
    assert numbers("--limit", "0") == []
    assert numbers("--until", "2025-11-26T00:00") == []
    assert numbers("--since", "2025-11-26T01:00+01:00") == [1, 2, 3]
    from datetime import UTC, datetime

    assert numbers("--since", datetime.fromtimestamp(second.at, UTC).isoformat()) == [2, 3]
    assert numbers("--until", datetime.fromtimestamp(second.at, UTC).isoformat()) == [1]
    assert "The newest 1 of 3:" in command("--limit", "1")[1]


def test_a_chain_that_does_not_hold_ends_with_status_1_and_names_the_line(factory: Factory, command: Command) -> None:
    head = factory.audit().head
    assert command("--expect", head)[0] == 0
    with factory.books.database.write() as connection:
        connection.execute(sa.text("UPDATE audit SET detail = '{}' WHERE number = 2"))

    status, told = command("--json")
    assert (status, told["holds"]) == (1, False)
    assert [(fault["kind"], fault["number"]) for fault in told["faults"]] == [("changed", 2)]
    status, text = command("--subject", "small-r1")
    assert status == 1
    assert "changed: line 2: " in text
    assert "not as they were written" in text


def test_a_kept_head_finds_an_end_that_was_cut_off(factory: Factory, command: Command) -> None:
    with factory.books.database.write(serialize=True) as connection:
        factory.books.journal.audit_within(connection, "restore", subject="corpus/0", detail={})
    head = factory.audit().head
    with factory.books.database.write() as connection:
        connection.execute(sa.text("DELETE FROM audit WHERE number = 4"))

    assert command()[0] == 0
    status, text = command("--expect", head)
    assert status == 1
    assert f"removed: line 4: no line has the hash {head}" in text


def test_what_is_no_time_no_hash_and_no_limit_is_an_error(factory: Factory, command: Command) -> None:
    for arguments in (("--since", "noon"), ("--expect", "abc"), ("--limit", "-1")):
        assert command(*arguments)[0] == 2
    with pytest.raises(ConfigError, match=r"expected a time such as 2026-11-26.* found 'noon'"):
        factory.audit(until="noon")
    with pytest.raises(ConfigError, match=r"64 hex digits.* found 'ABC'"):
        factory.audit(expect="ABC")
