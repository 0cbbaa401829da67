"""Laws of `aifactory status`: one screen, colours on a terminal alone, and nothing of a name moves the cursor."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import yaml
from made_books import MadeBooks

from aifactory.page.screen import show

ESCAPE = "\x1b"


def written(made: MadeBooks, folder: Path) -> str:
    file = folder / "config.yaml"
    plain = made.books.config.model_dump(mode="json", exclude_defaults=True)
    file.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return str(file)


def status(*arguments: str) -> str:
    command = [sys.executable, "-m", "aifactory", "status", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_it_says_what_there_is_and_what_happens(made: MadeBooks) -> None:
    out = io.StringIO()
    show(made.books, out)
    text = out.getvalue()

    assert "Cycle 5 trains." in text
    assert re.search(r"◉ +train +step 12 of 40 +████░+ 30%", text)
    assert re.search(r"releases +made-r2 +production +holdout 1\.900 \[1\.800, 2\.000\]", text)
    assert re.search(r"requests +67 in the last hour .*30 by made-r1, 37 by made-r2", text)
    assert "rejected" in text
    assert ESCAPE not in text
    assert len(text.splitlines()) <= 40


def test_what_records_hold_moves_no_cursor(made: MadeBooks) -> None:
    made.books.journal.write("load_failed", subject="made-r2", detail={"reason": f"{ESCAPE}[2Jgone\u202e [red]x[/red]"})
    out = io.StringIO()
    show(made.books, out)

    assert ESCAPE not in out.getvalue()
    assert "⟨U+001B⟩[2Jgone⟨U+202E⟩ [red]x[/red]" in out.getvalue()


def test_an_empty_factory_has_a_screen(tmp_path: Path) -> None:
    out = io.StringIO()
    show(MadeBooks(tmp_path).books, out)
    assert "No release yet" in out.getvalue()


def test_without_a_terminal_the_command_is_plain(made: MadeBooks, tmp_path: Path) -> None:
    text = status(written(made, tmp_path))
    assert ESCAPE not in text
    assert "made-r2" in text


def test_as_json_it_is_the_report(made: MadeBooks, tmp_path: Path) -> None:
    assert json.loads(status(written(made, tmp_path), "--json"))["production"] == "made-r2"


def test_on_a_terminal_it_watches_until_interrupted(made: MadeBooks, tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "aifactory", "status", written(made, tmp_path), "--watch", "--every", "0.2"]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "50"}
    process = subprocess.Popen(command, stdout=follower, stderr=subprocess.DEVNULL, env=environment)
    os.close(follower)
    heard = ""

    def until(wanted: str) -> None:
        nonlocal heard
        deadline = time.monotonic() + 60
        while wanted not in heard:
            assert time.monotonic() < deadline, heard[-2000:]
            if select.select([leader], [], [], 0.1)[0]:
                heard += os.read(leader, 65_536).decode(errors="replace")

    try:
        until("step 12 of 40")
        made.training(31)
        until("step 31 of 40")
        assert f"{ESCAPE}[?1049h" in heard, "the screen is one of its own"
        process.terminate()
        until(f"{ESCAPE}[?1049l")
        assert process.wait(timeout=30) == 130
    finally:
        process.kill()
        process.wait()
        os.close(leader)
