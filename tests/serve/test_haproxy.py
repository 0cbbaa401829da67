"""Laws of HAProxy before the replicas: no port but the endpoint's, no error outside the envelope, and the same answers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from aifactory.config.runtime import Endpoint
from aifactory.errors import PlacementError
from aifactory.serve import haproxy
from aifactory.serve.app import _environment

CONFIG = """\
global
    log 127.0.0.1:514 local0 info
    stats socket {folder}/admin.sock mode 666 level admin expose-fd listeners
    maxconn 64
defaults
    mode http
    timeout client 5s
    timeout connect 5s
    timeout server 5s
    errorfile 502 {folder}/500.http
    errorfile 503 {folder}/500.http
    errorfile 504 {folder}/500.http
    balance leastconn
frontend prometheus
    bind :9101
    http-request use-service prometheus-exporter if {{ path /metrics }}
frontend http_frontend
    bind *:8000
    log {folder}/requests.sock len 8192 format rfc5424 local1 debug
    default_backend replicas
backend replicas
    server one 127.0.0.1:30000
listen stats
  bind *:8404
  stats enable
"""


@pytest.fixture
def amended(tmp_path: Path) -> list[str]:
    return haproxy.amended(CONFIG.format(folder=tmp_path), tmp_path).splitlines()


def test_only_the_port_of_the_endpoint_is_bound(amended, tmp_path):
    bound = [line.split()[1] for line in amended if line.split()[0] == "bind"]

    assert bound == [f"unix@{tmp_path}/metrics.sock", "*:8000", f"unix@{tmp_path}/stats.sock"]


def test_requests_are_told_to_serve_and_to_no_syslog(amended, tmp_path):
    assert [line.split()[1] for line in amended if line.split()[0] == "log"] == [f"{tmp_path}/requests.sock"]


def test_what_was_amended_stays_as_it_is(amended, tmp_path):
    assert haproxy.amended("\n".join(amended) + "\n", tmp_path).splitlines() == amended


def test_the_template_of_serve_has_the_sections_that_are_amended():
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    sections = {line.strip() for line in HAPROXY_CONFIG_TEMPLATE.splitlines() if line[:1].strip()}

    assert haproxy._FIGURES.keys() <= sections
    assert "errorfile 502" in HAPROXY_CONFIG_TEMPLATE


def test_the_program_becomes_haproxy_with_the_configuration_that_we_want(tmp_path):
    found = haproxy.programs()
    assert found is not None, "ray[serve] brings HAProxy and aifactory its program"
    config = tmp_path / "haproxy.cfg"
    config.write_text(CONFIG.format(folder=tmp_path))

    done = subprocess.run(
        [sys.executable, "-m", "aifactory.serve.haproxy", "-c", "-f", str(config)],
        env={**os.environ, "AIFACTORY_HAPROXY": str(found[1])},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert config.read_text() == haproxy.amended(CONFIG.format(folder=tmp_path), tmp_path)
    # Whoever reaches the socket of its administration could send requests elsewhere.
    assert tmp_path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("status", "code"), [(502, "replica_lost"), (503, None), (504, None)])
def test_an_error_of_haproxy_is_in_the_envelope(status, code, tmp_path):
    haproxy.write_errors(tmp_path)

    head, _, body = (tmp_path / f"{status}.http").read_bytes().partition(b"\r\n\r\n")

    lines = head.decode().split("\r\n")
    assert lines[0].startswith(f"HTTP/1.1 {status} ")
    assert f"Content-Length: {len(body)}" in lines
    error = json.loads(body)["error"]
    assert (error["type"], error["code"], error["param"]) == ("server_error", code, None)
    assert error["message"].endswith(("again.", "moment."))


def test_without_haproxy_auto_takes_serves_proxy_and_haproxy_is_an_error(monkeypatch):
    monkeypatch.setattr(haproxy, "programs", lambda: None)

    assert "RAY_SERVE_ENABLE_HA_PROXY" not in _environment(Endpoint(ingress="auto"))
    with pytest.raises(PlacementError, match="expected HAProxy and aifactory-haproxy"):
        _environment(Endpoint(ingress="haproxy"))


def test_no_path_of_a_socket_is_too_long_for_haproxy(monkeypatch, tmp_path):
    for folder in (tmp_path, Path("/" + 90 * "d")):
        monkeypatch.setattr("tempfile.gettempdir", lambda folder=folder: str(folder))
        for name in haproxy._SOCKETS:
            assert len(str(haproxy.new_folder() / ("f" * 56) / name)) <= 97


def test_two_clusters_on_a_machine_share_no_socket():
    one, other = _environment(Endpoint(ingress="haproxy")), _environment(Endpoint(ingress="haproxy"))

    name = "RAY_SERVE_HAPROXY_SOCKET_PATH"
    assert one[name] != other[name]
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in _environment(Endpoint(ingress="serve"))


def test_what_clusters_that_are_gone_left_is_swept_and_nothing_else():
    # A socket's path is short.
    with tempfile.TemporaryDirectory(prefix="s") as name:
        root = Path(name)
        folders = {each: root / f"aif-{each}" / "node" for each in ("mine", "held", "gone", "young")}
        other = root / "other"
        listening = {}
        for each, folder in {**folders, "other": other}.items():
            folder.mkdir(parents=True)
            (folder / "503.http").write_text("")
            listening[each] = socket.socket(socket.AF_UNIX)
            listening[each].bind(str(folder / "admin.sock"))
            listening[each].listen()
            if each != "held":
                listening[each].close()
            if each != "young":
                for path in (folder, folder.parent, *folder.iterdir()):
                    os.utime(path, (1.0, 1.0))
        haproxy.sweep(folders["mine"].parent)
        assert sorted(path.name for path in root.iterdir()) == ["aif-held", "aif-mine", "aif-young", "other"]
        listening["held"].close()
        haproxy.sweep(folders["mine"].parent)
        assert not folders["held"].parent.exists()
