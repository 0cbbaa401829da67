"""What the doctor finds: each check against what it must find, and against what it may not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from postgres import postgres_server, postgres_url
from small_factories import small_config

from aifactory.config import Config
from aifactory.doctor import cluster, factory, machine, network
from aifactory.doctor.check import Check, Findings, ok, wrong
from aifactory.doctor.network import Listening
from aifactory.records.books import Books
from aifactory.records.storage import Storage

__all__ = ["postgres_server", "postgres_url"]

GIB = 1024**3
FINE = machine.Machine(
    cpus=8,
    memory_bytes=32 * GIB,
    available_bytes=20 * GIB,
    shared_bytes=16 * GIB,
    open_files=65536,
    ray="2.60.0",
    torch_cuda=None,
    has_torch=True,
    driver=None,
    gpus=0,
)


def statuses(checks) -> dict[str, str]:
    return {check.of: check.status for check in checks}


def only(checks, of: str) -> Check:
    (found,) = [check for check in checks if check.of == of]
    return found


# ── the machine ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_wrong_with_a_machine_that_is_fine() -> None:
    assert set(statuses(machine.checks(FINE)).values()) == {"ok"}


@pytest.mark.parametrize(
    ("values", "gpus", "of", "status", "word"),
    [
        ({"shared_bytes": GIB // 16}, 0, "shared memory", "warning", "--shm-size"),
        ({"available_bytes": GIB // 2}, 0, "memory", "warning", "larger machine"),
        ({"open_files": 1024}, 0, "open files", "warning", "ulimit"),
        ({"ray": "2.40.0"}, 0, "Ray", "error", ">=2.60"),
        ({"ray": None}, 0, "Ray", "error", "pip install"),
        ({}, 1, "GPU", "error", "driver"),
        ({"driver": "570.1", "gpus": 1}, 1, "GPU", "error", "torch"),
        ({"torch_cuda": "12.8"}, 0, "GPU", "warning", "no GPU"),
        ({"driver": "570.1", "gpus": 1}, 0, "GPU", "warning", "torch"),
        ({"gpus": 1}, 0, "GPU", "warning", "modprobe"),
        ({"driver": "570.1", "gpus": 1, "torch_cuda": "12.8"}, 1, "GPU", "ok", ""),
    ],
)
def test_what_is_wrong_with_a_machine_is_said_with_its_remedy(values, gpus, of, status, word) -> None:
    found = only(machine.checks(replace(FINE, **values), gpus_asked=gpus), of)
    assert (found.status, word in found.remedy) == (status, True), found


def test_a_small_machine_may_have_little_shared_memory() -> None:
    small = replace(FINE, memory_bytes=2 * GIB, available_bytes=2 * GIB, shared_bytes=GIB)
    assert only(machine.checks(small), "shared memory").status == "ok"


def test_this_machine_is_read_as_torch_and_the_kernel_tell_it() -> None:
    import torch

    found = machine.look()
    assert found.torch_cuda == torch.version.cuda
    assert found.memory_bytes >= found.available_bytes > 0
    assert found.shared_bytes == os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize


def test_a_driver_is_read_out_of_what_the_kernel_says(tmp_path: Path) -> None:
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n")
    assert machine._driver(file) == "570.86.15"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n")
    assert machine._driver(file) == "535.104.05"
    assert machine._driver(tmp_path / "none") is None


# ── the network ───────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def listening_on(host: str):
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as taken:
        taken.bind((host, 0))
        taken.listen()
        yield taken.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_a_socket_is_found_with_its_address_and_its_process(host: str) -> None:
    if ":" in host and not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    try:
        with listening_on(host) as port:
            (found,) = [each for each in network.listening() if each.port == port]
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    assert (found.address, found.pid, found.is_loopback) == (host, os.getpid(), host in ("127.0.0.1", "::1"))


def test_whatever_of_ray_and_serve_others_reach_is_a_warning_with_its_ports() -> None:
    sockets = [
        Listening(address="0.0.0.0", port=8265, pid=1, command="python ray/dashboard/dashboard.py --host=0.0.0.0"),
        Listening(
            address="0.0.0.0", port=6379, pid=2, command="ray/core/src/ray/gcs/gcs_server --gcs_server_port=6379"
        ),
        Listening(address="0.0.0.0", port=8000, pid=3, command="ray::ProxyActor"),
        *(Listening(address="::", port=40000 + n, pid=30 + n, command="ray::ServeReplica:a") for n in range(12)),
        Listening(address="10.0.0.7", port=8404, pid=4, command="haproxy -db -f config"),
        Listening(address="0.0.0.0", port=10001),  # another user's
        Listening(address="127.0.0.1", port=8266, pid=5, command="ray/dashboard/dashboard.py"),
        Listening(address="0.0.0.0", port=22, pid=6, command="/usr/sbin/sshd -D"),
    ]
    found = list(network.checks(sockets))
    assert {check.status for check in found} == {"warning"}
    assert [check.found for check in found] == [
        "Ray's dashboard: 0.0.0.0 port 8265",
        "Ray's GCS: 0.0.0.0 port 6379",
        "the endpoint (Serve's proxy): 0.0.0.0 port 8000",
        "Ray's workers and drivers: " + ", ".join(f":: port {port}" for port in range(40000, 40008)) + " and 4 more",
        "the endpoint (HAProxy): 10.0.0.7 port 8404",
        "Ray's client server: 0.0.0.0 port 10001",
    ]
    assert "--dashboard-host=127.0.0.1" in found[0].remedy


def test_ports_on_loopback_are_one_line() -> None:
    sockets = [Listening(address="127.0.0.1", port=8265, pid=1, command="ray/dashboard/dashboard.py")]
    assert [check.status for check in network.checks(sockets)] == ["ok"]


def test_a_port_that_another_program_has_is_an_error_that_names_it() -> None:
    with listening_on("127.0.0.1") as port:
        found = network.endpoint_check("127.0.0.1", port, network.listening())
    assert found.status == "error" and f"process {os.getpid()}" in found.found
    assert network.endpoint_check("127.0.0.1", port, []).status == "ok"
    assert network.endpoint_check("127.0.0.1", 0, []).status == "ok"
    ours = [Listening(address="127.0.0.1", port=port, pid=3, command="ray::ProxyActor")]
    assert network.endpoint_check("127.0.0.1", port, ours).status == "ok"


def test_an_endpoint_that_others_reach_is_a_warning() -> None:
    assert network.host_check("127.0.0.1").status == network.host_check("localhost").status == "ok"
    assert network.host_check("0.0.0.0").status == network.host_check("gpu7.lab").status == "warning"


# ── the factory ───────────────────────────────────────────────────────────────────────────────────────────────────────

MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
server:/export /mnt/shared\\040data nfs4 rw 0 0
/dev/sdb1 /mnt/shared\\040data/local xfs rw 0 0
"""


