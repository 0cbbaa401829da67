"""Loops on Ray under traffic whose processes are killed by SIGKILL: at each write to the books, or whenever a test likes."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa
from drivers import Driver, end, kill
from small_factories import small_config, unknown_traffic

from aifactory import Config, Factory
from aifactory.improve.evaluation import is_settled
from aifactory.observe.progress import progress
from aifactory.records.books import Books
from aifactory.records.tables import artifacts, completions, feedback
from aifactory.traffic.users import ask_and_correct, questions

HOOK = Path(__file__).parent / "crash_hook"
PROCESSES = {
    "evaluator": "ray::Evaluator",
    "cycle": "ray::turn_begun",
    "trainer": "TrainWorker",
    "replica": "ray::ServeReplica",
}
"""What Ray calls the processes of a loop; the driver is no child of itself."""
_ATTEMPTS = 1000
"""Of a cycle: none is given up, however often it is killed."""


class CrashPoints:
    """What the hook was told, and what it has met."""

    def __init__(self, folder: Path, plan: Mapping[str, int | list[str]] | None = None) -> None:
        """`plan` says by the name of a point at how many of its writes the process is killed, before and after each, or on which
        sides; None: nobody is.
        """
        folder.mkdir(parents=True)
        self.folder = folder
        self.plan: dict[str, int | list[str]] = dict(plan or {})
        (folder / "plan.json").write_text(json.dumps(self.plan))
        paths = [str(HOOK), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {"AIFACTORY_CRASH_POINTS": str(folder), "PYTHONPATH": os.pathsep.join(paths)}

    def written(self) -> Counter[str]:
        """How often each point was written."""
        return Counter(line["point"] for line in self._lines("written.jsonl"))

    def killed(self) -> Counter[tuple[str, str]]:
        """How often at each point and side somebody was killed."""
        return Counter((line["point"], line["side"]) for line in self._lines("kills.jsonl"))

    def wanted(self) -> Counter[tuple[str, str]]:
        """How often at each point and side somebody is killed by the plan."""
        wanted: Counter[tuple[str, str]] = Counter()
        for point, sides in self.plan.items():
            wanted.update((point, side) for side in (["before", "after"] * sides if isinstance(sides, int) else sides))
        return wanted

    def _lines(self, name: str) -> list[dict[str, Any]]:
        file = self.folder / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def loop_values(folder: Path, *, port: int) -> dict[str, Any]:
    """The configuration of a small loop at a port."""
    sections: dict[str, Any] = {
        "improve": {"max_attempts": _ATTEMPTS, "prompts": None},
        "runtime": {"endpoint": {"port": port}},
    }
    return small_config(folder, traffic=unknown_traffic(folder), **sections)


def taught(folder: Path, points: CrashPoints) -> None:
    """A factory with a release, of whose answers users have corrected 150 over HTTP; nobody watches it yet.

    The first cycle is watched by `points`.
    """
    values = loop_values(folder, port=free_port())
    first = Driver(folder, values, verb="promote", environment=points.environment)
    first.finish()
    first.books.close()
    with Factory(Config.model_validate(values)) as factory, running(folder, values, verb="serve") as loop:
        config = factory.config
        assert config.traffic is not None
        asked = questions(factory._user_texts(), config.traffic, config.evaluate, factory=config.name)
        with progress("ask", total=len(asked)) as shown:
            seen = ask_and_correct(loop.url, config.name, asked, config.traffic, done=(), shown=shown)
    assert seen.failed == []
    assert len(seen.acknowledged) == len(asked) == 150


class Loop:
    """A factory that is served, and watched where the verb is `improve`, by a process of its own."""

    def __init__(self, driver: Driver, port: int) -> None:
        self.driver = driver
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.books = driver.books
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = self.driver.start()

    def wait_for(self, condition: Callable[[], bool], *, timeout_s: float = 900) -> None:
        """Until it holds; the driver is started again whenever it has killed itself."""
        deadline = time.monotonic() + timeout_s
        children: list[psutil.Process] = []
        while not condition():
            assert self.process is not None
            if self.process.poll() is not None:
                assert self.process.returncode == -signal.SIGKILL, self.said()
                end(children)
                self.start()
            with suppress(psutil.NoSuchProcess):
                children = psutil.Process(self.process.pid).children(recursive=True) or children
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)

    def kill(self, of: str, choice: random.Random) -> bool:
        """SIGKILL one of these processes, or the driver, which is started again; False where there is none."""
        assert self.process is not None
        if of == "driver":
            kill(self.process)
            self.start()
            return True
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if PROCESSES[of] in " ".join(process.cmdline()):
                    found.append(process)
        if not found:
            return False
        with suppress(psutil.NoSuchProcess):
            choice.choice(found).kill()
            return True
        return False

    def is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def said(self) -> str:
        """The end of what the driver has said."""
        return self.driver.log.read_text(encoding="utf-8")[-4000:]

    def stop(self) -> None:
        """End it as a user does; what it had started ends with it."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            kill(self.process)
        end(children)


