"""`aifactory up` with every one of its processes killed in turn under traffic, and `aifactory down` after whatever is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import sqlalchemy as sa
import yaml
from served_head import ServedHead

from aifactory.cluster.processes import own, writes_below
from aifactory.config import Config
from aifactory.records.books import Books
from aifactory.records.tables import feedback

_LONGEST_S = 400.0
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
    "HF_HUB_OFFLINE": "1",
    "GOMP_SPINCOUNT": "0",
}


class UpFactory:
    """A factory with a release in production, and its `aifactory up`."""

    def __init__(self, folder: Path) -> None:
        stage = ServedHead(folder, mode="resilient")  # for its releases alone: it starts nothing here
        stage.promote(stage.export(1))
        values = json.loads(stage.books.config.model_dump_json(exclude_defaults=True))
        stage.books.close()
        # Sockets of Ray below a folder of pytest's would have too long names.
        self.head_folder = Path(tempfile.mkdtemp(prefix="up-"))
        port = free_port()
        endpoint = {"port": port, "mode": "resilient", "replicas": 2, "poll_s": 0.5, "slots": 8, "drain_timeout_s": 10}
        values["runtime"] = {
            "storage": str(folder / "storage"),
            "endpoint": endpoint,
            "head": {"folder": str(self.head_folder), "cpus": 4},
            "page": {"port": 0},
        }
        self.config_file = folder / "config.yaml"
        self.config_file.write_text(yaml.safe_dump(values), encoding="utf-8")
        self.books = Books(Config.model_validate(values))
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "up.log"
        self.running: subprocess.Popen[bytes] | None = None

    def command(self, verb: str) -> list[str]:
        return [sys.executable, "-m", "aifactory", verb, "--config", str(self.config_file)]

    def up(self) -> None:
        with open(self.log, "ab") as log:
            self.running = subprocess.Popen(
                self.command("up"), stdout=log, stderr=log, env=ENVIRONMENT, start_new_session=True
            )
        self.until(lambda: b'"url"' in self.log.read_bytes() or b"url  " in self.log.read_bytes(), "it comes up")

    def down(self) -> str:
        done = subprocess.run(
            self.command("down"), capture_output=True, text=True, env=ENVIRONMENT, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def until(self, happened: Callable[[], bool], what: str) -> float:
        began = time.monotonic()
        while not happened():
            assert time.monotonic() - began < _LONGEST_S, (
                f"{what}: not in time; missing {self.missing()}\n{self.log.read_text()[-6000:]}"
            )
            time.sleep(0.3)
        return time.monotonic() - began

    # ── its processes ─────────────────────────────────────────────────────────────────────────────────────────────────

    def pids(self, part: str) -> list[int]:
        return self.parts().get(part, [])

    def parts(self) -> dict[str, list[int]]:
        """By part its processes, from one look."""
        found: dict[str, list[int]] = {}
        for pid, command in self.commands():
            part = next((part for part, name in NAMES.items() if name in command), None)
            if part is not None:
                found.setdefault(part, []).append(pid)
        return {part: sorted(pids) for part, pids in found.items()}

    def commands(self) -> list[tuple[int, str]]:
        """All that belongs to it, but for the supervisor: what it has started, what names its folder, and what these have started."""
        told, parents = {}, {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                told[process.pid] = " ".join(process.cmdline())
                parents[process.pid] = process.ppid()
        supervisor = None if self.running is None else self.running.pid
        mine = {pid for pid in told if str(self.head_folder) in told[pid] or parents[pid] == supervisor}
        # Ray's workers have other names when they work; those whose parent is gone are known by what they log.
        for pid in told:
            if pid not in mine and told[pid].startswith(("ray::", sys.executable)):
                one = own(pid)
                if one is not None and writes_below(one, self.head_folder):
                    mine.add(pid)
        return [(pid, told[pid]) for pid in mine if pid not in (os.getpid(), supervisor)]

    def processes(self) -> list[psutil.Process]:
        found = []
        for pid, _ in self.commands():
            with suppress(psutil.Error):
                found.append(psutil.Process(pid))
        return found

    def missing(self) -> list[str]:
        found = self.parts()
        return [part for part, number in WANTED.items() if len(found.get(part, ())) < number]

    def is_well(self) -> bool:
        return not self.missing() and self.answers()

    def answers(self) -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/healthz", timeout=5).status_code == 200
        return False

    def close(self) -> None:
        if self.running is not None and self.running.poll() is None:
            self.running.kill()
            self.running.wait()
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        self.books.close()
        shutil.rmtree(self.head_folder, ignore_errors=True)


NAMES = {
    "replica": ":replica",
    "front": ":front",
    "proxy": "ray::ProxyActor",
    "controller": "ray::ServeController",
    "evaluator": "ray::Evaluator",
    "attendant": "aifactory.supervisor.attendant",
    "gcs": "/gcs_server",
    "raylet": "/raylet/raylet",
    "log_monitor": "/log_monitor.py",
    "monitor": "/monitor.py",
    "client": "ray.util.client.server",
    "agent": "ray::DashboardAgent",
    "runtime_env_agent": "ray::RuntimeEnvAgent",
}
"""What the command line of each part holds; the first that fits."""
WANTED = {
    "replica": 2,
    "front": 2,
    "proxy": 1,
    "controller": 1,
    "evaluator": 1,
    "attendant": 1,
    "gcs": 1,
    "raylet": 1,
    "monitor": 1,
    "log_monitor": 1,
    "client": 1,
}
# The raylet takes all workers along; its agents take the raylet along.
KILLED = ["raylet", "supervisor", "gcs", "agent", *(part for part in WANTED if part not in ("raylet", "gcs"))]
KILLED += ["runtime_env_agent"]


class Traffic(threading.Thread):
    """A user who asks, and says how good the answer was; what is not acknowledged is said again, by the same key."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._ended = threading.Event()
        self.acknowledged: set[str] = set()
        self.answered = 0
        self.failed = 0
        """Requests without an answer of 200, of both kinds."""

    def run(self) -> None:
        while not self._ended.is_set():
            body = {"model": "small", "prompt": "the quick ", "max_tokens": 4}
            with suppress(httpx.HTTPError):
                answer = httpx.post(f"{self._url}/v1/completions", json=body | {"model": MODEL}, timeout=30)
                if answer.status_code == 200:
                    self.answered += 1
                    self._say(answer.json()["id"])
                    time.sleep(0.05)
                    continue
            self.failed += 1
            time.sleep(0.2)

    def _say(self, completion: str) -> None:
        key = uuid.uuid4().hex
        while not self._ended.is_set():
            with suppress(httpx.HTTPError):
                body = {"completion": completion, "score": 1.0, "idempotency_key": key}
                said = httpx.post(f"{self._url}/v1/feedback", json=body, timeout=30)
                if said.status_code == 200:
                    self.acknowledged.add(key)
                    return
            self.failed += 1
            time.sleep(0.2)

    def stop(self) -> None:
        self._ended.set()
        self.join(90)