def test_the_filesystem_of_a_path_is_that_of_the_nearest_mount() -> None:
    of = {
        path: factory.filesystem_of(Path(path), MOUNTS)
        for path in ("/home", "/mnt/shared data/a", "/mnt/shared data/local/a")
    }
    assert list(of.values()) == ["ext4", "nfs4", "xfs"]
    assert factory.filesystem_of(Path("/mnt/shared database"), MOUNTS) == "ext4"


def test_sqlite_on_a_network_filesystem_is_an_error(tmp_path: Path) -> None:
    mounts = f"/dev/sda1 / ext4 rw 0 0\nserver:/export {tmp_path} nfs4 rw 0 0\n"
    (found,) = factory.database_checks(f"sqlite:///{tmp_path}/state.db", mounts)
    assert found.status == "error" and "nfs4" in found.found and "PostgreSQL" in found.remedy
    (local,) = factory.database_checks(f"sqlite:///{tmp_path}/state.db", "/dev/sda1 / ext4 rw 0 0\n")
    assert local.status == "ok"


def test_a_storage_root_that_can_not_be_written_to_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    (found,) = factory.storage_checks(Storage(str(file / "root")), "")
    assert found.status == "error" and "can't be written to" in found.found


def test_a_storage_root_is_left_as_it_was(tmp_path: Path) -> None:
    for root in (tmp_path / "there", tmp_path / "not there"):
        if root.name == "there":
            root.mkdir()
        before = sorted(tmp_path.rglob("*"))
        assert only(factory.storage_checks(Storage(str(root)), ""), "storage").status == "ok"
        assert sorted(tmp_path.rglob("*")) == before


def test_a_database_that_is_damaged_is_an_error_and_one_that_is_whole_is_not(tmp_path: Path) -> None:
    books = Books(Config.model_validate(small_config(tmp_path)))
    books.journal.write("served")
    url = books.database.url.render_as_string()
    books.close()
    (found,) = factory.database_checks(url, "")
    assert found.status == "ok" and "whole, schema" in found.found
    file = Path(books.database.url.database or "")
    data = bytearray(file.read_bytes())
    data[4096 : 4096 + 8192] = b"x" * 8192
    file.write_bytes(data)
    (found,) = factory.database_checks(url, "")
    assert found.status == "error" and "backup" in found.remedy


