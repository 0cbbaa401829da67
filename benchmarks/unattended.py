"""Unattended: a factory as its command runs it, the users beside it, and processes that are killed. It reads the books alone.

`aifactory run CONFIG` makes the first release, `aifactory improve CONFIG` serves and improves; where that dies it is started
again, as any supervisor would. Nothing else is ever told to the factory.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from loop_users import Phase

from aifactory import Config, Factory
from aifactory.records.books import Books
from aifactory.records.journal import Cycle

_POLL_S = 0.25
_START_S = 300.0
_END_S = 60.0
_LEFT_S = 5.0
"""For what a killed command had started: Ray's agents alone stay longer, for a minute, and hold nothing that the next one needs."""
KINDS = {
    "evaluation actor": "ray::Evaluator",
    "replica": "ray::ServeReplica",
    "cycle": "ray::turn_begun",
    "training worker": "ray::RayTrainWorker",
    "users": "loop_users.py",
    "command": "-m aifactory improve",
}
"""What is killed, and how its command line is told from others."""


class Unattended:
    """One factory in a folder of its own, watched from outside."""

    def __init__(self, folder: Path, config: dict[str, Any], questions: Path) -> None:
        self.folder = folder
        self.config_file = folder / "loop.yaml"
        self.config_file.write_text(yaml.safe_dump(config), encoding="utf-8")
        self.books: Books = Factory(Config.model_validate(config)).books
        endpoint = config["runtime"]["endpoint"]
        self._users = [
            f"http://127.0.0.1:{endpoint['port']}",
            config["name"],
            str(questions),
            str(folder / "asked.jsonl"),
        ]
        self._log = (folder / "factory.log").open("ab")
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self.phase: Phase | None = None
        self.killed: list[dict[str, object]] = []
        self.restarts = 0
        self._left_behind: list[int] = []
        """What a command that was killed had started."""

    # ── processes ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def command(self, verb: str) -> list[str]:
        return [sys.executable, "-m", "aifactory", verb, str(self.config_file)]

    def run(self) -> float:
        """`aifactory run`; its seconds."""
        started = time.perf_counter()
        subprocess.run(self.command("run"), check=True, stdout=subprocess.DEVNULL, stderr=self._log)
        return time.perf_counter() - started

    @contextmanager
    def improving(self) -> Iterator[None]:
        """`aifactory improve` and the users, until the block ends, also by SIGTERM."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            self._start("improve")
            if not self.watch(self.answers, _START_S, supervised=False):
                raise SystemExit(
                    f"loop.py: expected the factory to answer within {_START_S:g} s, found that it does not."
                )
            yield
        finally:
            for process in reversed(self._started.values()):
                process.send_signal(signal.SIGTERM)
            for process in self._started.values():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_END_S)
                process.kill()
            self._log.close()

    def _supervise(self) -> None:
        """Start what is not there."""
        for name in ("improve", "users"):
            process = self._started.get(name)
            if process is None or process.poll() is not None:
                if process is not None:
                    self.restarts += 1
                    self._end_left_behind()
                self._start(name)

    def _start(self, name: str) -> None:
        users = [sys.executable, str(Path(__file__).with_name("loop_users.py")), *self._users]
        self._started[name] = subprocess.Popen(
            self.command("improve") if name == "improve" else users,
            stdin=subprocess.PIPE if name == "users" else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            start_new_session=True,
        )
        if name == "users" and self.phase is not None:
            self._tell(self.phase)

    def answers(self) -> bool:
        """Whether the endpoint does."""
        try:
            with urllib.request.urlopen(f"{self._users[0]}/v1/models", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def _end_left_behind(self) -> None:
        """Ray's processes end when the one that started them does; a supervisor waits for that, and then ends the rest."""
        _until(lambda: not any(_line_of(pid) for pid in self._left_behind), _LEFT_S)
        for pid in self._left_behind:
            if "ray" in _line_of(pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._left_behind = []

    def behave(self, phase: Phase) -> None:
        """Have the users behave so from now on."""
        self.phase = phase
        if "users" in self._started:
            self._tell(phase)
        print(f"loop.py: {phase.name}", file=sys.stderr)

    def _tell(self, phase: Phase) -> None:
        pipe = self._started["users"].stdin
        assert pipe is not None
        with suppress(BrokenPipeError):  # they were killed; whoever comes after them is told
            pipe.write(json.dumps(asdict(phase)).encode() + b"\n")
            pipe.flush()

    def watch(self, condition: Callable[[], bool], longest_s: float, *, supervised: bool = True) -> bool:
        """Keep all of it running until the condition holds; whether it came to that."""
        deadline = time.monotonic() + longest_s
        while time.monotonic() < deadline:
            if supervised:
                self._supervise()
            if condition():
                return True
            time.sleep(_POLL_S)
        return False

    def kill_some(self, rng: random.Random, number: int, *, apart_s: float, until: Callable[[], bool]) -> None:
        """SIGKILL so many processes, one of each kind in turn that is there, at random moments."""
        kinds = list(KINDS)
        rng.shuffle(kinds)
        for turn in range(number):
            if self.watch(until, rng.uniform(0.2, 2) * apart_s):
                return
            # The kinds in turn; of those that come and go the first that is there.
            for kind in kinds[turn % len(kinds) :] + kinds:
                found = [pid for pid in self._pids() if KINDS[kind] in _line_of(pid)]
                if found:
                    pid = rng.choice(found)
                    if kind == "command":
                        self._left_behind = list(_family(pid))
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        self.killed.append({"at": time.time(), "what": kind})
                    break

    def _pids(self) -> list[int]:
        return [pid for process in self._started.values() for pid in (process.pid, *_family(process.pid))]

    # ── what is in the books ──────────────────────────────────────────────────────────────────────────────────────────

    def drifts(self) -> list[Cycle]:
        """The cycles that the factory began by itself."""
        return [cycle for cycle in self.books.journal.cycles() if cycle.bound.is_retrain]

    def num_ended(self) -> int:
        """How many of them have ended and, where they gave a release, are answered by it."""
        answered = self.books.feedback.completions_by_release()
        releases = {release.trigger: release.number for release in self.books.registry.releases()}
        return sum(
            cycle.closed_at is not None and (cycle.trigger not in releases or releases[cycle.trigger] in answered)
            for cycle in self.drifts()
        )

    def is_idle(self) -> bool:
        return all(cycle.closed_at is not None for cycle in self.drifts())

    def asked(self) -> list[dict[str, Any]]:
        """What the users have seen, line by line."""
        text = (self.folder / "asked.jsonl").read_text(encoding="utf-8")
        lines = []
        for line in text.splitlines():
            with suppress(ValueError):  # the last one of a process that was killed
                lines.append(json.loads(line))
        return lines


def _line_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _family(pid: int) -> Sequence[int]:
    """All that a process has started, and those in turn."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


def _until(condition: Callable[[], bool], longest_s: float) -> None:
    deadline = time.monotonic() + longest_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
