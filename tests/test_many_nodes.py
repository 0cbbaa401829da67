"""Placement at scale: gangs on simulated nodes with fake GPUs, a rack that is lost; and 64 nodes of 8 as a plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from many_nodes import patiently

NODES = 8
"""As many as fit beside other work on a machine of 24 GiB; the test prints what they take."""


@pytest.mark.slow
def test_a_gang_is_placed_whole_or_refused_before_it_starts_and_half_of_it_outlives_a_rack(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_AUTH_MODE": "disabled"}
    command = [
        sys.executable,
        str(Path(__file__).with_name("many_nodes.py")),
        str(NODES),
        str(tmp_path / "report.json"),
    ]

    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)

    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "report.json").read_text())
    print(f"{NODES} simulated nodes of 8 fake GPUs and their head take {found['memory_gb']} GB")
    assert found["memory_gb"] > 0
    assert (found["gpus"], found["gpus_left"]) == (NODES * 8, NODES * 4)
    assert found["all"] == ""
    assert f"{NODES * 8} training workers" in found["all_beside_serving"]
    assert "no place is left" in found["one_more"]
    assert found["gang_nodes"] == NODES
    assert not found["second_gang"]
    # What is left is enough for the least that the run goes on with, and not for all; that is known before.
    assert "no place is left" in found["all_after"]
    assert found["elastic_after"] == ""
    assert found["half_gang"]


def test_a_node_that_ray_gives_up_is_started_again_and_the_first_try_is_gone() -> None:
    tries: list[subprocess.Popen[bytes]] = []

    def start() -> int:
        tries.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        if len(tries) < 3:
            raise RuntimeError("The current node timed out during startup.")
        return len(tries)

    try:
        assert patiently(start) == 3
        first, second, third = tries
        assert first.wait(10) is not None
        assert second.wait(10) is not None
        assert third.poll() is None, "what has come up goes on"
    finally:
        for each in tries:
            each.kill()
            each.wait()


def test_64_nodes_of_8_are_planned_with_what_they_take() -> None:
    command = [sys.executable, "-m", "aifactory", "plan", "--json", "--model", "llama-3.1-8b", "--tokens", "1e12"]
    command += ["--accelerator", "h100", "--count", "512"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stderr
    (training,) = json.loads(done.stdout)["training"]
    assert training["count"] == 512
    assert training["fits"]
    assert training["hours"] > 0
