"""The attendant: a process in the cluster that sees to it that the release is served and the evaluation actor lives.

`python -m aifactory.supervisor.attendant attend|end`, with the configuration as JSON in its first line of standard input. It is no
part of what it attends to: killed, nothing is lost, and another takes its place. Ray ends it when the head dies.

Input    `stop`: end what is attended, after its last answers, and then yourself; end of file: go, and leave all as it is
Output   a line of JSON whenever something has changed: {"url"} once it is served, {"problem"} as long as it is not
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import redirect_stdout
from typing import TextIO

from aifactory.cluster.session import join
from aifactory.config import Config
from aifactory.errors import AIFactoryError, PlacementError
from aifactory.factory import Factory
from aifactory.observe.events import log_event, log_to_stderr
from aifactory.supervisor.backoff import Backoff

STOP = "stop"
_LOOK_S = 1.0
_PATIENCE_S = 180.0
"""How long Serve may take by itself to have an application again that it knows of."""


def main() -> int:
    """The program."""
    log_to_stderr()
    verb = sys.argv[1]
    config = Config.model_validate_json(sys.stdin.readline())
    # Ray prints what it likes to standard output.
    told = sys.stdout
    with redirect_stdout(sys.stderr):
        try:
            return attend(config, told) if verb == "attend" else end(config, told)
        except AIFactoryError as error:
            tell(told, problem=str(error))
            print(f"aifactory: {error}", file=sys.stderr)
            return 1


def attend(config: Config, told: TextIO) -> int:
    """Until somebody says stop, or goes away."""
    stopping = _asked_to_stop()
    join(config.name)
    with Factory(config) as factory:
        attention = Attention(factory)
        # After the head was started again Serve is at what it knew of; to serve it now would start it all a second time.
        while attention.is_being_healed(time.monotonic()) and not stopping.wait(_LOOK_S):
            pass
        if not stopping.is_set():
            url = factory.serve().url
            factory.improve()
            tell(told, url=url)
        while not stopping.wait(_LOOK_S):
            problem = attention.look(time.monotonic())
            if problem is not None:
                tell(told, problem=problem)
        end_all(factory)
    return 0


class Attention:
    """Looks whether the endpoint and the evaluation actor are there, and starts again what is not."""

    def __init__(self, factory: Factory) -> None:
        self._factory = factory
        self._unwell_since: float | None = None
        self._backoff = Backoff()

    def is_being_healed(self, now: float) -> bool:
        """Whether Serve has the application, though not running, and need not be helped yet."""
        found = self._found(now)
        return found != "RUNNING" and not self._is_lost(found, now)

    def look(self, now: float) -> str | None:
        """What is wrong and was done, if anything is."""
        from aifactory.improve.evaluator import is_there

        name = self._factory.config.name
        found = self._found(now)
        if found == "RUNNING":
            if not is_there(name):
                log_event("restarting", part="evaluator")
                self._factory.improve()
                return "the evaluation actor was gone, and was started again"
            return None
        if not self._is_lost(found, now) or self._backoff.wait_s(now) > 0:
            return None
        self._backoff.started(now)
        log_event("restarting", part="endpoint", found=str(found))
        self._factory.serve()
        return f"the endpoint was {found or 'not there'}, and was served again"

    def _found(self, now: float) -> str | None:
        """Serve's word for how the application is."""
        from aifactory.serve.app import status

        found = status(self._factory.config.name)
        if found == "RUNNING":
            self._unwell_since = None
        elif self._unwell_since is None:
            self._unwell_since = now
        return found

    def _is_lost(self, found: str | None, now: float) -> bool:
        """Of one that does not run. Serve heals what it knows of: to serve it again meanwhile would take away what still answers."""
        assert self._unwell_since is not None
        return found is None or found == "DEPLOY_FAILED" or now - self._unwell_since > _PATIENCE_S


def end(config: Config, told: TextIO) -> int:
    """End what is attended in this cluster, whoever has started it; says whether there was anything."""
    from aifactory.cluster.jobs import stop_jobs
    from aifactory.improve.evaluator import is_there
    from aifactory.serve.app import status

    try:
        join(config.name)
    except PlacementError:
        tell(told, ended=False)
        return 0
    with Factory(config) as factory:
        was_there = status(config.name) is not None or is_there(config.name)
        end_all(factory)
    jobs = stop_jobs(config.name)
    for job in jobs:
        log_event("stopped", job=job)
    tell(told, ended=was_there or bool(jobs))
    return 0


def end_all(factory: Factory) -> None:
    """The evaluation actor first, so that no cycle begins any more; then the endpoint, after its last answers."""
    from aifactory.improve.evaluator import stop as stop_evaluator
    from aifactory.serve.app import stop as stop_serving

    name = factory.config.name
    stop_evaluator(name)
    stop_serving(name, drain_timeout_s=factory.config.runtime.endpoint.drain_timeout_s)


def tell(told: TextIO, **values: object) -> None:
    """Say something to whoever started this process."""
    try:
        print(json.dumps(values), file=told, flush=True)
    except BrokenPipeError:
        os._exit(0)


def _asked_to_stop() -> threading.Event:
    """Set when somebody says so. When whoever started us is gone we go, whatever we wait for: nothing is lost by that."""
    asked = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            if line.strip() == STOP:
                asked.set()
                return
        os._exit(0)

    threading.Thread(target=listen, name="supervisor", daemon=True).start()
    return asked


if __name__ == "__main__":
    sys.exit(main())
