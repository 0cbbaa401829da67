"""The nodes of a cluster: their clocks."""

from __future__ import annotations

import time


def node_clocks(*, timeout_s: float = 20.0) -> dict[str, float]:
    """By address of a living node of the connected cluster, seconds by which its clock is ahead of this machine's, to within half of the
    time that the answer took. A node that does not answer in time is left out."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    tell = ray.remote(num_cpus=0, max_retries=0)(_now)
    found: dict[str, float] = {}
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        there = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        try:
            # The first call starts a process there.
            ray.get(tell.options(scheduling_strategy=there).remote(), timeout=timeout_s)
            before = time.time()
            moment = ray.get(tell.options(scheduling_strategy=there).remote(), timeout=timeout_s)
        except ray.exceptions.RayError:
            continue
        found[str(node["NodeManagerAddress"])] = moment - (before + time.time()) / 2
    return found


def _now() -> float:
    return time.time()
