"""Processes that are ours: told from whatever else may have their number by now, and ended gently first."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class OwnProcess:
    """A process as it was when it was ours."""

    pid: int
    identity: str
    """When it was started: no other process has both that and the pid."""

    @property
    def is_alive(self) -> bool:
        """Whether it runs: it itself, not another that got its pid."""
        return identity_of(self.pid) == self.identity

    def send(self, number: signal.Signals) -> None:
        """Send it a signal; nothing happens where it is gone, whoever has its pid now."""
        with suppress(ProcessLookupError):
            if not hasattr(os, "pidfd_open"):
                if self.is_alive:
                    os.kill(self.pid, number)
                return
            # What is opened stays this very process: between the look and the signal no other can take its place.
            handle = os.pidfd_open(self.pid)
            try:
                if self.is_alive:
                    signal.pidfd_send_signal(handle, number)
            finally:
                os.close(handle)


def identity_of(pid: int) -> str | None:
    """What tells a running process from all that have or will have its pid; None where there is none or it has ended.

    On Linux the machine's start and the ticks from there to the process': the wall clock may be set meanwhile.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = _boot()
    except OSError:
        try:
            process = psutil.Process(pid)
            return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
        except psutil.Error:
            return None
    # The name of the program, in brackets, may hold anything.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else f"{boot}:{fields[19]}"


@functools.cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def own(pid: int) -> OwnProcess | None:
    """The process that has this pid now; None where there is none."""
    identity = identity_of(pid)
    return None if identity is None else OwnProcess(pid, identity)


def end(processes: Iterable[OwnProcess], *, patience_s: float) -> list[int]:
    """Ask processes to end, kill those that have not after so long; the pids of those that were killed."""
    left = [each for each in processes if each.is_alive]
    for each in left:
        each.send(signal.SIGTERM)
    left = wait_gone(left, timeout_s=patience_s)
    for each in left:
        each.send(signal.SIGKILL)
    wait_gone(left, timeout_s=10.0)
    return [each.pid for each in left]


def wait_gone(processes: Sequence[OwnProcess], *, timeout_s: float) -> list[OwnProcess]:
    """Those that still run after so long."""
    deadline = time.monotonic() + timeout_s
    while True:
        left = [each for each in processes if each.is_alive]
        if not left or time.monotonic() >= deadline:
            return left
        time.sleep(_POLL_S)


def running() -> Iterator[tuple[OwnProcess, Sequence[str], Sequence[OwnProcess]]]:
    """Processes of this user: each with its command line, and those above it up to the first."""
    mine = os.geteuid()
    found: dict[int, tuple[psutil.Process, list[str]]] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.uids().effective == mine:
                found[process.pid] = process, process.cmdline()
    parents = {}
    for pid, (process, _) in found.items():
        with suppress(psutil.Error):
            parents[pid] = process.ppid()
    known = {pid: one for pid in found if (one := own(pid)) is not None}
    for pid, one in known.items():
        above: list[OwnProcess] = []
        at = parents.get(pid)
        while at is not None and at in known and len(above) < len(known):
            above.append(known[at])
            at = parents.get(at)
        yield one, found[pid][1], above


def writes_below(process: OwnProcess, folder: Path) -> bool:
    """Whether it has a file below a folder open; False where that can't be told."""
    try:
        handles = list(Path(f"/proc/{process.pid}/fd").iterdir())
    except OSError:
        return False
    for handle in handles:
        with suppress(OSError):
            if os.readlink(handle).startswith(f"{folder}/"):
                return True
    return False
