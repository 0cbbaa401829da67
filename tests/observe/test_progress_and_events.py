"""What a person sees while it works."""

from __future__ import annotations

import subprocess
import sys

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
