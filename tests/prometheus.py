"""Prometheus for tests: Debian's, on loopback and a free port, over endpoints that the test serves.

    from prometheus import prometheus_programs  # in a conftest.py, or where it is used

Where there is none such tests are skipped, or fail if AIFACTORY_REQUIRE_PROMETHEUS=1.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

INSTALL = "apt-get update && apt-get install -y --no-install-recommends prometheus"
_WORDS = {"by", "without", "on", "ignoring", "unless", "and", "or", "bool", "offset", "group_left", "group_right"}


@dataclass(frozen=True, slots=True)
class Programs:
    """Where they lie."""

    server: str
    tool: str


@pytest.fixture(scope="session")
def prometheus_programs() -> Programs:
    """Prometheus and promtool."""
    server, tool = shutil.which("prometheus"), shutil.which("promtool")
    if server is None or tool is None:
        reason = f"expected prometheus and promtool on PATH, found not both; install Debian's package: {INSTALL}"
        if os.environ.get("AIFACTORY_REQUIRE_PROMETHEUS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return Programs(server, tool)


class Prometheus:
    """One that runs."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, **values: str) -> Any:
        """What its API answers. Raises AssertionError with its words where it does not understand."""
        try:
            with urllib.request.urlopen(
                f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(values)}", timeout=10
            ) as found:
                return json.load(found)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{values}: {error.read().decode()}") from error

    def query(self, expression: str) -> list[Any]:
        found: list[Any] = self.ask("query", query=expression)["result"]
        return found

    def names(self) -> set[str]:
        """Of all series that it has."""
        return set(self.ask("label/__name__/values"))

    def unknown(self, expression: str) -> set[str]:
        """Names in an expression that it has no series of."""
        return metric_names(expression) - self.names()


def metric_names(expression: str) -> set[str]:
    """The names of metrics in an expression: its words, but for those of the language, labels and functions."""
    plain = re.sub(r'"(?:[^"\\]|\\.)*"', "", expression)
    plain = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", plain)
    plain = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", "", plain)
    found = re.finditer(r"[A-Za-z_:][A-Za-z0-9_:]*(?!\w*\s*\()", plain)
    return {match[0] for match in found if match[0] not in _WORDS and match[0] not in _aggregations(plain)}


def _aggregations(plain: str) -> set[str]:
    # What stands before a bracket, also where `by (…)` stood between, is a function or an aggregation.
    return {match[1] for match in re.finditer(r"([A-Za-z_]\w*)\s*\(", plain)}


@contextmanager
def prometheus(
    programs: Programs, folder: Path, targets: Sequence[str], *, rules: Path | None = None
) -> Iterator[Prometheus]:
    """One that scrapes `targets` (host:port) every half second."""
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [] if rules is None else [str(rules)],
        "scrape_configs": [{"job_name": "test", "static_configs": [{"targets": list(targets)}]}],
    }
    file, log = folder / "prometheus.yml", folder / "prometheus.log"
    file.write_text(yaml.safe_dump(config))
    port = free_port()
    with log.open("w") as told:
        process = subprocess.Popen(
            [
                programs.server,
                f"--config.file={file}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=told,
            stderr=told,
        )
    try:
        server = Prometheus(f"http://127.0.0.1:{port}")
        until(lambda: _is_ready(server.url), log)
        until(lambda: len(server.query("up == 1")) == len(targets), log)
        yield server
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def scraped(text: Callable[[], str]) -> Iterator[str]:
    """An endpoint that shows what `text` says; its host and port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = text().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def until(happened: Callable[[], bool], log: Path, *, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=2) as found:
            return bool(found.status == 200)
    except OSError:
        return False
