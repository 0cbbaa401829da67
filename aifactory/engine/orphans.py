"""Orphans: a process that ends others when the one that started it has ended, even by SIGKILL. Run as a script.

Reads    from standard input their ids, a line each, as they come; the end of the input is the end of who wrote there
Linux alone; the standard library alone, so that it is small and there at once.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path


def family(process_id: int) -> list[int]:
    """A process and all that it and its children have started."""
    found = [process_id]
    for children in Path(f"/proc/{process_id}/task").glob("*/children"):
        with suppress(OSError):
            for child in children.read_text(encoding="ascii").split():
                found += family(int(child))
    return found


def main() -> None:
    """Wait for the end, and end them."""
    told = [int(line) for line in sys.stdin]
    for process_id in [member for each in told for member in family(each)]:
        with suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGKILL)


if __name__ == "__main__":
    # What ends a group or a terminal's processes is not for this one: it has a duty after that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    main()
