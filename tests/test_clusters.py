"""The loop on clusters that somebody else has started: two nodes, and as Ray jobs on a head with a job server."""

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
from postgres import postgres_server, postgres_url  # noqa: F401  (fixtures)
from small_factories import small_config, unknown_traffic

from aifactory.config import Config
from aifactory.records.books import Books

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


@pytest.mark.slow
def test_the_loop_closes_over_two_nodes_and_postgresql(tmp_path: Path, postgres_url: str) -> None:  # noqa: F811
    runtime = {"workers": 2, "cpus_per_worker": 0.8, "state_url": postgres_url}
    config = written(tmp_path, small_config(tmp_path, traffic=unknown_traffic(tmp_path), runtime=runtime))

    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("two_nodes.py")), str(config), str(tmp_path / "report.json")],
        capture_output=True,
        text=True,
        timeout=1200,
        env=ENVIRONMENT,
    )

    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["nodes"] == 2
    assert [cycle["state"] for cycle in found["report"]["cycles"]] == ["promoted", "promoted"]
    assert found["report"]["rehearsals"][0]["failed"] == 0


@pytest.fixture
def head(tmp_path: Path) -> Iterator[str]:
    """A head with a job server, as `ray start --head` makes one; gives the job server's address."""
    ports = {
        name: free_port()
        for name in (
            "port",
            "dashboard-port",
            "dashboard-agent-listen-port",
            "ray-client-server-port",
            "metrics-export-port",
        )
    }
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2"]
    command += ["--node-ip-address=127.0.0.1", "--disable-usage-stats", *(f"--{k}={v}" for k, v in ports.items())]
    with open(tmp_path / "head.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT, start_new_session=True)
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    deadline = time.monotonic() + 120
    while not answers(f"{address}/api/version"):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "head.log").read_text()
        time.sleep(0.5)
    yield address
    # Asked nicely it takes half a minute; nothing of it is needed any more.
    started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(started, timeout=3)
    for each in left:
        each.kill()


@pytest.mark.slow
def test_the_loop_closes_as_ray_jobs_and_the_retrain_is_one_of_them(head: str, tmp_path: Path) -> None:
    config = written(tmp_path, small_config(tmp_path, traffic=unknown_traffic(tmp_path)))

    submit = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", head, "--working-dir", "."]
    done = subprocess.run(
        [*submit, "--", "python", "jobs/run.py", str(config)],
        capture_output=True,
        text=True,
        timeout=1200,
        cwd=ROOT,
        env=ENVIRONMENT,
    )

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    books = Books(Config.from_yaml(config))
    states = [(cycle.bound.kind, cycle.state) for cycle in books.journal.cycles()]
    assert states == [("run", "promoted"), ("drift", "promoted")]
    drift = books.journal.cycles()[1]
    with urllib.request.urlopen(f"{head}/api/jobs/{drift.trigger}-a1") as response:
        job = json.loads(response.read())
    assert job["status"] == "SUCCEEDED"
    assert job["runtime_env"]["working_dir"].startswith("gcs://")
    assert "state_url" not in json.dumps(job)


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
