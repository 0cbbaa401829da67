"""The page as a program of somebody who looks after it: it is told its configuration, says where it is, and goes when that one is gone.

In       the configuration as JSON, a line on standard input; that it ends says that whoever started this is gone
Out      {"page": URL} on standard output, a line, once it listens
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

from aifactory.config import Config
from aifactory.errors import AIFactoryError
from aifactory.observe.events import log_to_stderr
from aifactory.page.command import PageAddress, serve


def main() -> int:
    """Serve until asked to end; the exit status, as the command's."""
    log_to_stderr()
    config = Config.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_go_with_whoever_started, name="attended", daemon=True).start()
    try:
        serve(config, _tell)
    except AIFactoryError as error:
        print(f"aifactory page: {error}", file=sys.stderr)
        return 1
    return 0


def _tell(address: PageAddress) -> None:
    print(json.dumps({"page": address.url}), flush=True)


def _go_with_whoever_started() -> None:
    while sys.stdin.readline():
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
