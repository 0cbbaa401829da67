"""systemd: the unit by which a machine starts a factory, and what the supervisor tells systemd while it runs."""

from __future__ import annotations

import getpass
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from aifactory.config import Config

_UNIT = """\
# Written by `aifactory up --systemd`. Install it:
#   sudo cp {name}.service /etc/systemd/system/ && sudo systemctl daemon-reload && sudo systemctl enable --now {name}
[Unit]
Description=AI factory {factory}
After=network-online.target
Wants=network-online.target

[Service]
Type=notify
NotifyAccess=main
User={user}
WorkingDirectory={folder}
# Secrets that the configuration takes from the environment, NAME=value, readable by root alone.
EnvironmentFile=-/etc/aifactory/{name}.env
ExecStart={command}
Restart=on-failure
RestartSec=2
# A supervisor that died is started again and takes over what it had started, which goes on answering meanwhile; asked to stop, it
# ends all of that itself, in order.
KillMode=process
TimeoutStartSec={start_s}
TimeoutStopSec={stop_s}
# What the kernel kills for its memory is started again by the supervisor; it is not the end of the service.
OOMPolicy=continue
LimitNOFILE=65536
NoNewPrivileges=yes
ProtectSystem=full
PrivateDevices={private_devices}

[Install]
WantedBy=multi-user.target
"""
_START_S = 900
_STOP_BEYOND_DRAIN_S = 120


def unit(config: Config, config_file: str, overrides: Sequence[str], *, user: str | None = None) -> str:
    """The text of the unit, for the interpreter and the folder of this process."""
    command = [sys.executable, "-m", "aifactory", "up", "--config", str(Path(config_file).absolute())]
    command += [word for override in overrides for word in ("--set", override)]
    endpoint, head = config.runtime.endpoint, config.runtime.head
    # Without GPUs asked for by name, whether it may see them is left open.
    needs_devices = head.gpus != 0 or endpoint.gpus_per_replica > 0 or config.runtime.gpus_per_worker > 0
    return _UNIT.format(
        name=unit_name(config),
        factory=config.name,
        user=user or getpass.getuser(),
        folder=_escaped(str(Path.cwd())),
        command=" ".join(_quoted(word) for word in command),
        start_s=_START_S,
        stop_s=int(endpoint.drain_timeout_s) + _STOP_BEYOND_DRAIN_S,
        private_devices="no" if needs_devices else "yes",
    )


def unit_name(config: Config) -> str:
    """The unit's name without its ending."""
    return f"aifactory-{config.name}"


def _quoted(word: str) -> str:
    """A word of ExecStart (systemd.service(5), command lines): what it would expand is doubled."""
    escaped = _escaped(word).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{escaped}"' if any(each in escaped for each in " \t'\";\\") else escaped


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def notify(*lines: str) -> None:
    """Tell systemd, where it has started us and waits for it (sd_notify(3)); else nothing happens."""
    place = os.environ.get("NOTIFY_SOCKET")
    if not place:
        return
    # A name with @ is of the abstract namespace.
    address = "\0" + place[1:] if place.startswith("@") else place
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as told, suppress(OSError):
        told.connect(address)
        told.sendall("\n".join(lines).encode())