@contextmanager
def running(
    folder: Path, values: dict[str, Any], *, verb: str = "improve", environment: Mapping[str, str] | None = None
) -> Iterator[Loop]:
    """The loop over the books of a folder, from when it answers."""
    driver = Driver(folder, values, verb=verb, environment=environment)
    loop = Loop(driver, values["runtime"]["endpoint"]["port"])
    loop.start()
    try:
        loop.wait_for(loop.is_ready, timeout_s=300)
        yield loop
    finally:
        if loop.process is not None and loop.process.poll() is None:
            loop.stop()
        loop.books.close()


def copy_of(template: Path, folder: Path) -> dict[str, Any]:
    """The configuration of a copy of a loop that nobody runs."""
    shutil.copytree(template, folder)
    return loop_values(folder, port=free_port())


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# ── traffic ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Seen:
    """What users were told."""

    answers: dict[str, str] = field(default_factory=dict)
    """By the id of an answer which release gave it."""
    acknowledged: dict[str, str] = field(default_factory=dict)
    """By idempotency key the answer that it is about."""
    counted: Counter[str] = field(default_factory=Counter)
    """By idempotency key how often it was said to be the first time."""
    again: int = 0
    """How often something was sent once more."""
    refused: list[str] = field(default_factory=list)
    """What the endpoint said was wrong with a request: nothing is."""


