"""A PostgreSQL server for tests: Debian's own binaries, on loopback, gone when pytest ends.

    from postgres import postgres_server, postgres_url  # in a conftest.py

`postgres_url` is the URL of a fresh, empty database. The server is started once in a process, by the first test that
asks, as a user who is not root. Where no server is installed such tests are skipped, or fail if
AIFACTORY_REQUIRE_POSTGRES=1.
"""

from __future__ import annotations

import atexit
import functools
import glob
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

INSTALL = "apt-get update && apt-get install -y --no-install-recommends postgresql"
USER = "aifactory"


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresServer:
    """A server that this process started and stops."""

    port: int
    password: str

    def url(self, database: str) -> str:
        """SQLAlchemy's URL of a database."""
        return f"postgresql+psycopg://{USER}:{self.password}@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str) -> None:
        """Run one statement as the superuser, outside any transaction."""
        where = {"host": "127.0.0.1", "port": self.port, "user": USER, "password": self.password, "dbname": "postgres"}
        with psycopg.connect(**where, autocommit=True) as connection:
            connection.execute(statement)


@pytest.fixture(scope="session")
def postgres_server() -> PostgresServer:
    """The server of this test session."""
    binaries = find_binaries()
    if binaries is None:
        reason = f"expected a PostgreSQL server, found no initdb; install Debian's package postgresql: {INSTALL}"
        if os.environ.get("AIFACTORY_REQUIRE_POSTGRES") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return start_server(binaries)


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a fresh database."""
    name = f"test_{secrets.token_hex(6)}"
    postgres_server.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")
    yield postgres_server.url(name)
    postgres_server.execute(f"DROP DATABASE {name} WITH (FORCE)")


def find_binaries() -> Path | None:
    """The folder that holds initdb and pg_ctl; Debian keeps them out of PATH."""
    candidates = []
    if (config := shutil.which("pg_config")) is not None:
        told = subprocess.run([config, "--bindir"], capture_output=True, text=True, check=False)
        candidates.append(told.stdout.strip())
    candidates += sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)
    candidates += os.environ.get("PATH", "").split(os.pathsep)
    for folder in filter(None, candidates):
        if all(os.access(Path(folder) / name, os.X_OK) for name in ("initdb", "pg_ctl", "postgres")):
            return Path(folder)
    return None


@functools.cache
def start_server(binaries: Path) -> PostgresServer:
    """Start a server in a folder of its own; it is stopped when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="aifactory-postgres-"))
    password = secrets.token_hex(16)
    (folder / "password").write_text(password)
    (folder / "output").touch()
    who = _not_root(folder)
    data = folder / "data"

    def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        # Output goes to a file: a server that inherited a pipe would keep it open.
        with open(folder / "output", "a+") as output:
            done = subprocess.run(
                [str(binaries / program), "-D", str(data), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=folder,
                check=False,
                timeout=60,
                **who,
            )
        return done

    def explained(step: str) -> str:
        return f"expected {step} to succeed, found: {(folder / 'output').read_text()[-2000:]}"

    options = ("--auth=scram-sha-256", f"--username={USER}", f"--pwfile={folder / 'password'}")
    made = run("initdb", *options, "--encoding=UTF8", "--no-locale", "--no-sync")
    assert made.returncode == 0, explained("initdb")
    for _ in range(5):
        port = _free_port()  # another may take it before the server does
        settings = (
            f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder} "
            "-c fsync=off -c full_page_writes=off -c max_connections=60 -c shared_buffers=16MB"
        )
        if run("pg_ctl", "start", "--wait", "-o", settings, "-l", str(folder / "output")).returncode == 0:
            break
    else:
        raise AssertionError(explained("pg_ctl start"))
    starter = os.getpid()

    def stop() -> None:
        if os.getpid() == starter:  # not in a forked child
            run("pg_ctl", "stop", "--wait", "--mode=immediate")
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(stop)
    return PostgresServer(port=port, password=password)


def _not_root(folder: Path) -> dict[str, Any]:
    """Arguments of subprocess.run by which root becomes somebody else, to whom the folder then belongs."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    user = names.get("postgres") or names["nobody"]
    for path in (folder, *folder.iterdir()):
        os.chown(path, user.pw_uid, user.pw_gid)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
