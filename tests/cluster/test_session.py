"""Laws of the cluster that the factory starts by itself: it is open to whoever has its token, and to nobody else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
_OURS = """
import json, os, sys
import ray
from aifactory.cluster.session import connect, disconnect

@ray.remote
def seen():
    return os.environ["RAY_AUTH_TOKEN"]

for factory in ("first", "second"):
    connect(factory)
    told = [ray.get_runtime_context().gcs_address, os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]]
    print(json.dumps([*told, ray.get(seen.remote())]), flush=True)
    sys.stdin.readline()
    disconnect()
    print("left", sorted(name for name in os.environ if name.startswith("RAY_AUTH")), flush=True)
"""
_STRANGER = """
import sys
import ray
from ray._raylet import GcsClient

print(len(GcsClient(address=sys.argv[1]).get_all_node_info()))
"""


def clean(home: Path, **more: str) -> dict[str, str]:
    """The environment of a user who has set nothing, in a home of his own."""
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(home)} | more


def ask(address: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _STRANGER, address]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What a cluster of the factory's own, and one after it in the same process, said to those who came."""
    home = tmp_path_factory.mktemp("home")
    found: dict[str, object] = {"home": home}
    with subprocess.Popen(
        [sys.executable, "-c", _OURS], env=clean(home), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as ours:
        assert ours.stdin is not None and ours.stdout is not None
        try:
            address, mode, token, seen = json.loads(ours.stdout.readline())
            found["told"] = mode, token, seen
            found["stranger"] = ask(address, clean(home))
            found["wrong"] = ask(address, clean(home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64))
            found["member"] = ask(address, clean(home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token))
            ours.stdin.write("\n")
            ours.stdin.flush()
            found["left"] = ours.stdout.readline().strip()
            found["second"] = json.loads(ours.stdout.readline())
            ours.stdin.write("\n")
            ours.stdin.flush()
            ours.stdout.readline()
        finally:
            ours.stdin.close()
            found["status"] = ours.wait(60)
    return found


def test_whoever_has_the_token_is_answered_and_nobody_else(asked):
    mode, token, seen = asked["told"]
    assert (mode, len(token), seen) == ("token", 64, token)
    assert asked["member"].stdout.strip() == "1"
    for other in (asked["stranger"], asked["wrong"]):
        assert other.returncode != 0 and not other.stdout
        assert "Unauthenticated" in other.stderr or "auth" in other.stderr.lower(), other.stderr[-2000:]


def test_the_next_cluster_of_the_process_has_a_token_of_its_own_and_none_is_left_anywhere(asked):
    assert asked["left"] == "left []"
    assert asked["second"][1] == "token"
    assert asked["second"][2] == asked["second"][3] != asked["told"][1]
    assert not (asked["home"] / ".ray").exists()
    assert asked["status"] == 0
