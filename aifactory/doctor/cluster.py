"""Checks of the cluster: whether strangers are kept out, whether there is room, and whether its clocks agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from aifactory.cluster.placement import (
    Resources,
    asked_for_data,
    asked_for_serving,
    asked_for_training,
    require_placement,
)
from aifactory.doctor.check import Check, ok, wrong
from aifactory.doctor.factory import clock_check
from aifactory.doctor.network import Listening
from aifactory.errors import PlacementError

if TYPE_CHECKING:
    from aifactory.config import Config


def authentication_check(environment: Mapping[str, str], sockets: Sequence[Listening]) -> Check:
    """Whether a cluster asks who comes."""
    mode = environment.get("RAY_AUTH_MODE", "")
    running = [each for each in sockets if each.what is not None and each.command and "Ray" in each.what]
    address = environment.get("RAY_ADDRESS")
    if mode == "token":
        return ok("RAY_AUTH_MODE", "token")
    if not address and all(each.is_loopback for each in running):
        return ok("RAY_AUTH_MODE", f"{mode or 'not set'}, and no cluster that others reach")
    return wrong(
        "RAY_AUTH_MODE",
        mode or "not set",
        expected="token, for a cluster that other machines reach: whoever reaches it runs code on it",
        remedy="export RAY_AUTH_MODE=token before ray start on every node, and share ~/.ray/auth_token; traffic is not encrypted.",
    )


def room_checks(config: Config, nodes: Sequence[Resources]) -> Iterator[Check]:
    """Whether what will run at the same time has its place."""
    serving = asked_for_serving(config)
    for name, asked in (("training", asked_for_training(config)), ("data", asked_for_data(config))):
        try:
            require_placement([*serving, *asked], nodes)
        except PlacementError as error:
            yield wrong(
                f"room for {name}",
                str(error),
                expected="a place for it beside the endpoint's replicas",
                remedy="Ask for less (runtime.workers, cpus_per_worker, endpoint.replicas), or add nodes.",
                is_error=True,
            )
        else:
            yield ok(f"room for {name}", "it fits, beside the endpoint's replicas")


def node_checks(clocks: Mapping[str, float]) -> Iterator[Check]:
    """`clocks`: by node, seconds by which its clock is ahead of this machine's."""
    for node, offset_s in clocks.items():
        yield clock_check(f"node {node}", offset_s)
