"""Laws of the systemd unit: systemd understands it, and it starts what was asked for, whatever is in the names."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_factories import small_config

from aifactory.config import Config
from aifactory.supervisor.systemd import notify, unit, unit_name


def config_of(folder: Path, **sections: object) -> Config:
    return Config.model_validate(small_config(folder, **sections))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("name", ["plain.yaml", "with space and $dollar 100%.yaml"])
def test_systemd_finds_nothing_wrong_with_the_unit(name: str, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    file = tmp_path / f"{unit_name(config)}.service"
    file.write_text(unit(config, str(tmp_path / name), ["runtime.endpoint.port=8001"], user="root"), encoding="utf-8")

    done = subprocess.run(
        ["systemd-analyze", "verify", str(file)], capture_output=True, text=True, timeout=60, check=False
    )

    said = [line for line in (done.stdout + done.stderr).splitlines() if file.name in line]
    assert done.returncode == 0, done.stderr
    assert not said


def test_the_unit_waits_longer_than_the_last_answers_take(tmp_path: Path) -> None:
    config = config_of(tmp_path, runtime={"endpoint": {"drain_timeout_s": 500}})

    text = unit(config, "a.yaml", [])

    (stop,) = [line for line in text.splitlines() if line.startswith("TimeoutStopSec=")]
    assert int(stop.partition("=")[2]) > 500


def test_the_command_prints_the_unit_with_the_overrides_and_starts_nothing(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(small_config(tmp_path)), encoding="utf-8")
    command = [sys.executable, "-m", "aifactory", "up", "--systemd", "--config", str(file), "--set", "name=other"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    assert f"up --config {file} --set name=other" in done.stdout
    assert "Description=AI factory other" in done.stdout
    assert not (tmp_path / "storage" / "other").exists()


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told_where_it_listens(abstract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"@aifactory-{tmp_path.name}" if abstract else str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(place.replace("@", "\0"))
        monkeypatch.setenv("NOTIFY_SOCKET", place)

        notify("READY=1", "STATUS=all is well")

        assert listening.recv(1000) == b"READY=1\nSTATUS=all is well"
