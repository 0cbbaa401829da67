"""Laws of the supervisor's programs and of the attendant: what they say is heard, they end, and only what is lost is started again."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from aifactory.cluster.processes import own
from aifactory.supervisor import attendant
from aifactory.supervisor.attendant import _PATIENCE_S, Attention
from aifactory.supervisor.program import Program, end_recorded

_ECHO = "import json, sys\nfor line in sys.stdin: print(json.dumps({'said': line.strip()}), flush=True)\nsys.exit(7)"


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_program_hears_and_is_heard_and_tells_how_it_ended() -> None:
    heard: list[Mapping[str, Any]] = []
    program = Program("echo", [sys.executable, "-c", _ECHO], first_line="first", hear=heard.append)
    assert (program.process, program.status) == (None, None)

    program.start(os.environ)
    program.say("second")
    until(lambda: len(heard) == 2)

    assert heard == [{"said": "first"}, {"said": "second"}]
    process = program.process
    assert process is not None
    assert os.getpgid(process.pid) != os.getpgid(0), "Ctrl-C in a terminal is not for it"
    program.end(patience_s=5.0)
    assert program.process is None
    assert program.status == -15
    program.say("nobody hears this")


def test_lines_that_are_no_json_are_passed_over() -> None:
    heard: list[Mapping[str, Any]] = []
    code = "print('warning: deprecated'); print('{\"url\": 1}')"
    program = Program("noisy", [sys.executable, "-c", code], hear=heard.append)

    program.start(os.environ)
    assert program.wait(30) == 0
    until(lambda: bool(heard))

    assert heard == [{"url": 1}]


def test_programs_of_a_supervisor_that_is_gone_are_ended_and_strangers_with_their_pids_are_not(tmp_path: Path) -> None:
    ours, strange = (Program(name, [sys.executable, "-c", _ECHO]) for name in ("ours", "strange"))
    for program in (ours, strange):
        program.start(os.environ)
    assert ours.process is not None
    assert strange.process is not None
    noted = {"ours": [ours.process.pid, ours.process.identity], "strange": [strange.process.pid, "another"]}
    file = tmp_path / "up.json"
    file.write_text(json.dumps({"programs": noted}))

    assert end_recorded(file, patience_s=5.0) == ["ours"]

    assert own(strange.process.pid) is not None
    assert end_recorded(tmp_path / "none.json", patience_s=0.0) == []
    strange.end(patience_s=0.0)


class FakeFactory:
    """Notes what it was asked for."""

    class config:  # noqa: N801
        name = "alpha"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def serve(self) -> None:
        self.asked.append("serve")

    def improve(self) -> None:
        self.asked.append("improve")


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """A look of the attendant: what it asks of the factory, by what Serve says."""
    factory = FakeFactory()
    attention = Attention(factory)  # type: ignore[arg-type]

    def once(now: float, status: str | None, *, evaluator: bool = True, begins: bool = False) -> list[str]:
        monkeypatch.setattr("aifactory.serve.app.status", lambda _: status)
        if begins:
            return ["wait"] if attention.is_being_healed(now) else []
        monkeypatch.setattr("aifactory.improve.evaluator.is_there", lambda _: evaluator)
        factory.asked.clear()
        attention.look(now)
        return list(factory.asked)

    return once


def test_what_is_well_is_left_alone_and_an_actor_that_is_gone_is_started(look: Callable[..., list[str]]) -> None:
    assert look(0, "RUNNING") == []
    assert look(1, "RUNNING", evaluator=False) == ["improve"]


def test_what_serve_heals_by_itself_is_waited_for_and_then_served_again(look: Callable[..., list[str]]) -> None:
    assert look(0, "RUNNING") == []
    assert look(10, "UNHEALTHY") == []
    assert look(10 + _PATIENCE_S - 1, "DEPLOYING") == []
    assert look(10 + _PATIENCE_S + 1, "DEPLOYING") == ["serve"]


def test_an_attendant_that_begins_waits_for_what_serve_has_and_not_for_what_it_has_given_up(
    look: Callable[..., list[str]],
) -> None:
    assert look(0, None, begins=True) == []
    assert look(1, "RUNNING", begins=True) == []
    assert look(2, "DEPLOYING", begins=True) == ["wait"]
    assert look(2 + _PATIENCE_S + 1, "UNHEALTHY", begins=True) == []
    assert look(300, "RUNNING", begins=True) == []
    assert look(301, "DEPLOY_FAILED", begins=True) == []
    assert look(302, "UNHEALTHY", begins=True) == ["wait"]


def test_what_serve_has_given_up_or_knows_nothing_of_is_served_again_ever_more_rarely(
    look: Callable[..., list[str]],
) -> None:
    assert look(0, None) == ["serve"]
    assert [now for now in range(1, 60) if look(now, "DEPLOY_FAILED")] == [1, 2, 3, 5, 9, 17, 33]


def test_who_is_left_alone_by_its_supervisor_goes_whatever_it_waits_for() -> None:
    code = (
        "from aifactory.supervisor.attendant import _asked_to_stop; import time\n"
        "_asked_to_stop(); print('{}', flush=True); time.sleep(600)"
    )
    heard: list[Mapping[str, Any]] = []
    program = Program("attendant", [sys.executable, "-c", code], hear=heard.append)
    program.start(os.environ)
    until(lambda: bool(heard))

    assert program._running is not None
    assert program._running.stdin is not None
    program._running.stdin.close()

    assert program.wait(30) == 0
    assert attendant.STOP == "stop"