def test_postgresql_is_asked_for_its_schema_and_its_time(postgres_url: str) -> None:
    found = list(factory.database_checks(postgres_url, ""))
    assert statuses(found) == {"database": "ok", "clock of the database": "ok"}
    (gone,) = factory.database_checks("postgresql+psycopg://me:secret@127.0.0.1:1/none", "")
    assert gone.status == "error" and "secret" not in gone.found


@pytest.mark.parametrize(("offset_s", "status"), [(0.1, "ok"), (-0.4, "ok"), (3.0, "warning"), (-200.0, "error")])
def test_clocks_that_are_apart_are_told(offset_s: float, status: str) -> None:
    assert factory.clock_check("database", offset_s).status == status
    assert [check.status for check in cluster.node_checks({"10.0.0.2": offset_s})] == [status]


def test_a_package_that_is_asked_for_and_not_there_is_an_error_with_its_extra(monkeypatch, tmp_path: Path) -> None:
    config = Config.model_validate(small_config(tmp_path))
    assert statuses(factory.package_checks(config)) == {"packages": "ok"}
    asked = Config.model_validate(small_config(tmp_path, runtime={"trackers": ["mlflow"], "storage": str(tmp_path)}))
    monkeypatch.setattr(factory, "find_spec", lambda name: None if name == "mlflow" else object())
    (found,) = factory.package_checks(asked)
    assert found.status == "error" and "aifactory[mlflow]" in found.remedy


# ── the cluster ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_cluster_that_others_reach_asks_for_a_token() -> None:
    reached = [Listening(address="0.0.0.0", port=6379, pid=2, command="gcs_server")]
    hidden = [Listening(address="127.0.0.1", port=6379, pid=2, command="gcs_server")]
    of = cluster.authentication_check
    assert of({"RAY_AUTH_MODE": "token"}, reached).status == "ok"
    assert of({}, reached).status == of({"RAY_AUTH_MODE": "disabled"}, reached).status == "warning"
    assert of({"RAY_ADDRESS": "10.0.0.1:6379"}, []).status == "warning"
    assert of({"RAY_AUTH_MODE": "disabled"}, hidden).status == of({}, []).status == "ok"


def test_what_does_not_fit_is_an_error(tmp_path: Path) -> None:
    config = Config.model_validate(small_config(tmp_path))
    assert statuses(cluster.room_checks(config, [{"CPU": 64, "GPU": 0}])) == {
        "room for training": "ok",
        "room for data": "ok",
    }
    assert statuses(cluster.room_checks(config, [{"CPU": 0.05, "GPU": 0}])) == {
        "room for training": "error",
        "room for data": "error",
    }


def test_the_clocks_of_nodes_are_asked(ray_session: None) -> None:
    from aifactory.cluster.nodes import node_clocks

    clocks = node_clocks()
    (offset_s,) = clocks.values()
    assert abs(offset_s) < 5.0  # half of what the answer took, on a busy machine


# ── the command ───────────────────────────────────────────────────────────────────────────────────────────────────────


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aifactory", "doctor", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}, **environment},
    )


def test_the_command_ends_with_1_where_something_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(small_config(tmp_path)))
    before = sorted(tmp_path.rglob("*"))
    done = doctor(str(config), "--json", "--set", "runtime.endpoint.port=0", "--set", "runtime.cpus_per_worker=0.5")
    found = json.loads(done.stdout)
    errors = [check for check in found["checks"] if check["status"] == "error"]
    assert (done.returncode, found["holds"], errors) == (0, True, [])
    assert sorted(tmp_path.rglob("*")) == before
    assert {"CPUs", "shared memory", "GPU", "configuration", "storage", "database", "sources", "RAY_AUTH_MODE"} <= {
        check["of"] for check in found["checks"]
    }

    done = doctor(str(config), "--set", "runtime.workers=5000")
    assert done.returncode == 1
    assert "ERROR" in done.stdout and "room for training" in done.stdout and "do  " in done.stdout


def test_a_configuration_that_is_wrong_is_a_finding_among_others(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("name: demo\ningest: {sources: []}\ntrian: {}\n")
    done = doctor(str(config))
    assert done.returncode == 1
    assert "did you mean 'train'?" in done.stdout and "shared memory" in done.stdout


def test_a_report_says_what_to_do_where_it_is_not_well() -> None:
    findings = Findings(
        checks=[
            ok("a", "1"),
            wrong("b", "2", expected="3", remedy="Do it."),
            wrong("c", "4", expected="5", remedy="Now.", is_error=True),
        ]
    )
    assert not findings.holds
    assert findings.lines()[-1] == "1 error, 1 warning, 1 ok."
    assert [line.split() for line in findings.lines()[1:4]] == [
        ["WARNING", "b", "2"],
        ["expected", "3"],
        ["do", "Do", "it."],
    ]
