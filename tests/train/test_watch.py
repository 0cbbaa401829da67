"""Laws of the watch: who takes no step ends, and who does is left alone."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import ctypes, sys, time
from aifactory.train.watch import HangWatch

def hang_with_the_lock_of_the_interpreter():
    ctypes.PyDLL(None).usleep(30_000_000)

with HangWatch(1.0) as alive:
    for _ in range({steps}):
        alive()
        time.sleep(0.3)
    if {hangs}:
        hang_with_the_lock_of_the_interpreter()
time.sleep({afterwards})
print("ended by itself")
"""


def run(**values):
    script = SCRIPT.format(**values)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)


def test_a_worker_that_hangs_in_a_library_ends_and_says_where_it_stood():
    done = run(steps=2, hangs=True, afterwards=0)

    assert done.returncode == 1
    assert "hang_with_the_lock_of_the_interpreter" in done.stderr
    assert done.stdout == ""


def test_a_worker_that_takes_steps_is_left_alone_and_so_is_one_that_has_ended():
    done = run(steps=6, hangs=False, afterwards=1.5)

    assert (done.returncode, done.stdout) == (0, "ended by itself\n"), done.stderr