MODEL = "faults"


@pytest.fixture
def factory(tmp_path: Path) -> Iterator[UpFactory]:
    made = UpFactory(tmp_path / "f")
    yield made
    made.close()


def kept(books: Books) -> list[str]:
    with books.database.read() as connection:
        return list(connection.scalars(sa.select(feedback.c.idempotency_key)))


@pytest.mark.faults
def test_every_process_killed_in_turn_under_traffic_comes_back_and_nothing_acknowledged_is_lost(
    factory: UpFactory,
) -> None:
    factory.up()
    factory.until(factory.is_well, "all is well")
    traffic = Traffic(factory.url)
    traffic.start()
    rows = []
    for part in KILLED:
        factory.until(lambda: traffic.answered > 0, "somebody is answered")
        failed, answered = traffic.failed, traffic.answered
        if part == "supervisor":
            assert factory.running is not None
            factory.running.kill()
            factory.running.wait()
            before = {name: factory.pids(name) for name in ("gcs", "raylet", "replica", "evaluator")}
            factory.log.unlink()
            factory.up()
            assert {name: factory.pids(name) for name in before} == before, "what ran goes on"
            killed = -1
        else:
            killed = factory.pids(part)[0]
            os.kill(killed, signal.SIGKILL)
        began = time.monotonic()
        factory.until(lambda k=killed: not psutil.pid_exists(k) if k > 0 else True, "it is gone")  # type: ignore[misc]
        again = factory.until(lambda a=traffic.answered: traffic.answered > a, f"{part}: answered again")  # type: ignore[misc]
        factory.until(factory.is_well, f"{part}: all is well again")
        whole = time.monotonic() - began
        rows.append((part, again, whole, traffic.failed - failed, traffic.answered - answered))
        acknowledged = set(traffic.acknowledged)
        assert acknowledged <= set(kept(factory.books)), f"{part}: something that was acknowledged is lost"
        print("so far:", rows[-1], f"{len(acknowledged)} acknowledged, all kept", flush=True)
    time.sleep(3)
    traffic.stop()
    out = factory.down()

    print("| killed | next answer, s | all well, s | failed | answered |\n|---|---|---|---|---|")
    for part, again, whole, failed, answered in rows:
        print(f"| {part} | {again:.1f} | {whole:.1f} | {failed} | {answered} |")
    assert "aifactory up" in out
    found = kept(factory.books)
    assert len(found) == len(set(found)), "nothing is counted twice"
    assert traffic.acknowledged, "there was feedback"
    assert traffic.acknowledged <= set(found), "nothing that was acknowledged is lost"
    assert factory.processes() == []
    told = [(event.event, event.subject) for event in factory.books.journal.events()]
    for part in ("gcs", "raylet", "controller", "replica", "evaluator", "attendant"):
        assert ("part_lost", part) in told, part
        assert ("part_back", part) in told, part
    lines = [line for line in factory.books.journal.audited().lines if line.action in ("up", "down")]
    told_by = [(line.action, line.detail.get("by")) for line in lines]
    assert told_by == [("up", None), ("up", None), ("down", "up"), ("down", "down")], "who did it, and who asked for it"


