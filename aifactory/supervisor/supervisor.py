"""Supervisor: the head, the endpoint, the evaluation actor and the page come up, stay up, and come down in order.

    supervisor ─┬─ head        gcs, raylet, monitor, log_monitor, client, dashboard: started again here, see `cluster/head.py`
                ├─ attendant   has the release served and the evaluation actor live in the cluster; started again here
                ├─ page        the factory's page; started again here
                └─ watches     controller, proxy, fronts, replicas, evaluator: Ray and Serve start them again; and the endpoint itself

It is connected to nothing, so nothing takes it along; it holds nothing, so it may be killed: what runs goes on, and the next `up`
takes it over. Everything that dies and comes back is a line of the journal, with the time it took.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from aifactory import __version__
from aifactory.cluster.head import STORE_TRIES, Head
from aifactory.cluster.processes import own
from aifactory.config import Config
from aifactory.errors import PlacementError, StateError
from aifactory.observe.events import log_event
from aifactory.records.books import Books
from aifactory.supervisor.backoff import Backoff
from aifactory.supervisor.notices import Notices, clock
from aifactory.supervisor.program import Program, end_recorded
from aifactory.supervisor.systemd import notify
from aifactory.supervisor.watch import PartWatch, Wanted

UP_NAME = "up.json"
"""Who the supervisor is, and its programs: for `down`, and for the next `up`."""
_LOCK_NAME = "up.lock"
_LOOK_S = 1.0
_PROBE_S = 3.0
_END_S = 60.0
"""How long the attendant may take to end what it attends to, beyond the draining."""
_PATIENCE_S = 5.0
ENDPOINT = "endpoint"


class Supervisor:
    """`aifactory up` of one factory."""

    def __init__(self, config: Config, *, ready: Callable[[str], None] = lambda _: None) -> None:
        """`ready` is called with the endpoint's address, once, when it answers."""
        self._ready = ready
        self._books = Books(config)
        self._config = self._books.resolved_config()
        self.head = head_of(self._books)
        # A cluster that somebody else looks after is joined, and no head is started.
        self._joined = os.environ.get("RAY_ADDRESS")
        self._programs = [self._attendant(), self._page()]
        self._backoffs: dict[str, Backoff] = {}
        self._stopping = threading.Event()
        self._watch = PartWatch(self._wanted())
        self._url: str | None = None
        self._was_ready = False
        self._notices: Notices | None = None
        self._configured = sha256(f"{__version__} {self._config.model_dump_json()}".encode()).hexdigest()
        """What would be served, by version and configuration."""
        self._served: str | None = None
        """The same of what is served, or was by a head that died."""

    # ── the whole of it ───────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        """Until somebody says stop (SIGTERM, SIGINT, `stop`); asked again it waits for no answers any more.

        Raises   StateError without a release in production, or where another supervisor looks after the factory;
                 PlacementError where the head does not start at all.
        """
        if self._books.registry.production() is None:
            raise StateError(
                f"expected a release of the factory {self._config.name} in production, found none; run a cycle first: "
                "aifactory run CONFIG."
            )
        with self._alone():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._asked_to_stop)
            notices = self._notices = Notices(self._books)
            try:
                self._begin(notices)
                while not self._stopping.wait(_LOOK_S):
                    self._look(notices)
                notify("STOPPING=1")
                self._end()
                notices.audit("down", {"by": "up"})
            finally:
                # Where something unforeseen ends the watch, what runs goes on, and the next `up` takes it over.
                notices.close()
                self._books.close()

    def stop(self) -> None:
        """Come down."""
        self._stopping.set()

    def _asked_to_stop(self, *_: object) -> None:
        if self._stopping.is_set():
            log_event("stopping", at="once, without a wait for answers")
            for program in self._programs:
                program.end(patience_s=0.0)
        self._stopping.set()

    # ── begin ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, notices: Notices) -> None:
        folder = self.head.folder
        self._served = read_up(folder).get("served")
        left = end_recorded(folder / UP_NAME, patience_s=_PATIENCE_S)
        adopted = False
        if self._joined is None:
            adopted = self.head.adopt()
            if not adopted:
                log_event("starting", part="head", folder=folder)
                self._renew_store()
                self._start_head()
            elif self._served not in (None, self._configured):
                log_event(
                    "warned",
                    of="what runs was started with another configuration or version, and goes on with that; to take the "
                    "new one bring it down (aifactory down CONFIG) and up again",
                )
        notices.audit("up", {"head": self._joined or self.head.address, "took_over": adopted, "ended": left})
        self._note()

    def _renew_store(self) -> None:
        """Before a head is started on its store: Serve would start again what that knows, be it what is wanted no more."""
        if self._served not in (None, self._configured):
            log_event("warned", of="the configuration or version is a new one; the head is started on a new store")
            self.head.forget_store()
        self._served = self._configured

    def _start_head(self) -> None:
        """Start it, on the store of one that has died with all else; one that a store keeps from starting does so without."""
        for tries_left in reversed(range(STORE_TRIES + 1)):
            try:
                self.head.mend(["raylet"], give_up=self._stopping.is_set)
                return
            except PlacementError as error:
                if not tries_left:
                    raise
                log_event("part_unwell", part="head", problem=str(error))

    def _look(self, notices: Notices) -> None:
        """What is lost is said before it is started again, so that its time is counted from then."""
        for notice in self._watch.look(clock(), self._seen()):
            notices.say(notice)
        self._keep_head(notices)
        self._keep_programs(notices)
        lost = self._watch.lost
        notify(f"STATUS={'all is well' if not lost else 'not there: ' + ', '.join(lost)}")
        if not self._was_ready and self._url is not None and not lost:
            self._was_ready = True
            notify("READY=1", f"MAINPID={os.getpid()}")
            self._ready(self._url)

    def _seen(self) -> dict[str, frozenset[int]]:
        """By part the processes that there are; of the endpoint 0, where it answers."""
        seen = {} if self._joined is not None else self.head.seen()
        for program in self._programs:
            seen[program.name] = _pids(program)
        seen[ENDPOINT] = frozenset([0] if self._url is not None and _answers(self._url) else [])
        return seen

    # ── keep ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _keep_head(self, notices: Notices) -> None:
        missing = [] if self._joined is not None else self.head.missing()
        if not missing or self._must_wait("head"):
            return
        because = f"{', '.join(missing)} died"
        if "raylet" in missing:
            attendant, page = self._programs
            # A driver does not always notice that its head is gone, and waits for it.
            attendant.end(patience_s=0.0)
            # What of the head still runs ends now with it, and is away from now on: all of it is started again.
            for notice in self._watch.look(clock(), {page.name: _pids(page)}):
                notices.say(notice)
            self._renew_store()
        try:
            for part in self.head.mend(missing, give_up=self._stopping.is_set):
                notices.restarted(part, because=because)
        except PlacementError as error:
            notices.problem("head", str(error))
        self._note()

    def _keep_programs(self, notices: Notices) -> None:
        attendant, *_ = self._programs
        for program in self._programs:
            # Without a head the attendant has nothing to join.
            is_early = program is attendant and self._joined is None and bool(self.head.missing())
            if is_early or program.process is not None or self._must_wait(program.name):
                continue
            if program.status is not None:
                notices.restarted(program.name, because=f"it ended with {program.status}")
            program.start(self._environment())
            self._note()

    def _must_wait(self, part: str) -> bool:
        """Whether a part that died must not be started yet; else it counts as started now."""
        backoff = self._backoffs.setdefault(part, Backoff())
        now = clock()
        if backoff.wait_s(now) > 0:
            return True
        backoff.started(now)
        return False

    # ── end ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _end(self) -> None:
        """The endpoint after its last answers, then the page, then the head."""
        log_event("stopping", factory=self._config.name)
        attendant, *others = self._programs
        if attendant.process is not None:
            attendant.say("stop")
            attendant.wait(self._config.runtime.endpoint.drain_timeout_s + _END_S)
        for program in (attendant, *others):
            program.end(patience_s=_PATIENCE_S)
        if self._joined is None:
            self.head.end()
            self.head.forget()
        (self.head.folder / UP_NAME).unlink(missing_ok=True)

    # ── how ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _attendant(self) -> Program:
        command = [sys.executable, "-m", "aifactory.supervisor.attendant", "attend"]
        return Program("attendant", command, first_line=self._config.model_dump_json(), hear=self._hear)

    def _page(self) -> Program:
        command = [sys.executable, "-m", "aifactory.page.attended"]
        return Program("page", command, first_line=self._config.model_dump_json(), hear=self._hear)

    def _hear(self, said: Mapping[str, Any]) -> None:
        if "page" in said:
            log_event("page_served", url=said["page"])
        if "url" in said:
            self._url = str(said["url"])
        if "problem" in said:
            assert self._notices is not None
            self._notices.problem(ENDPOINT, str(said["problem"]))

    def _environment(self) -> dict[str, str]:
        joined = {} if self._joined is not None else self.head.environment()
        return {**os.environ, **joined}

    def _wanted(self) -> dict[str, Wanted]:
        endpoint = self._config.runtime.endpoint
        wanted = {program.name: Wanted(number=1) for program in self._programs} | {ENDPOINT: Wanted(number=1)}
        if self._joined is not None:  # its processes may be on other machines
            return wanted
        may_shrink = endpoint.most_replicas > endpoint.least_replicas
        served = {
            "replica": Wanted(number=endpoint.least_replicas, may_shrink=may_shrink),
            "proxy": Wanted(number=1),
            "controller": Wanted(number=1),
            "evaluator": Wanted(number=1),
        }
        if endpoint.mode == "resilient":
            served["front"] = Wanted(number=endpoint.fronts)
        head = [
            "gcs",
            "raylet",
            "monitor",
            "log_monitor",
            *(["dashboard"] if self._config.runtime.head.dashboard else []),
        ]
        return {**{part: Wanted(number=1) for part in head}, **wanted, **served}

    def _note(self) -> None:
        """Write down who we are, for whoever comes after us."""
        processes = {program.name: program.process for program in self._programs}
        me = own(os.getpid())
        assert me is not None
        noted = {
            "supervisor": [me.pid, me.identity],
            "served": self._served or self._configured,
            "programs": {name: [one.pid, one.identity] for name, one in processes.items() if one is not None},
        }
        partial = self.head.folder / f".{UP_NAME}"
        partial.write_text(json.dumps(noted, indent=1), encoding="utf-8")
        os.replace(partial, self.head.folder / UP_NAME)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One supervisor at a time. The lock goes with the process that has it, however that ends."""
        self.head.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(self.head.folder / _LOCK_NAME, "w", encoding="ascii") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StateError(
                    f"expected that nobody else looks after the factory {self._config.name}, found another `aifactory up` "
                    f"that does ({self.head.folder / UP_NAME}); end it with `aifactory down CONFIG` first."
                ) from error
            yield


def head_of(books: Books) -> Head:
    """The factory's own head, whether it runs or not."""
    return Head(books.config.runtime.head, factory=books.config.name, root=books.storage.root)


def read_up(folder: Path) -> Mapping[str, Any]:
    """What the supervisor has noted; empty where there is none."""
    try:
        found = json.loads((folder / UP_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _pids(program: Program) -> frozenset[int]:
    process = program.process
    return frozenset([] if process is None else [process.pid])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=_PROBE_S) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False