@contextmanager
def traffic(url: str, model: str, *, users: int = 2, pause_s: float = 0.4) -> Iterator[Seen]:
    """Users who ask and score each answer, over and over, and send again what was not answered or acknowledged."""
    seen, ended, lock = Seen(), threading.Event(), threading.Lock()
    host, _, port = url.removeprefix("http://").partition(":")

    def post(path: str, body: dict[str, Any], headers: dict[str, str]) -> dict[str, Any] | None:
        """The answer, whatever is killed meanwhile; None where the users went home before it came."""
        while not ended.is_set():
            connection = http.client.HTTPConnection(host, int(port), timeout=20)
            with suppress(OSError, http.client.HTTPException):
                connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **headers})
                answer = connection.getresponse()
                told = answer.read()
                if answer.status == 200:
                    return dict(json.loads(told))
                # 404 also where the proxy is up and no application is yet.
                if answer.status < 500 and answer.status not in (404, 429):
                    seen.refused.append(f"{path}: {answer.status} {told.decode(errors='replace')[:300]}")
                    return None
            connection.close()
            with lock:
                seen.again += 1
            ended.wait(0.2)
        return None

    def use(user: int) -> None:
        chance, number = random.Random(user), 0
        while not ended.is_set():
            number += 1
            body = {"model": model, "prompt": f"ka {user} {number}", "max_tokens": 6, "user": f"scorer-{user}"}
            answer = post("/v1/completions", body, {})
            if answer is None:
                continue
            key, name = f"score-{user}-{number}", str(answer["id"])
            with lock:
                seen.answers[name] = str(answer["model"])
            for _ in range(2 if chance.random() < 0.2 else 1):
                told = post("/v1/feedback", {"completion": name, "score": 0.5}, {"Idempotency-Key": key})
                if told is not None:
                    with lock:
                        seen.acknowledged[key] = name
                        seen.counted[key] += bool(told["counted"])
            ended.wait(pause_s)

    threads = [threading.Thread(target=use, args=(user,), daemon=True) for user in range(users)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        ended.set()
        for thread in threads:
            thread.join()


# ── ends ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def is_closed(books: Books, seen: Seen) -> bool:
    """Whether the retrain has ended, users hear its release, all was scored, and the evaluation has said that it waits."""
    cycles = [cycle for cycle in books.journal.cycles() if cycle.bound.kind == "drift"]
    production = books.registry.production()
    if not cycles or production is None or any(cycle.state == "running" for cycle in cycles):
        return False
    *_, decided = books.journal.events(event="decided")
    waits = (decided.subject, decided.detail["decision"]) == (production.name, "wait")
    return waits and production.name in list(seen.answers.values())[-4:] and is_settled(books)


@dataclass(frozen=True, slots=True)
class End:
    """What a loop came to: the same, whatever was killed on the way."""

    cycles: list[tuple[Any, ...]]
    releases: list[tuple[Any, ...]]
    digests: dict[str, str]
    """Of every artifact, by its id: models and scorecards are the same to the bit."""
    events: Counter[tuple[str, str]]
    """How often each thing happened; what tells of attempts and of replicas is left out."""
    decided: list[tuple[Any, ...]]
    corrections: list[tuple[Any, ...]]
    scores: list[Any]


_OF_ATTEMPTS = ("attempt_failed", "tick_failed", "swapped", "load_failed", "unscored")
# What a replica writes every so often, and so the more the longer it all took.
_OF_TIME = ("metered",)


def end_of(books: Books) -> End:
    """What the books say in the end."""
    events = books.journal.events()
    decided = [event for event in events if event.event == "decided"]
    with books.database.read() as connection:
        entries = connection.execute(sa.select(artifacts.c.id, artifacts.c.digest))
        digests = {str(row.id): str(row.digest) for row in entries}
    return End(
        cycles=[(c.number, c.trigger, c.state, c.bound, c.decision) for c in books.journal.cycles()],
        releases=[(r.number, r.trigger, r.model, r.scorecard) for r in books.registry.releases()],
        digests=digests,
        events=Counter(
            (event.event, str(event.subject))
            for event in events
            if event.event not in (*_OF_ATTEMPTS, *_OF_TIME, "decided")
        ),
        decided=[(e.subject, e.detail["decision"], e.detail.get("awaited")) for e in decided],
        corrections=[(c.feedback, c.completion, c.correction) for c in books.feedback.corrections()],
        scores=books.feedback.scores(metric="bits_per_byte", release=1),
    )


def assert_nothing_lost_or_doubled(books: Books, seen: Seen) -> None:
    """What users were told is in the books, once."""
    assert seen.refused == []
    with books.database.read() as connection:
        kept = {row.id for row in connection.execute(sa.select(completions.c.id))}
        said = [tuple(row) for row in connection.execute(sa.select(feedback.c.idempotency_key, feedback.c.completion))]
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
    assert set(seen.answers) <= kept
    scored = {key: completion for key, completion in said if key.startswith("score-")}
    assert len(said) == len(dict(said)), "an idempotency key was counted twice"
    assert seen.acknowledged.items() <= scored.items()
    # One who is sent home amid a request hears nothing of it; it may have been kept all the same.
    assert len(scored) <= len(seen.acknowledged) + 2
    assert max(seen.counted.values()) == 1
    assert books.journal.audited().faults == []
