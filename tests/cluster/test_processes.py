"""Laws of processes that are ours: they end, and whoever has got their pid meanwhile does not notice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aifactory.cluster.head import part_of
from aifactory.cluster.processes import OwnProcess, end, identity_of, own, writes_below

_STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"


@pytest.fixture
def sleeping() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def test_a_stale_pid_is_never_signalled(sleeping: subprocess.Popen[bytes]) -> None:
    ours = own(sleeping.pid)
    assert ours is not None
    stale = OwnProcess(sleeping.pid, ours.identity + "0")

    assert ours.is_alive
    assert not stale.is_alive
    assert end([stale], patience_s=0.0) == []
    stale.send(signal.SIGKILL)

    assert sleeping.poll() is None


def test_what_is_ours_ends_gently_and_what_does_not_is_killed(sleeping: subprocess.Popen[bytes]) -> None:
    stubborn = subprocess.Popen([sys.executable, "-c", _STUBBORN], stdout=subprocess.PIPE)
    assert stubborn.stdout is not None
    stubborn.stdout.readline()
    ours = [process for process in (own(sleeping.pid), own(stubborn.pid)) if process is not None]

    assert end(ours, patience_s=1.0) == [stubborn.pid]
    assert [process.is_alive for process in ours] == [False, False]


def test_what_has_ended_and_was_not_waited_for_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    assert identity_of(process.pid) is None
    process.wait()


def test_a_worker_is_known_by_the_files_that_it_has_open(tmp_path: Path) -> None:
    code = f"f = open({str(tmp_path / 'log')!r}, 'w'); print(1, flush=True); import time; time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    ours = own(process.pid)
    assert ours is not None

    assert writes_below(ours, tmp_path)
    assert not writes_below(ours, tmp_path / "other")
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("command", "part"),
    [
        (["/venv/ray/core/src/ray/gcs/gcs_server", "--x=/f/ray/session"], "gcs"),
        (["/venv/ray/core/src/ray/raylet/raylet", "--raylet_socket_name=/f"], "raylet"),
        (["/venv/bin/python3.11", "-u", "/venv/ray/_private/log_monitor.py", "--session-dir=/f"], "log_monitor"),
        (["/venv/bin/python", "-m", "ray.util.client.server", "--address=1"], "client"),
        (["ray::ServeController"], "worker"),
        # Whoever only names a part is none.
        (["less", "/f/ray/session_1/logs/gcs_server.out"], None),
        (["/venv/bin/python", "/home/me/editor.py", "/venv/ray/_private/log_monitor.py"], None),
        (["tail", "-f", "/f/ray/session_1/logs/raylet"], None),
        ([], None),
    ],
)
def test_a_part_of_ray_is_known_by_what_it_runs_not_by_what_it_names(command: list[str], part: str | None) -> None:
    assert part_of(command) == part
