"""`aifactory up` and `aifactory down`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from aifactory.config import Config
from aifactory.errors import ConfigError
from aifactory.supervisor.down import Ended, bring_down
from aifactory.supervisor.supervisor import Supervisor
from aifactory.supervisor.systemd import unit


def run(config: Config, arguments: argparse.Namespace, show: Callable[[Any], None]) -> Ended | list[str] | None:
    """What was asked. `show` prints something at once.

    Raises   ConfigError, StateError, PlacementError.
    """
    if arguments.verb == "down":
        return bring_down(config)
    if arguments.systemd:
        file = arguments.config_file or arguments.config
        if file == "-":
            raise ConfigError("expected a configuration file for a systemd unit, found -; name the file.")
        return unit(config, file, arguments.set, user=arguments.user).splitlines()
    if arguments.user is not None:
        raise ConfigError("expected --user beside --systemd alone, found it alone; leave it out.")
    supervisor = Supervisor(config, ready=lambda url: show({"url": url, "model": config.name}))
    supervisor.run()
    return None
