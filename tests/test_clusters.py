"""The loop on a cluster that somebody else has started: two nodes, as Ray jobs, with PostgreSQL."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import small_config, unknown_traffic
from postgres import postgres_server, postgres_url  # noqa: F401  (fixtures)

from aifactory.config import Config
from aifactory.records.books import Books
from aifactory.report import Report

ROOT = Path(__file__).parent.parent
# Two clusters of one machine must not find one another, and none may ask for a token.
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "GOMP_SPINCOUNT": "0",
    "HF_HUB_OFFLINE": "1",
    # As in an activated environment: jobs run the head's `python`.
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}


def written(folder: Path, values: dict[str, Any]) -> Path:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[str]:
    """Two simulated nodes and a job server; gives the job server's address."""
    port = free_port()
    with open(tmp_path / "cluster.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("two_nodes.py")), str(port)],
            stdout=log,
            stderr=log,
            env=ENVIRONMENT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while "ready" not in (tmp_path / "cluster.log").read_text() or not answers(f"{address}/api/version"):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "cluster.log").read_text()
        time.sleep(0.5)
    yield address
    # Asked nicely it takes half a minute; nothing of it is needed any more.
    started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(started, timeout=3)
    for each in left:
        each.kill()


def test_the_loop_closes_over_two_nodes_as_ray_jobs_on_postgresql(
    two_nodes: str,
    tmp_path: Path,
    postgres_url: str,  # noqa: F811
) -> None:
    # A worker asks for more than half of a node, so one trains on each.
    runtime = {"workers": 2, "cpus_per_worker": 0.8, "state_url": postgres_url}
    config = written(tmp_path, small_config(tmp_path, traffic=unknown_traffic(tmp_path), runtime=runtime))

    submit = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", two_nodes, "--working-dir", "."]
    done = subprocess.run(
        [*submit, "--", "python", "jobs/run.py", str(config)],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=ROOT,
        env=ENVIRONMENT,
    )

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    books = Books(Config.from_yaml(config))
    states = [(cycle.bound.kind, cycle.state) for cycle in books.journal.cycles()]
    assert states == [("run", "promoted"), ("drift", "promoted")]
    (rehearsal,) = Report.of(books).rehearsals
    assert rehearsal["failed"] == 0, rehearsal["failures"]
    # The retrain was a job of its own, with the working directory that was packaged for the first.
    with urllib.request.urlopen(f"{two_nodes}/api/jobs/{books.journal.cycles()[1].trigger}-a1") as response:
        job = json.loads(response.read())
    assert job["status"] == "SUCCEEDED"
    assert job["runtime_env"]["working_dir"].startswith("gcs://")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False
