"""The six commands as a user runs them, one after another, on a factory that has turned two cycles under traffic over HTTP."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from corpora import document
from crash_loops import free_port, running
from drivers import Driver
from leftovers import left_of, needles
from small_factories import small_config, unknown_traffic

from aifactory import Config, Factory

Command = Callable[..., tuple[int, Any]]


@pytest.fixture
def folder(tmp_path: Path, uninterrupted: Driver) -> Path:
    """A copy of the factory, which is changed here."""
    uninterrupted.books.close()
    copy = tmp_path / "copied"
    shutil.copytree(uninterrupted.config_file.parent, copy)
    return Driver(copy, small_config(copy, traffic=unknown_traffic(copy))).config_file.parent


@pytest.fixture
def command(folder: Path) -> Command:
    """Runs a verb in a process of its own: its status, and its answer read as JSON."""

    def run(verb: str, *arguments: str) -> tuple[int, Any]:
        line = [sys.executable, "-m", "aifactory", verb, *arguments, "--config", str(folder / "config.yaml"), "--json"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=600, env=os.environ)
        assert done.returncode in (0, 1), done.stderr[-4000:]
        assert done.stdout, done.stderr[-4000:]
        return done.returncode, json.loads(done.stdout)

    return run


@pytest.mark.slow
def test_a_loop_is_traced_explained_verified_compared_and_audited_and_then_one_user_is_forgotten(
    folder: Path, command: Command, tmp_path: Path
) -> None:
    with factory_of(folder) as factory:
        root = Path(factory.books.storage.root)
        (user, *_) = sorted({c.user for c in factory.books.feedback.corrections()})
        wanted = needles(factory, user)
        second = factory.books.registry.named("small-r2")
    answer = ask(folder, user="somebody else")

    # An answer, back to the release that gave it and the rows that made that.
    status, traced = command("trace", "--completion", answer)
    assert (status, traced["completion"], traced["release"]) == (0, answer, "small-r2")
    assert traced["rows"]
    assert len(traced["token_sets"]) == 2
    origin = traced["origin"]
    assert (origin["model"], origin["cycle"]) == (second.model, second.trigger)
    assert origin["recipe"]["train"]["learning_rate"] == 0.01
    assert Path(origin["run"]).is_dir()
    assert {row["corpus"] for row in traced["rows"]} <= set(origin["rows"])
    assert all(origin["rows"].values()) and len(origin["rows"]) == 2
    spans = [row["tokens"] for row in traced["rows"]]
    assert spans == sorted(spans, reverse=True)

    # The cycle that made it.
    page = tmp_path / "cycle.html"
    status, story = command("explain", "2", "--html", str(page))
    assert (status, story["state"], story["release"], story["champion"]) == (0, "promoted", "small-r2", "small-r1")
    assert {corpus["id"] for corpus in story["corpora"]} >= {row["corpus"] for row in traced["rows"]}
    assert sum(corpus["rows_in"] for corpus in story["corpora"] if corpus["batch"]) == 150
    assert story["reasons"] and story["why_begun"]
    assert story["joules"] > 0
    changes = [score["change"] for score in story["scores"] if score["change"]]
    assert changes and all(change["low"] <= change["estimate"] <= change["high"] for change in changes)
    assert "small-r2" in page.read_text(encoding="utf-8")

    # Made again, it is the same to the byte.
    status, verified = command("verify", "small-r2")
    assert (status, verified["verdict"], verified["reason"]) == (0, "equal", ""), platform.processor()
    assert all(check["recorded"] == check["found"] for check in verified["checks"])
    assert second.model in {check["id"] for check in verified["checks"] if check["how"] == "rebuilt"}

    # Beside the one before.
    status, compared = command("diff", "small-r1", "small-r2", "--limit", "2")
    assert status == 0
    assert [compared[side]["name"] for side in ("first", "second")] == ["small-r1", "small-r2"]
    assert compared["batches"]["only_second"] and not compared["batches"]["only_first"]
    assert compared["rows"]["feedback"]["only_second"] > 0
    assert len(compared["answers"]) == 2

    # Who did what.
    status, audited = command("audit", "--limit", "1000")
    assert (status, audited["holds"], audited["faults"]) == (0, True, [])
    assert [line["subject"] for line in audited["lines_found"] if line["action"] == "promote"] == [
        "small-r1",
        "small-r2",
    ]
    head = audited["head"]

    # One user is forgotten.
    before = left_of(root, wanted)
    assert {Path(where.split()[0]).relative_to(root).parts[0] for where, _ in before} >= {
        "corpus",
        "tokens",
        "state.db",
    }
    where = f'user = "{user}"'
    status, would = command("forget", "--where", where, "--dry-run")
    assert (status, would["releases"], would["starts_from"]) == (0, ["small-r2"], "small-r1")
    assert left_of(root, wanted) == before
    status, forgotten = command("forget", "--where", where)
    assert (status, forgotten["left"], forgotten["holds"]) == (0, [], True)
    assert forgotten["releases"] == ["small-r2"]
    assert forgotten["successor"] is not None
    assert left_of(root, [*wanted, user]) == []
    status, checked = command("forget", "--check", forgotten["erasure"])
    assert (status, checked["holds"], checked["faults"]) == (0, True, [])

    # What the other commands say after it.
    status, audited = command("audit", "--expect", head, "--limit", "1000")
    assert (status, audited["holds"], audited["faults"]) == (0, True, [])
    last = max(audited["lines_found"], key=lambda line: int(line["number"]))
    proof = json.loads(Path(forgotten["proof"]).read_text(encoding="utf-8"))
    assert (last["action"], last["subject"]) == ("forgotten", forgotten["erasure"])
    assert last["detail"]["digest"] == proof["digest"]
    status, verified = command("verify", "small-r2")
    assert (status, verified["verdict"]) == (1, "not rebuildable")
    assert verified["reason"].startswith(f"erased by {forgotten['erasure']}")
    status, story = command("explain", "small-r2")
    assert status == 0
    (erased,) = [corpus for corpus in story["corpora"] if corpus["erased_by"]]
    assert erased["erased_by"] == forgotten["erasure"]
    status, traced = command("trace", "--completion", answer)
    assert status == 0
    assert any(forgotten["erasure"] in each for each in traced["erased"])
    assert (traced["origin"]["model"], traced["origin"]["recipe"]) == (second.model, None)
    assert left_of(root, [*wanted, user]) == [], "nothing that was asked afterwards has brought it back"


def factory_of(folder: Path) -> Factory:
    return Factory(Config.from_yaml(folder / "config.yaml"))


def ask(folder: Path, *, user: str) -> str:
    """The id of an answer that the release in production gives over HTTP."""
    values = small_config(folder, traffic=unknown_traffic(folder), runtime={"endpoint": {"port": free_port()}})
    question = {"model": "small", "prompt": document(0, 0)[:200], "max_tokens": 60, "temperature": 0, "user": user}
    with running(folder, values, verb="serve") as loop:
        answer = httpx.post(f"{loop.url}/v1/completions", json=question, timeout=120).json()
    assert answer["model"] == "small-r2"
    return str(answer["id"])
