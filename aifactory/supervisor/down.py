"""`aifactory down`: what `up`, or a job, has left behind ends: the endpoint after its last answers, actors, jobs, the head of our own.

Only what is ours is touched. A process is ended by its pid and the moment of its start, as they were noted when it was started, so none
that got the pid later; in a cluster that somebody else has started the factory's application and actor go, and the rest stays.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aifactory.cluster.head import Head
from aifactory.cluster.processes import OwnProcess
from aifactory.config import Config
from aifactory.errors import AIFactoryError
from aifactory.observe.events import log_event
from aifactory.records.books import Books
from aifactory.supervisor.program import end_recorded
from aifactory.supervisor.supervisor import UP_NAME, head_of, read_up

_BEYOND_DRAIN_S = 120.0
_CONNECT_S = 3.0
_PATIENCE_S = 5.0
_POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What has been ended."""

    parts: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as text."""
        return [f"ended: {part}" for part in self.parts] or ["Nothing was left behind; nothing was ended."]


def bring_down(config: Config) -> Ended:
    """End what is left of the factory on this machine, and in the cluster that `RAY_ADDRESS` names or that runs here."""
    books = Books(config)
    try:
        head = head_of(books)
        parts = _supervised(books, head)
        if not parts:
            parts = _left(books, head)
        if parts:
            _audit(books, parts)
        return Ended(parts=parts)
    finally:
        books.close()


def _supervised(books: Books, head: Head) -> list[str]:
    """Where a supervisor runs it does all of it by itself."""
    noted = read_up(head.folder).get("supervisor")
    supervisor = None if noted is None else OwnProcess(*noted)
    if supervisor is None or not supervisor.is_alive:
        return []
    supervisor.send(signal.SIGTERM)
    deadline = time.monotonic() + books.config.runtime.endpoint.drain_timeout_s + _BEYOND_DRAIN_S
    while supervisor.is_alive and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    if not supervisor.is_alive:
        return [f"`aifactory up` (process {supervisor.pid}) with all that it looked after"]
    log_event("warned", of=f"`aifactory up` (process {supervisor.pid}) does not end; it is killed")
    supervisor.send(signal.SIGKILL)
    time.sleep(_POLL_S)
    return [f"`aifactory up` (process {supervisor.pid}), killed", *_left(books, head)]


def _left(books: Books, head: Head) -> list[str]:
    """What no supervisor looks after."""
    programs = [f"{name} of `up`" for name in end_recorded(head.folder / UP_NAME, patience_s=_PATIENCE_S)]
    is_there = head.adopt()
    environment = {**os.environ, **(head.environment() if is_there else {})}
    address = running_cluster(environment)
    served = []
    if address is not None and _end_served(books, {**environment, "RAY_ADDRESS": address}):
        served.append("the endpoint, the evaluation actor and the cycles that were turned for it")
    ended = []
    if is_there:
        ended.append(f"the head at {head.address}: {', '.join(part for part, pids in head.seen().items() if pids)}")
    head.end()
    head.forget()
    (head.folder / UP_NAME).unlink(missing_ok=True)
    return [*programs, *served, *ended]


def running_cluster(environment: Mapping[str, str]) -> str | None:
    """The address of the cluster that `RAY_ADDRESS` names, else of the one that `ray start` has noted on this machine; None where
    nobody listens there: Ray would wait for minutes."""
    address = environment.get("RAY_ADDRESS")
    if not address:
        try:
            noted = Path(environment.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray" / "ray_current_cluster"
            address = noted.read_text(encoding="utf-8").strip()
        except OSError:
            return None
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return address  # of another form, such as ray://: for Ray to look at
    try:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_S):
            return address
    except OSError:
        return None


def _end_served(books: Books, environment: dict[str, str]) -> bool:
    """In a process of its own: a cluster that is half dead must not hold this one up."""
    command = [sys.executable, "-m", "aifactory.supervisor.attendant", "end"]
    timeout_s = books.config.runtime.endpoint.drain_timeout_s + _BEYOND_DRAIN_S
    try:
        done = subprocess.run(
            command,
            input=books.resolved_config().model_dump_json() + "\n",
            text=True,
            env=environment,
            stdout=subprocess.PIPE,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        log_event("warned", of=f"what is served could not be ended in {timeout_s:g} s; its processes are ended")
        return False
    return done.returncode == 0 and '"ended": true' in done.stdout


def _audit(books: Books, parts: Sequence[str]) -> None:
    # Books that are away must not keep anybody from coming down.
    with suppress(AIFactoryError), books.database.write(serialize=True) as connection:
        books.journal.audit_within(
            connection, "down", subject=books.config.name, detail={"by": "down", "ended": list(parts)}
        )
