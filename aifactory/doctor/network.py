"""Checks of the network: which ports of Ray, of Serve and of the factory other machines can reach.

Source   Linux' /proc/net/tcp and tcp6, and whose sockets they are by /proc/<pid>/fd.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from aifactory.doctor.check import Check, ok, wrong

_LISTENS = "0A"
_ANY6 = "::"
_KNOWN = {
    6379: "Ray's GCS",
    8265: "Ray's dashboard",
    8000: "the endpoint",
    8404: "HAProxy's statistics",
    9101: "HAProxy's metrics",
    10001: "Ray's client server",
    52365: "Ray's dashboard agent",
}
"""Ports that these take where nobody says otherwise."""
_OURS = re.compile(r"\b(ray|raylet|gcs_server|dashboard|haproxy|aifactory|ray::\S*)\b")
_WHAT = (
    ("gcs_server", "Ray's GCS"),
    ("raylet", "Ray's raylet"),
    ("haproxy", "the endpoint (HAProxy)"),
    ("DashboardAgent", "Ray's agents (metrics, jobs)"),
    ("dashboard/agent", "Ray's agents (metrics, jobs)"),
    ("RuntimeEnvAgent", "Ray's agents (metrics, jobs)"),
    ("runtime_env/agent", "Ray's agents (metrics, jobs)"),
    ("dashboard", "Ray's dashboard"),
    ("client.server", "Ray's client server"),
)
_PROXY = "ProxyActor"
_WORKERS = "Ray's workers and drivers"
_SHOWN_PORTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """A socket that takes connections."""

    address: str
    port: int
    pid: int | None = None
    """None where it is another user's."""
    command: str = ""

    @property
    def is_loopback(self) -> bool:
        found = ipaddress.ip_address(self.address)
        mapped = getattr(found, "ipv4_mapped", None)
        return bool((mapped or found).is_loopback)

    @property
    def what(self) -> str | None:
        """What of the factory's it is; None: nothing of it."""
        if self.command:
            if _PROXY in self.command and self.address != _ANY6:  # where each of Ray's processes takes its calls
                return "the endpoint (Serve's proxy)"
            named = next((name for part, name in _WHAT if part in self.command), None)
            return named or (_WORKERS if _OURS.search(self.command) else None)
        return _KNOWN.get(self.port)


def listening(net: Path = Path("/proc/net"), processes: Path = Path("/proc")) -> list[Listening]:
    """All sockets that take connections here."""
    found: list[tuple[str, int, str]] = []
    for name in ("tcp", "tcp6"):
        try:
            lines = (net / name).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTENS:
                address, _, port = fields[1].partition(":")
                found.append((_address(address), int(port, 16), fields[9]))
    owners = _owners({inode for *_, inode in found}, processes)
    return [
        Listening(
            address=address, port=port, pid=owners.get(inode, (None, ""))[0], command=owners.get(inode, (None, ""))[1]
        )
        for address, port, inode in sorted(found)
    ]


def checks(sockets: Sequence[Listening]) -> Iterator[Check]:
    """A warning for each of those whose ports are open to others, with all its ports; one line where there is none."""
    open_: dict[str, list[Listening]] = {}
    for socket in sockets:
        if not socket.is_loopback and socket.what is not None:
            open_.setdefault(socket.what, []).append(socket)
    for what, theirs in open_.items():
        shown = ", ".join(f"{each.address} port {each.port}" for each in theirs[:_SHOWN_PORTS])
        more = f" and {len(theirs) - _SHOWN_PORTS} more" if len(theirs) > _SHOWN_PORTS else ""
        yield wrong(
            "open port" if len(theirs) == 1 else f"{len(theirs)} open ports",
            f"{what}: {shown}{more}",
            expected="127.0.0.1, or a network that only the cluster reaches",
            remedy=_remedy(what),
        )
    if not open_:
        yield ok("open ports", "none of Ray, Serve and the factory beyond loopback")


def endpoint_check(host: str, port: int, sockets: Sequence[Listening]) -> Check:
    """Whether the endpoint can have its port."""
    place = f"{host}:{port}"
    if port == 0:
        return ok("endpoint port", "a free one is taken")
    taken = next((each for each in sockets if each.port == port and _meet(each.address, host)), None)
    if taken is None:
        return ok("endpoint port", f"{place} is free")
    if taken.what is not None and taken.command and "endpoint" in taken.what:
        return ok("endpoint port", f"{place} is served by {taken.what}, process {taken.pid}")
    by = taken.command[:60] or "another user's process"
    return wrong(
        "endpoint port",
        f"{place} is taken by {by}" + ("" if taken.pid is None else f", process {taken.pid}"),
        expected="a free port",
        remedy="End that process, or set runtime.endpoint.port to another one.",
        is_error=True,
    )


def host_check(host: str) -> Check:
    """Whether the endpoint is to be reached by other machines."""
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if is_loopback:
        return ok("endpoint host", f"{host}: this machine alone reaches it")
    return wrong(
        "endpoint host",
        f"{host}: other machines reach it, without TLS",
        expected="127.0.0.1, with a proxy before it that ends TLS",
        remedy="Set runtime.endpoint.host: 127.0.0.1 and put a proxy with TLS in front, or keep others out by a firewall.",
    )


def _remedy(what: str) -> str:
    if "dashboard" in what:
        return "ray start --dashboard-host=127.0.0.1, and RAY_AUTH_MODE=token."
    if "endpoint" in what:
        return "runtime.endpoint.host: 127.0.0.1, and a proxy with TLS in front."
    if "HAProxy" in what or "haproxy" in what:
        return "Keep others out by a firewall: the program binds every interface."
    # Ray 2.60 puts the machine's address in the place of 127.0.0.1 where it is given that (services.resolve_ip_for_localhost).
    return "Ray binds it on every interface, whatever it is told: keep others out by a firewall, and set RAY_AUTH_MODE=token."


def _meet(one: str, other: str) -> bool:
    """Whether sockets at two addresses can't both have a port."""
    if other == "localhost":
        other = "127.0.0.1"
    everywhere = {"0.0.0.0", "::"}
    return one == other or one in everywhere or other in everywhere


def _address(text: str) -> str:
    """The kernel writes 32-bit words as the machine has them."""
    words = [bytes.fromhex(text[at : at + 8])[::-1] for at in range(0, len(text), 8)]
    return str(ipaddress.ip_address(b"".join(words)))


def _owners(inodes: set[str], processes: Path) -> dict[str, tuple[int, str]]:
    """Process and command by the inode of a socket; of what this user may see."""
    found: dict[str, tuple[int, str]] = {}
    for process in processes.glob("[0-9]*"):
        try:
            files = list((process / "fd").iterdir())
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # another user's, or it has ended
            continue
        for file in files:
            try:
                inode = os.readlink(file).removeprefix("socket:[").removesuffix("]")
            except OSError:  # it is closed by now, as that is by which the folder was listed
                continue
            if inode in inodes:
                found[inode] = (int(process.name), command)
    return found
