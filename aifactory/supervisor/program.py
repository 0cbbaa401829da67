"""Program: a process that the supervisor starts again whenever it ends, talks to, and can end."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from aifactory.cluster.processes import OwnProcess, end, own


class Program:
    """One program of the supervisor's. What it prints, a line of JSON each, is handed on; what it logs goes to our log."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        first_line: str = "",
        hear: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> None:
        """`first_line`: what it is told on its standard input at once."""
        self.name = name
        self._command = list(command)
        self._first_line = first_line
        self._hear = hear
        self._running: subprocess.Popen[str] | None = None

    @property
    def process(self) -> OwnProcess | None:
        """The process, while it runs."""
        if self._running is None or self._running.poll() is not None:
            return None
        return own(self._running.pid)

    @property
    def status(self) -> int | None:
        """With what it ended last; None while it runs or where it was never started."""
        return None if self._running is None else self._running.poll()

    def start(self, environment: Mapping[str, str]) -> None:
        """Start it, in a session of its own: Ctrl-C in a terminal is for the supervisor, which ends all in their order."""
        self._running = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(environment),
            start_new_session=True,
        )
        threading.Thread(target=self._listen, args=(self._running,), name=self.name, daemon=True).start()
        if self._first_line:
            self.say(self._first_line)

    def say(self, line: str) -> None:
        """Tell it a line; one that is gone does not hear it."""
        assert self._running is not None and self._running.stdin is not None
        with suppress(BrokenPipeError, ValueError):
            self._running.stdin.write(line + "\n")
            self._running.stdin.flush()

    def wait(self, timeout_s: float) -> int | None:
        """With what it ended, if it did in time."""
        if self._running is None:
            return None
        with suppress(subprocess.TimeoutExpired):
            return self._running.wait(timeout=timeout_s)
        return None

    def end(self, *, patience_s: float) -> None:
        """End it."""
        process = self.process
        if process is not None:
            end([process], patience_s=patience_s)
            self.wait(1.0)

    def _listen(self, running: subprocess.Popen[str]) -> None:
        assert running.stdout is not None
        for line in running.stdout:
            with suppress(ValueError):
                self._hear(json.loads(line))


def end_recorded(file: Path, *, patience_s: float) -> list[str]:
    """End the programs that somebody who is gone has noted in a file; the names of those that still ran."""
    try:
        noted = json.loads(file.read_text(encoding="utf-8"))["programs"]
        processes = {name: OwnProcess(pid, identity) for name, (pid, identity) in noted.items()}
    except (OSError, ValueError, TypeError, KeyError):
        return []
    alive = [name for name, process in processes.items() if process.is_alive]
    end([processes[name] for name in alive], patience_s=patience_s)
    return alive
