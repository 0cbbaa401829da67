"""Laws of a head of our own, without one: where it lies, how it is joined, what it takes over, and what it does when it can't start."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from aifactory.cluster.head import LONGEST_FOLDER, STATE_NAME, STORE_TRIES, Head, default_folder
from aifactory.cluster.processes import own
from aifactory.config import Head as HeadOptions
from aifactory.errors import ConfigError, PlacementError


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="h-") as made:  # pytest's own are too long for Ray's sockets
        yield Path(made)


def head_in(folder: Path, **options: object) -> Head:
    return Head(HeadOptions.model_validate({"folder": str(folder), **options}), factory="alpha", root="/data/alpha")


def test_two_storage_roots_have_two_heads_and_one_has_one() -> None:
    assert default_folder("/data/a") == default_folder("/data/a") != default_folder("/data/b")
    assert len(str(default_folder("/data/a"))) <= len(str(Path.home())) + 21


def test_a_folder_in_which_rays_sockets_have_no_room_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"Set runtime\.head\.folder"):
        head_in(folder / ("x" * LONGEST_FOLDER))
    longest = "/" + "x" * (LONGEST_FOLDER - 1)
    head_in(Path(longest))
    socket = f"{longest}/ray/session_2026-11-26_18-52-09_031543_4194304/sockets/plasma_store"
    assert len(socket) <= 107


def test_who_joins_needs_the_token_which_only_the_owner_can_read(folder: Path) -> None:
    head = head_in(folder)
    head._ports = head._free_ports({})

    joined = head.environment()

    token = Path(joined["RAY_AUTH_TOKEN_PATH"])
    assert joined["RAY_AUTH_MODE"] == "token"
    assert joined["RAY_ADDRESS"] == f"127.0.0.1:{head._ports['port']}"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text()) == 64
    assert head.environment() == joined, "it stays the same"
    without = head_in(folder, auth="disabled")
    without._ports = head._ports
    assert without.environment() == {"RAY_ADDRESS": joined["RAY_ADDRESS"], "RAY_AUTH_MODE": "disabled"}


def test_ports_stay_where_nobody_else_has_taken_them(folder: Path) -> None:
    head = head_in(folder)
    first = head._free_ports({})

    assert head._free_ports(first) == first
    assert len(set(first.values())) == len(first)
    assert head_in(folder, port=6399)._free_ports(first)["port"] == 6399


def test_what_is_started_knows_of_no_other_cluster_and_keeps_its_state_in_the_store(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    head = head_in(folder, cpus=3, gpus=0)
    head._ports = head._free_ports({})

    environment = head._starting_environment()

    assert environment["RAY_gcs_storage_path"] == str(folder / "gcs")
    assert environment["RAY_ADDRESS"] == ""
    assert "RAY_JOB_CONFIG_JSON_ENV_VAR" not in environment
    assert {"--num-cpus=3", "--num-gpus=0", "--include-dashboard=false"} <= set(head._command())


def test_only_what_is_alive_is_taken_over_and_only_that_is_ended(folder: Path) -> None:
    sleeping = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        ours = own(sleeping.pid)
        assert ours is not None
        ports = head_in(folder)._free_ports({})

        def noted(identity: str) -> None:
            state = {"ports": ports, "processes": {"raylet": [[ours.pid, identity]], "gcs": [[2**22 - 1, "gone"]]}}
            (folder / STATE_NAME).write_text(json.dumps(state))

        assert not head_in(folder).adopt(), "nothing is noted"
        noted("of another boot:1")
        stale = head_in(folder)
        assert not stale.adopt()
        stale.end(patience_s=0.0)
        assert sleeping.poll() is None, "a stranger has the pid now"

        noted(ours.identity)
        head = head_in(folder)
        assert head.adopt()
        assert head.missing() == ["gcs"]
        assert head.seen()["raylet"] == {ours.pid}
        head.end(patience_s=5.0)
        assert not ours.is_alive
        assert head.missing() == ["raylet"], "all of it"
    finally:
        sleeping.kill()
        sleeping.wait()


def test_a_start_whose_raylet_has_ended_is_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "gcs").mkdir()  # its logs are of this life, and stay
    raylet = folder / "ray" / "raylet"
    raylet.parent.mkdir()
    raylet.symlink_to(shutil.which("sleep") or "/bin/sleep")
    head = head_in(folder)
    code = f"import subprocess, time; subprocess.run([{str(raylet)!r}, '3']); time.sleep(600)"
    monkeypatch.setattr(head, "_command", lambda: [sys.executable, "-c", code])

    with pytest.raises(PlacementError, match="its raylet ended before it had registered"):
        head.start()

    assert head.missing() == ["raylet"]


def test_a_start_that_fails_says_why_and_a_store_that_keeps_it_from_starting_is_deleted_in_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = head_in(folder)
    code = f"import os, sys; print('store', os.path.exists({str(folder / 'gcs')!r})); sys.exit(3)"
    monkeypatch.setattr(head, "_command", lambda: [sys.executable, "-c", code])
    (folder / "gcs").mkdir()

    for _ in range(STORE_TRIES):
        with pytest.raises(PlacementError, match="ended with 3: store True"):
            head.mend(["raylet"])
    with pytest.raises(PlacementError, match="ended with 3: store False"):
        head.mend(["raylet"])

    assert oct(os.stat(folder).st_mode & 0o777) == "0o700"
