"""What a person sees while it works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aifactory.observe.events import Timer, timed


def run(code: str) -> subprocess.CompletedProcess[str]:
    head = "from aifactory.observe.events import *\nfrom aifactory.observe.progress import *\nlog_to_stderr()\n"
    return subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, check=True, timeout=60)


def test_without_a_terminal_there_is_no_bar_and_standard_output_stays_free() -> None:
    done = run("with progress('train', total=3) as shown:\n    for i in range(4): shown.update(i, loss=1.5)")
    assert done.stdout == ""
    assert done.stderr == ""


def test_events_are_one_line_each_on_standard_error_whatever_their_values() -> None:
    done = run(
        r"log_to_stderr(); log_event('trained', rows=3, loss=1.23456789, error='a b\nc', path='x', none='', nl='a\nb')"
    )
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.partition(" ")[2] == r"trained rows=3 loss=1.235 error='a b\nc' path=x none='' nl='a\nb'"


def test_a_timer_runs_until_it_is_stopped() -> None:
    timer = Timer()
    assert timer.seconds <= timer.seconds
    timer.stop()
    assert timer.seconds == timer.seconds


def test_a_block_that_fails_is_timed_too() -> None:
    with pytest.raises(KeyError), timed() as timer:
        raise KeyError
    assert timer.seconds == timer.seconds > 0


def test_lines_tell_what_is_left_and_who_says_so() -> None:
    # The clock is handed a step of eleven seconds each time it is asked, so that a line is due at each.
    done = run(
        "import aifactory.observe.progress as p\nfrom itertools import count\n"
        "clock = count(0, 11)\np.time = type('T', (), {'monotonic': staticmethod(lambda: next(clock))})\n"
        "with progress('train', total=100) as shown:\n"
        "    for i in (40, 50, 60): shown.update(i, loss=1.5, energy='12 J (estimate)')"
    )
    lines = [line.partition(" ")[2] for line in done.stderr.splitlines()]
    assert lines == [
        "train done=40/100 loss=1.5 energy='12 J (estimate)'",
        "train done=50/100 loss=1.5 energy='12 J (estimate)' left_s=55",
        "train done=60/100 loss=1.5 energy='12 J (estimate)' left_s=44",
    ]


def test_on_a_terminal_runs_side_by_side_have_a_bar_each_and_leave_nothing_behind(tmp_path: Path) -> None:
    code = (
        "import sys, threading, time\nfrom aifactory.observe.progress import progress\n"
        "both = threading.Barrier(2)\n"
        "def show(name):\n"
        "    with progress(name, total=4) as shown:\n"
        "        both.wait()\n"
        "        for i in range(5): shown.update(i, loss=2.5, energy='7 J (rapl)'); time.sleep(0.2)\n"
        "        both.wait()\n"
        "threads = [threading.Thread(target=show, args=(n,)) for n in ('first', 'second')]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
    )
    script = tmp_path / "bars.py"
    script.write_text(code)
    seen = on_a_terminal([sys.executable, str(script)])

    for word in ("first", "second", "4/4", "loss=2.5 energy=7 J (rapl)"):
        assert word in seen, seen
    assert "Traceback" not in seen


def on_a_terminal(command: list[str]) -> str:
    """What a program writes to a terminal of 160 columns."""
    leader, follower = os.openpty()
    environment = os.environ | {"COLUMNS": "160", "TERM": "xterm"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=follower, stdin=follower, env=environment)
    os.close(follower)
    seen = b""
    while True:
        try:
            data = os.read(leader, 65536)
        except OSError:  # the other end was closed
            break
        if not data:
            break
        seen += data
    process.wait(timeout=60)
    os.close(leader)
    return seen.decode(errors="replace")
