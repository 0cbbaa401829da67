"""Laws of `aifactory page`: it serves from the books alone, and refuses what would let strangers in."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml
from made_books import MadeBooks

from aifactory.page.access import TOKEN_VARIABLE

TOKEN = "a-token-that-is-long-enough"


@pytest.fixture
def config(made: MadeBooks, tmp_path: Path) -> str:
    file = tmp_path / "config.yaml"
    plain = made.books.config.model_dump(mode="json", exclude_defaults=True)
    file.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return str(file)


def start(config: str, *overrides: str, token: str | None = None) -> subprocess.Popen[str]:
    given = [word for each in overrides for word in ("--set", each)]
    environment = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
    # Neither is there to be loaded: not even a serving page knows them.
    code = (
        "import sys; sys.modules['ray'] = sys.modules['torch'] = None; from aifactory.cli import main; sys.exit(main())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "page", "--config", config, *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | ({} if token is None else {TOKEN_VARIABLE: token}),
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_says_where_it_is_serves_without_ray_and_ends_when_asked(config: str, number: signal.Signals) -> None:
    process = start(config, "runtime.page.port=0")
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.split()[3]
        assert url.startswith("http://127.0.0.1:"), line
        assert httpx.get(f"{url}healthz").text == "ok\n"
        assert json.loads(httpx.get(f"{url}data/loop").text)["production"] == "made-r2"
        assert "server" not in httpx.get(url).headers
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        assert process.returncode in (0, 130, -number), errors
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.wait()


def test_another_interface_is_refused_without_a_key_or_a_token(config: str) -> None:
    process = start(config, "runtime.page.host=0.0.0.0", "runtime.page.port=0")
    said, errors = process.communicate(timeout=60)

    assert process.returncode == 2
    assert said == ""
    assert "expected keys or a token" in errors


def test_with_a_token_it_is_served_there_and_asks_for_it(config: str) -> None:
    process = start(config, "runtime.page.host=0.0.0.0", "runtime.page.port=0", token=TOKEN)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.split()[3].replace("0.0.0.0", "127.0.0.1")
        assert "it asks for a key" in line
        assert httpx.get(f"{url}data/loop").status_code == 401
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert httpx.get(f"{url}data/loop", headers=headers).json()["production"] == "made-r2"
    finally:
        process.kill()
        process.communicate()


def test_a_port_that_is_taken_is_said(config: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(config, f"runtime.page.port={taken.getsockname()[1]}")
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "expected to listen at 127.0.0.1" in errors


def test_looked_after_it_is_told_its_configuration_and_goes_with_whoever_started_it(made: MadeBooks) -> None:
    runtime = made.books.config.runtime
    page = runtime.page.model_copy(update={"port": 0})
    config = made.books.config.model_copy(update={"runtime": runtime.model_copy(update={"page": page})})
    process = subprocess.Popen(
        [sys.executable, "-m", "aifactory.page.attended"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(config.model_dump_json() + "\n")
        process.stdin.flush()
        url = json.loads(process.stdout.readline())["page"]
        assert httpx.get(f"{url}healthz").text == "ok\n"
        process.stdin.close()
        process.wait(timeout=30)
    finally:
        process.kill()
        process.wait()
