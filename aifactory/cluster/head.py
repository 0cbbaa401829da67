"""Head: a Ray head of the factory's own on this machine, whose processes are known one by one.

Its state is in Ray's embedded store (RocksDB), so that a GCS that is started again on the same folder knows what runs, and a whole
head what was served. Which processes are its own, and on which ports, stands in its folder: another process can take it over, and
end it, without touching anybody else's.

Ray itself starts nothing of a head again. What dies is started here:
    gcs, monitor, log_monitor, dashboard, client    by the command that it had
    raylet                                          with it all actors and workers of this machine go, so all of the head
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import psutil

from aifactory.cluster.processes import OwnProcess, end, own, running, writes_below
from aifactory.cluster.session import ENVIRONMENT, app_name
from aifactory.config.head import Head as HeadOptions
from aifactory.errors import ConfigError, PlacementError
from aifactory.observe.events import log_event

STATE_NAME = "head.json"
LONGEST_FOLDER = 38
"""Linux takes 107 characters; below the folder Ray has ray/session_DATE_TIME_MICROSECONDS_PID/sockets/plasma_store, up to 69."""
_START_S = 300.0
_PATIENCE_S = 5.0
"""How long a process of the head may take to end when it is asked to."""
_POLL_S = 0.1
_LOOK_S = 1.0
_PORTS = (
    "port",
    "ray-client-server-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "metrics-export-port",
)
STORE_TRIES = 3
"""After so many starts that failed the store is taken for the reason, and deleted: all that must survive is in the books."""
_FATAL = ("raylet",)
"""Parts that can't be started alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadState:
    """What must be known to take a head over."""

    ports: Mapping[str, int]
    processes: Mapping[str, Sequence[tuple[int, str]]]
    """By part: pid and identity."""


def default_folder(root: str) -> Path:
    """Where the head of a factory lies, by its storage root."""
    return Path("~/.aifactory").expanduser() / sha256(root.encode()).hexdigest()[:8]


