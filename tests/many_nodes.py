"""`python many_nodes.py NODES REPORT`: simulated nodes of 8 fake GPUs in two racks; gangs are placed, and a rack is lost. Writes JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil

from aifactory.cluster.placement import asked_for_serving, asked_for_training, cluster_nodes, require_placement
from aifactory.config import Config
from aifactory.errors import PlacementError

GPUS = 8
CONFIG = "name: gang\ningest: {sources: [{name: docs, kind: text, path: /data/docs}]}\n"
_LONGEST_S = 120.0
_TRIES = 4
Made = TypeVar("Made")


def patiently(make: Callable[[], Made]) -> Made:
    """What Ray starts. It gives a node 30 s to register, and a node its agents 15, which are too few on a busy machine: then again."""
    for tries_left in reversed(range(_TRIES)):
        before = {child.pid for child in psutil.Process().children()}
        try:
            return make()
        except Exception as error:  # Ray raises no narrower one
            if not tries_left:
                raise
            print(f"started again: {error}", file=sys.stderr)
            # What is left of this try must not register late, beside the next one.
            for child in psutil.Process().children():
                if child.pid not in before:
                    child.kill()
                    child.wait()
    raise AssertionError("the last try returns or raises")


def memory_of_children() -> int:
    """Bytes that the processes started here hold for themselves alone; what they share is not counted."""
    held = 0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            held += child.memory_full_info().uss
    return held


def config_of(least: int, most: int) -> Config:
    overrides = [f"runtime.workers=[{least},{most}]", "runtime.gpus_per_worker=1", "runtime.cpus_per_worker=0.5"]
    # Every number of workers that may be left must be able to share the batch.
    overrides += [
        f"train.global_batch_rows={most}",
        "runtime.endpoint.replicas=2",
        "runtime.endpoint.gpus_per_replica=1",
    ]
    return Config.from_text(CONFIG, origin="gang", overrides=overrides)


def fits(config: Config, *, serving: bool = False) -> str:
    """What the factory says before it starts anything: empty where all fits."""
    asked = [*asked_for_training(config), *(asked_for_serving(config) if serving else [])]
    try:
        require_placement(asked, cluster_nodes())
    except PlacementError as error:
        return str(error)
    return ""


def gang(ray: Any, workers: int, *, wait_s: float) -> Any | None:
    """A placement group as Ray Train asks for one; None where it has no place in time, and is withdrawn."""
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([{"GPU": 1, "CPU": 0.5}] * workers, strategy="PACK")
    if not group.wait(wait_s):
        remove_placement_group(group)
        return None
    return group


def main(nodes: int, report: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster
    from ray.util.placement_group import placement_group_table, remove_placement_group

    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
    racks: dict[str, list[Any]] = {"a": [], "b": []}
    for number in range(nodes):
        rack = "ab"[number % 2]
        wanted: dict[str, Any] = {"num_cpus": 8, "num_gpus": GPUS, "resources": {f"rack-{rack}": 1}}
        node = patiently(lambda wanted=wanted: cluster.add_node(**wanted, object_store_memory=100_000_000))  # type: ignore[misc]
        racks[rack].append(node)
    cluster.wait_for_nodes(timeout=_LONGEST_S)
    ray.init(address=cluster.address, log_to_driver=False)
    found: dict[str, Any] = {"nodes": nodes, "gpus": int(ray.cluster_resources()["GPU"])}
    every = nodes * GPUS
    found["all"] = fits(config_of(every, every))
    found["all_beside_serving"] = fits(config_of(every, every), serving=True)
    found["one_more"] = fits(config_of(every + 1, every + 1))
    whole = gang(ray, every, wait_s=_LONGEST_S)
    assert whole is not None, "the gang has its place"
    bundles = placement_group_table(whole)["bundles_to_node_id"].values()
    found["gang_nodes"] = len(set(bundles))
    found["memory_gb"] = round(memory_of_children() / 1e9, 2)
    # All or none: half of another gang's place is no place, and takes none.
    found["second_gang"] = gang(ray, 2, wait_s=3.0) is not None
    remove_placement_group(whole)
    for node in racks["b"]:
        cluster.remove_node(node)
    deadline = time.monotonic() + _LONGEST_S
    while len([n for n in ray.nodes() if n["Alive"]]) > 1 + len(racks["a"]) and time.monotonic() < deadline:
        time.sleep(0.5)
    found["gpus_left"] = int(sum(node["GPU"] for node in cluster_nodes()))
    found["all_after"] = fits(config_of(every, every))
    found["elastic_after"] = fits(config_of(every // 2, every))
    half = gang(ray, every // 2, wait_s=_LONGEST_S)
    found["half_gang"] = half is not None
    report.write_text(json.dumps(found), encoding="utf-8")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    main(int(sys.argv[1]), Path(sys.argv[2]))
