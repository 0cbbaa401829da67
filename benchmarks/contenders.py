"""Contenders: programs that are measured beside each other. Each is a process with its descendants, which stays up while
another has its turn.

A child speaks JSON by lines: it writes {"answer": …} when it is there, and then to each question. What it logs goes
to a file. A server that speaks HTTP alone is asked for a path until it answers.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from http_load import Connection, Target

_END_S = 20.0
_MB = 1e6


class Contender:
    """A process and all that it started."""

    def __init__(
        self, command: Sequence[str | Path], *, environment: Mapping[str, str] | None = None, talks: bool = True
    ) -> None:
        """`talks`: whether it is a child that speaks JSON."""
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if talks else self.log,
            stderr=self.log,
            env={**_own_environment(), **(environment or {})},
            start_new_session=True,
        )
        self._started = time.perf_counter()
        self.start_s = 0.0
        """From its beginning to its being ready."""

    def ready(self) -> Any:
        """What a child says when it is there."""
        return self._read()

    def ask(self, **question: Any) -> Any:
        """A child's answer to a question."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question).encode() + b"\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            # What libraries print goes between.
            if line.startswith(b'{"answer"'):
                self.start_s = self.start_s or time.perf_counter() - self._started
                return json.loads(line)["answer"]
        raise RuntimeError(f"expected an answer of {self.process.args}, found its end: {self.last_words()}")

    def wait_for(self, target: Target, path: str, *, timeout_s: float) -> None:
        """Until a server answers."""

        async def ask() -> int:
            connection = await Connection.open(target)
            status, _ = await connection.ask(target.request("GET", path))
            connection.close()
            return status

        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with suppress(OSError, EOFError):
                if asyncio.run(ask()) == 200:
                    self.start_s = time.perf_counter() - self._started
                    return
            time.sleep(0.5)
        raise RuntimeError(f"expected {self.process.args} to answer, found: {self.last_words()}")

    def last_words(self) -> str:
        """The end of its log."""
        size = os.fstat(self.log.fileno()).st_size
        return os.pread(self.log.fileno(), 3000, max(0, size - 3000)).decode(errors="replace")

    @property
    def tree(self) -> list[psutil.Process]:
        """It and its descendants."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            return [process, *process.children(recursive=True)]
        return []

    def memory_mb(self) -> tuple[float, float]:
        """PSS and USS of all of it."""
        pss = uss = 0
        for process in self.tree:
            with suppress(psutil.Error):
                found = process.memory_full_info()
                pss, uss = pss + found.pss, uss + found.uss
        return pss / _MB, uss / _MB

    def cpu_s(self) -> float:
        """What those that live have used of the processors."""
        total = 0.0
        for process in self.tree:
            with suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def pause(self) -> None:
        """Stop all of it; its memory stays."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it run again."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End all of it."""
        tree = self.tree
        self.go_on()
        if self.process.stdin is not None:
            self.process.stdin.close()
        for ask in (lambda: None, self.process.terminate, self.process.kill):
            ask()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_END_S)
                break
        for process in tree:
            with suppress(psutil.Error):
                process.kill()

    def _signal(self, number: int) -> None:
        for process in self.tree:
            with suppress(psutil.Error):
                process.send_signal(number)


def _own_environment() -> dict[str, str]:
    """Ours, without what was set for our own threads and modules: each contender has its own defaults."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMP_", "GOMP_", "KMP_", "PYTHONPATH"))
    }


def serve_lines(answer: Any, *, ready: Any) -> None:
    """What a child does: say that it is there, and answer each line until there is none."""
    import sys

    print(json.dumps({"answer": ready}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"answer": answer(**json.loads(line))}), flush=True)