class Head:
    """The head of one factory. Whoever holds it may start it, look after it and end it."""

    def __init__(self, options: HeadOptions, *, factory: str, root: str) -> None:
        """`root`: the factory's storage root, which tells its head from others'."""
        self._options = options
        self._factory = factory
        self.folder = default_folder(root) if options.folder is None else Path(options.folder).expanduser().absolute()
        if len(str(self.folder)) > LONGEST_FOLDER:
            raise ConfigError(
                f"expected a folder of at most {LONGEST_FOLDER} characters for Ray's head, found {self.folder}, of "
                f"{len(str(self.folder))}: Ray's sockets below it would have longer names than the system takes. Set "
                "runtime.head.folder to a shorter one."
            )
        self._ports: dict[str, int] = {}
        self._parts: dict[str, list[OwnProcess]] = {}
        self._commands: dict[str, tuple[Sequence[str], Mapping[str, str]]] = {}
        self._workers: set[OwnProcess] = set()
        self._failed_starts = 0

    # ── where it is ───────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def address(self) -> str:
        """What `RAY_ADDRESS` must say to join it."""
        return f"{self._options.host}:{self._ports['port']}"

    def environment(self) -> dict[str, str]:
        """The environment of a driver that joins it."""
        joined = {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": self._options.auth}
        if self._options.auth == "token":
            joined["RAY_AUTH_TOKEN_PATH"] = str(self._token())
        return joined

    # ── start and end ─────────────────────────────────────────────────────────────────────────────────────────────────

    def adopt(self) -> bool:
        """Take over what runs already; False where all of it is gone. What is missing of it `missing` tells."""
        state = self._read()
        if state is None:
            return False
        self._ports = dict(state.ports)
        parts = {part: [OwnProcess(pid, identity) for pid, identity in each] for part, each in state.processes.items()}
        if not any(process.is_alive for each in parts.values() for process in each):
            return False
        self._parts = parts
        self._learn_commands()
        return True

    def start(self, *, give_up: Callable[[], bool] = lambda: False) -> None:
        """Start all of it, on the store that is there; what is left of one before is ended.

        give_up   asked meanwhile: whether nobody wants it any more
        Raises    PlacementError where Ray does not start.
        """
        self.end(patience_s=0.0)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.chmod(self.folder, 0o700)
        if not (self.folder / "gcs").exists():  # a new life: the logs of the one before it go
            shutil.rmtree(self.folder / "ray", ignore_errors=True)
        state = self._read()
        self._ports = self._free_ports({} if state is None else state.ports)
        log = self.folder / "head.log"
        with open(log, "wb") as stream:
            starting = subprocess.Popen(
                self._command(), env=self._starting_environment(), stdout=stream, stderr=stream, start_new_session=True
            )
        deadline, look_at = time.monotonic() + _START_S, time.monotonic()
        had_raylet = is_in_vain = False
        while starting.poll() is None and time.monotonic() < deadline and not is_in_vain and not give_up():
            time.sleep(_POLL_S)
            if time.monotonic() >= look_at:
                # A raylet ends itself where its agents are slow, and `ray start` waits on for it without looking.
                has_raylet = "raylet" in self._found()
                is_in_vain, had_raylet = had_raylet and not has_raylet, has_raylet
                look_at = time.monotonic() + _LOOK_S
        ended = starting.poll()
        if ended is None:
            starting.kill()
            starting.wait()
        self._parts = self._found()
        if ended != 0 and ({"gcs", "raylet"} - set(self._parts) or give_up()):
            self.end(patience_s=0.0)
            if give_up():
                return
            why = "its raylet ended before it had registered" if is_in_vain else f"`ray start` ended with {ended}"
            said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise PlacementError(f"expected a Ray head on {self._options.host}, found that {why}: {said}")
        if ended != 0:
            # Ray 2.60 gives a node 30 s to register, and leaves what it has started. On a busy machine it takes longer.
            log_event("warned", of="Ray's node takes longer to register than `ray start` waits; it is waited for")
        self._learn_commands()
        self._write()

    def missing(self) -> list[str]:
        """Parts of which a process is gone; the raylet stands for all of them where none is there."""
        if not self._parts:
            return ["raylet"]
        return sorted(part for part, each in self._parts.items() if not all(process.is_alive for process in each))

    def mend(self, missing: Sequence[str], *, give_up: Callable[[], bool] = lambda: False) -> list[str]:
        """Start what is missing; the parts that were started, which is all of them where one can't be started alone."""
        if any(part in _FATAL or part not in self._commands for part in missing):
            if self._failed_starts >= STORE_TRIES:
                log_event(
                    "warned", of=f"the head does not start on its store in {self.folder / 'gcs'}: that is deleted"
                )
                self.forget()
            self._failed_starts += 1
            self.start(give_up=give_up)
            self._failed_starts = 0
            return sorted(self._parts)
        for part in missing:
            command, environment = self._commands[part]
            with open(self.folder / f"{part}.log", "ab") as log:
                started = subprocess.Popen(
                    list(command), env=dict(environment), stdout=log, stderr=log, start_new_session=True
                )
            process = own(started.pid)
            # One that ends at once is missing again at the next look.
            self._parts[part] = [process or OwnProcess(started.pid, "")]
        self._write()
        return list(missing)

    def end(self, *, patience_s: float = _PATIENCE_S) -> None:
        """End all of its processes, and the workers that they leave; nobody else's."""
        # The raylet first: it takes its workers and agents along.
        parts = self._parts or self._recorded()
        for part in sorted(parts, key=lambda part: part != "raylet"):
            end(parts[part], patience_s=patience_s)
        left = [process for process, _ in self._members()]
        end([*self._workers, *left], patience_s=0.0)
        self._parts, self._workers = {}, set()

    def forget(self) -> None:
        """Delete its store, which is worth nothing once it has come down, and its ports; logs stay until it is started again."""
        self.forget_store()
        (self.folder / STATE_NAME).unlink(missing_ok=True)

    def forget_store(self) -> None:
        """Delete its store alone: it is started anew where nodes and drivers look for it, and knows nothing of what was served."""
        shutil.rmtree(self.folder / "gcs", ignore_errors=True)

    # ── what runs in it ───────────────────────────────────────────────────────────────────────────────────────────────

    def seen(self) -> dict[str, frozenset[int]]:
        """By part the processes of it that run: its own, and those of what is served."""
        found = {part: frozenset(p.pid for p in each if p.is_alive) for part, each in self._parts.items()}
        raylets = self._parts.get("raylet", ())
        served: dict[str, set[int]] = {}
        workers = set()
        for process, command, above in running():
            if not any(raylet in above for raylet in raylets):
                continue
            workers.add(process)
            part = self._served_part(" ".join(command))
            if part is not None:
                served.setdefault(part, set()).add(process.pid)
        if workers:
            self._workers = workers
        return {**found, **{part: frozenset(pids) for part, pids in served.items()}}

    def _served_part(self, command: str) -> str | None:
        names = {
            f"ServeReplica:{app_name(self._factory)}:replica": "replica",
            f"ServeReplica:{app_name(self._factory)}:front": "front",
            "ray::ProxyActor": "proxy",
            "ray::ServeController": "controller",
            "ray::Evaluator": "evaluator",
        }
        return next((part for name, part in names.items() if name in command), None)

    # ── how ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _command(self) -> list[str]:
        options = self._options
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--disable-usage-stats"]
        command += [f"--node-ip-address={options.host}", f"--temp-dir={self.folder / 'ray'}"]
        command += [f"--{name}={self._ports[name]}" for name in _PORTS]
        command += [f"--include-dashboard={str(options.dashboard).lower()}", f"--dashboard-host={options.host}"]
        command += [f"--dashboard-port={self._ports['dashboard-port']}"]
        command += [f"--num-cpus={options.cpus}"] if options.cpus is not None else []
        command += [f"--num-gpus={options.gpus}"] if options.gpus is not None else []
        return command

    def _starting_environment(self) -> dict[str, str]:
        # Nothing of a cluster that this process may belong to.
        others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        ours = {**ENVIRONMENT, "RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(self.folder / "gcs")}
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
        return {**ours, **others, **self.environment(), "RAY_ADDRESS": "", "PATH": path}

    def _token(self) -> Path:
        file = self.folder / "token"
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as stream:
                stream.write(secrets.token_hex(32))
        return file

    def _free_ports(self, before: Mapping[str, int]) -> dict[str, int]:
        """Those of before where nobody else has them, so that nodes and drivers find the head again; else free ones."""
        ports: dict[str, int] = {}
        for name in (*_PORTS, "dashboard-port"):
            asked = self._options.port if name == "port" else 0
            wanted = asked or before.get(name, 0)
            ports[name] = _free_port(self._options.host, wanted if asked or _is_free(self._options.host, wanted) else 0)
        return ports

    def _members(self) -> list[tuple[OwnProcess, Sequence[str]]]:
        """Ray's processes whose sessions lie in the folder."""
        place = self.folder / "ray"
        return [
            (process, command)
            for process, command, _ in running()
            # Not all of them name the session; what they log lies below it.
            if part_of(command) is not None
            and (any(f"{place}/" in f"{word}/" for word in command) or writes_below(process, place))
        ]

    def _found(self) -> dict[str, list[OwnProcess]]:
        """The head's own processes; not the workers, nor agents, which the raylet starts and does not outlive."""
        parts: dict[str, list[OwnProcess]] = {}
        for process, command in self._members():
            part = part_of(command)
            if part is not None and part != "worker":
                parts.setdefault(part, []).append(process)
        return parts

    def _learn_commands(self) -> None:
        """How each was started, for the time when it is gone. Not written down: an environment may hold secrets."""
        self._commands = {}
        for part, processes in self._parts.items():
            if part in _FATAL or len(processes) != 1:
                continue
            try:
                process = psutil.Process(processes[0].pid)
                self._commands[part] = process.cmdline(), process.environ()
            except psutil.Error:
                continue

    def _recorded(self) -> dict[str, list[OwnProcess]]:
        state = self._read()
        if state is None:
            return {}
        return {part: [OwnProcess(pid, identity) for pid, identity in each] for part, each in state.processes.items()}

    def _read(self) -> HeadState | None:
        try:
            return HeadState(**json.loads((self.folder / STATE_NAME).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def _write(self) -> None:
        processes = {part: [(p.pid, p.identity) for p in each] for part, each in self._parts.items()}
        text = json.dumps(asdict(HeadState(ports=self._ports, processes=processes)), indent=1)
        partial = self.folder / f".{STATE_NAME}"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.folder / STATE_NAME)


def part_of(command: Sequence[str]) -> str | None:
    """Which part of a head a command line is of; None for what is no part of Ray.

    By what is run, never by what is only named: whoever reads a log of the head is no part of it.
    """
    if not command:
        return None
    if command[0].startswith("ray::"):
        return "worker"
    program = Path(command[0]).name
    if program in ("gcs_server", "raylet"):
        return {"gcs_server": "gcs", "raylet": "raylet"}[program]
    if not program.startswith("python"):
        return None
    # An interpreter's flags come before what it runs.
    rest = command[1:]
    while rest and rest[0] == "-u":
        rest = rest[1:]
    run = rest[1] if rest[:1] == ["-m"] and len(rest) > 1 else (rest[0] if rest else "")
    names = {
        "ray/_private/log_monitor.py": "log_monitor",
        "ray/autoscaler/_private/monitor.py": "monitor",
        "ray/autoscaler/v2/monitor.py": "monitor",
        "ray/dashboard/dashboard.py": "dashboard",
        "ray.util.client.server": "client",
        "ray/dashboard/agent.py": "worker",
        "ray/_private/runtime_env/agent/main.py": "worker",
        "ray/_private/workers/default_worker.py": "worker",
        "ray/_private/workers/setup_worker.py": "worker",
    }
    return next((part for name, part in names.items() if run == name or run.endswith(f"/{name}")), None)


def _is_free(host: str, port: int) -> bool:
    if not port:
        return False
    with socket.socket() as probe:
        # As Ray's own servers do: connections of one that was killed a moment ago do not keep it.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def _free_port(host: str, wanted: int) -> int:
    if wanted:
        return wanted
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