@pytest.mark.slow
def test_up_comes_down_after_the_last_answers_and_down_ends_what_a_killed_up_has_left(factory: UpFactory) -> None:
    stranger = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)", str(factory.head_folder / "ray")]
    )
    try:
        factory.up()
        factory.until(factory.is_well, "all is well")
        second = subprocess.run(factory.command("up"), capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
        assert second.returncode == 1
        assert "found another" in second.stderr
        answers: list[int] = []
        body = {"model": MODEL, "prompt": "the quick ", "max_tokens": 200}

        def ask() -> None:
            answers.append(httpx.post(f"{factory.url}/v1/completions", json=body, timeout=60).status_code)

        asking = [threading.Thread(target=ask) for _ in range(4)]
        for thread in asking:
            thread.start()
        time.sleep(0.3)
        assert factory.running is not None
        factory.running.send_signal(signal.SIGTERM)
        assert factory.running.wait(120) == 0
        for thread in asking:
            thread.join(60)
        assert answers == [200] * 4
        assert [p.pid for p in factory.processes() if p.pid != stranger.pid] == []

        # Killed, it leaves everything behind, which goes on answering; then somebody brings it down.
        factory.log.unlink()
        factory.up()
        factory.running.kill()
        factory.running.wait()
        assert factory.answers()
        said = factory.down()
        assert "the head at" in said
        assert "the endpoint" in said
        assert [p.pid for p in factory.processes() if p.pid != stranger.pid] == []
        assert "Nothing was left behind" in factory.down()
        assert stranger.poll() is None, "nobody else's process is touched"
    finally:
        stranger.kill()
        stranger.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def up_by(values: dict[str, Any], file: Path) -> subprocess.CompletedProcess[str]:
    """The command with this configuration, to its end."""
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    command = [sys.executable, "-m", "aifactory", "up", str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)


def test_up_without_a_release_says_what_to_do_and_starts_nothing(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "name": "none",
        "ingest": {"sources": [{"name": "docs", "kind": "text", "path": "/data/docs"}]},
        "runtime": {
            "storage": str(tmp_path),
            "head": {"folder": str(Path(tempfile.gettempdir()) / f"up-{uuid.uuid4().hex[:8]}")},
        },
    }

    done = up_by(values, tmp_path / "config.yaml")

    assert done.returncode == 1
    assert "run a cycle first" in done.stderr
    assert not Path(values["runtime"]["head"]["folder"]).exists()


def test_a_folder_that_is_too_long_for_rays_sockets_is_refused_before_anything_starts(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 60)
    values = {
        "name": "none",
        "ingest": {"sources": [{"name": "docs", "kind": "text", "path": "/data/docs"}]},
        "runtime": {"storage": str(tmp_path), "head": {"folder": str(long)}},
    }

    done = up_by(values, tmp_path / "config.yaml")

    assert done.returncode == 2
    assert "runtime.head.folder" in done.stderr
