"""Laws of feedback over HTTP: what was acknowledged is on disk, whatever is killed, and whoever repeats himself counts once."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import gateway_process
import psutil
import pytest
import sqlalchemy as sa

from aifactory.config import Config
from aifactory.records.books import Books
from aifactory.records.feedback import Completion
from aifactory.records.tables import feedback

ANSWERS = 200
CONFIG = """\
name: alpha
ingest: {{sources: [{{name: docs, kind: text, path: /data/docs}}]}}
runtime: {{storage: {folder}}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "alpha.yaml"
    file.write_text(CONFIG.format(folder=tmp_path / "storage"))
    return file


@pytest.fixture
def books(config: Path):
    found = Books(Config.from_text(config.read_text(), origin="test"))
    answers = [
        Completion(
            id=f"cmpl-{number}",
            release=1,
            prompt="p",
            answer="a",
            request="{}",
            finish_reason="stop",
            prompt_tokens=1,
            answer_tokens=1,
        )
        for number in range(ANSWERS)
    ]
    found.feedback.log_completion(*answers)
    yield found
    found.close()


class Replica:
    """A gateway in a process of its own, which is started again on another port when it was killed."""

    def __init__(self, config: Path, *, before: tuple[str, ...] = ()) -> None:
        self._command = [*before, sys.executable, gateway_process.__file__, str(config)]
        self.kills = 0
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.kills += 1


class Client:
    """Sends feedback until it is acknowledged, and now and then again."""

    def __init__(self, replicas: list[Replica], keys: range, seed: int) -> None:
        self._replicas = replicas
        self._keys = keys
        self._random = random.Random(seed)
        self._connection: http.client.HTTPConnection | None = None
        self.counted: Counter[int] = Counter()
        """By key: how often it was told that this was the first time."""
        self.acknowledged = 0
        self.repeated = 0

    def run(self) -> None:
        for key in self._keys:
            self._until_acknowledged(key)
            if self._random.random() < 0.1:
                self.repeated += 1
                self._until_acknowledged(self._random.choice(range(self._keys.start, key + 1)))

    def _until_acknowledged(self, key: int) -> None:
        while True:
            try:
                self.counted[key] += self._send(key)
                self.acknowledged += 1
                return
            except (OSError, http.client.HTTPException):
                # Whether it was counted is not known: it is sent again, wherever somebody listens.
                self._connection = None
                self.repeated += 1
                time.sleep(0.01)

    def _send(self, key: int) -> bool:
        if self._connection is None:
            self._connection = http.client.HTTPConnection(
                "127.0.0.1", self._random.choice(self._replicas).port, timeout=60
            )
        self._connection.request("POST", "/v1/feedback", json.dumps(body_of(key)), {"Idempotency-Key": f"key-{key}"})
        answer = self._connection.getresponse()
        told = answer.read()
        assert answer.status == 200, told
        return bool(json.loads(told)["counted"])


def body_of(key: int) -> dict[str, object]:
    return {"completion": f"cmpl-{key % ANSWERS}", "score": (key % 101) / 100}


def kept(books: Books) -> list[tuple[str, str, float]]:
    with books.feedback.database.read() as connection:
        columns = (feedback.c.idempotency_key, feedback.c.completion, feedback.c.score)
        return [tuple(row) for row in connection.execute(sa.select(*columns))]


def through_kills(config: Path, books: Books, *, records: int, kills: int) -> None:
    replicas = [Replica(config), Replica(config)]
    size = records // 4
    clients = [Client(replicas, range(at * size, (at + 1) * size), seed=at) for at in range(4)]
    threads = [threading.Thread(target=client.run) for client in clients]
    try:
        for thread in threads:
            thread.start()
        for number in range(kills):
            # Evenly over the records, whatever the machine's speed is.
            while sum(client.acknowledged for client in clients) < records * (number + 1) / (kills + 1):
                assert any(thread.is_alive() for thread in threads)
                time.sleep(0.005)
            replica = replicas[number % 2]
            replica.kill()
            replica.start()
        for thread in threads:
            thread.join()
    finally:
        for replica in replicas:
            replica.kill()

    assert sum(replica.kills for replica in replicas) == kills + len(replicas)
    found = kept(books)
    assert sorted(found) == sorted(
        (f"key-{key}", body["completion"], body["score"]) for key in range(records) for body in [body_of(key)]
    )
    counted = sum((client.counted for client in clients), Counter())
    print(
        f"\n{records} acknowledged, {sum(client.repeated for client in clients)} repeated, {kills} kills: none lost, none "
        f"doubled; {records - counted.total()} were counted by a process that was killed before it could say so"
    )
    # Nobody was told twice that it was the first time.
    assert max(counted.values()) == 1
    with books.feedback.database.read() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"


@pytest.mark.slow
def test_feedback_through_kills_is_neither_lost_nor_doubled(config, books):
    through_kills(config, books, records=800, kills=3)


@pytest.mark.faults
def test_a_hundred_thousand_through_twenty_kills_are_neither_lost_nor_doubled(config, books):
    through_kills(config, books, records=100_000, kills=20)


def may_trace() -> bool:
    """Whether there is an strace that this machine lets trace; some containers do not."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-f", "--seccomp-bpf", "-o", "/dev/null", "true"], check=False).returncode == 0


def test_feedback_is_on_disk_before_it_is_acknowledged(config, books, tmp_path):
    if not may_trace():
        if os.environ.get("AIFACTORY_REQUIRE_STRACE"):
            pytest.fail("expected strace, and that it may trace, found that it may not")
        pytest.skip("expected strace, and that it may trace, found that it may not: install it")
    trace = tmp_path / "trace"
    calls = "trace=pwrite64,write,writev,sendto,sendmsg,fsync,fdatasync"
    # Each letter of a body is shown; what is not traced is not slowed down.
    replica = Replica(
        config, before=("strace", "-f", "--seccomp-bpf", "-y", "-s", "400", "-e", calls, "-o", str(trace))
    )
    client = Client([replica], range(5), seed=1)
    client.run()
    # The tracer ends with what it traces.
    for traced in psutil.Process(replica.process.pid).children():
        traced.terminate()
    replica.process.wait()

    lines = trace.read_text().splitlines()
    told = [at for at, line in enumerate(lines) if re.search(r'counted\\?":\s?true', line)]
    assert len(told) == 5
    for before, answer in pairwise([0, *told]):
        written = [at for at in range(before, answer) if "pwrite64(" in lines[at] and "state.db-wal>" in lines[at]]
        synced = [at for at in range(before, answer) if re.search(r"f(data)?sync\(\d+<[^>]*state\.db-wal>", lines[at])]
        assert written, "the feedback was written"
        assert synced, "and brought to the disk"
        assert max(written) < max(synced)
        if "unfinished" in lines[max(synced)]:
            thread = lines[max(synced)].split()[0]
            ended = re.compile(rf"{thread} +<\.\.\. f(data)?sync resumed>.*= 0")
            assert any(ended.match(line) for line in lines[max(synced) : answer]), "which had ended"
