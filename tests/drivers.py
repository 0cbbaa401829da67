"""Drivers of the command in processes of their own, which tests kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from aifactory.config import Config
from aifactory.records.books import Books


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What must be the same, whatever was killed."""

    artifacts: tuple[str, ...]
    """Ids, which hold the fingerprints, in the order in which they were first made."""
    digests: tuple[str, ...]
    """Of token sets and models: the weights are equal to the bit. Feedback rows name random ids of answers."""
    releases: tuple[tuple[int, str], ...]
    decisions: tuple[str, ...]
    feedback: int
    batches: int


class Driver:
    """`aifactory run`, or another verb, on one configuration."""

    def __init__(
        self, folder: Path, values: dict[str, Any], *, verb: str = "run", environment: Mapping[str, str] | None = None
    ) -> None:
        """`environment` is added to that of this process."""
        self.verb = verb
        self._environment = {**os.environ, **(environment or {})}
        folder.mkdir(parents=True, exist_ok=True)
        self.config_file = folder / "config.yaml"
        self.config_file.write_text(yaml.safe_dump(values), encoding="utf-8")
        self.log = folder / "driver.log"
        self.books = Books(Config.model_validate(values))

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command; what it says is appended to the log."""
        with open(self.log, "ab") as log:
            command = [sys.executable, "-m", "aifactory", self.verb, str(self.config_file)]
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=self._environment)

    def finish(self, *, timeout_s: float = 900) -> None:
        """Run the command to its end."""
        process = self.start()
        try:
            status = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            kill(process)
            raise
        assert status == 0, self.log.read_text(encoding="utf-8")[-4000:]

    def kill_when(self, condition: Callable[[], bool], *, timeout_s: float = 900) -> bool:
        """Run the command and SIGKILL it as soon as the condition holds; False if it had ended by itself before."""
        process = self.start()
        deadline = time.monotonic() + timeout_s
        while not condition():
            if process.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.log.read_text(encoding="utf-8")[-4000:]
            time.sleep(0.01)
        kill(process)
        return True

    def finish_through_kills(self, *, timeout_s: float = 900) -> int:
        """Run the command, again whenever it has killed itself, to its end; how often it had."""
        deadline = time.monotonic() + timeout_s
        for kills in range(10**6):
            process = self.start()
            children: list[psutil.Process] = []
            while process.poll() is None:
                assert time.monotonic() < deadline, self.log.read_text(encoding="utf-8")[-4000:]
                with suppress(psutil.NoSuchProcess):
                    children = psutil.Process(process.pid).children(recursive=True) or children
                time.sleep(0.05)
            if process.returncode == 0:
                return kills
            assert process.returncode == -signal.SIGKILL, self.log.read_text(encoding="utf-8")[-4000:]
            end(children)
        raise AssertionError

    def events(self) -> list[str]:
        """The journal's events so far."""
        if not Path(self.books.storage.path("state.db")).exists():
            return []
        return [event.event for event in self.books.journal.events()]

    def outcome(self) -> Outcome:
        """What the books say in the end."""
        return outcome_of(self.books)


def outcome_of(books: Books) -> Outcome:
    """What must be the same, from the books."""
    events = [e for e in books.journal.events() if e.event in ("ingested", "tokenized", "trained", "evaluated")]
    trees = [books.lineage.tree(str(event.subject)) for event in events]
    counts = books.feedback.counts()
    return Outcome(
        artifacts=tuple(str(event.subject) for event in events),
        digests=tuple(str(tree.digest) for tree in trees if tree is not None and tree.kind in ("tokens", "model")),
        releases=tuple((release.number, release.model) for release in books.registry.releases()),
        decisions=tuple(cycle.state for cycle in books.journal.cycles()),
        feedback=counts["feedback"],
        batches=counts["batches"],
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the driver alone; what it had started notices by itself. Ray's agents take a minute: they are helped."""
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    end(children)


def end(children: Sequence[psutil.Process]) -> None:
    """Wait a little for what a driver that is gone had started, and SIGKILL the rest."""
    _, left = psutil.wait_procs(list(children), timeout=2)
    for child in left:
        child.kill()
