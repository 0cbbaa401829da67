"""Placement: whether the cluster can hold what will run at the same time. Asked before, never found out by waiting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aifactory.config import Config
from aifactory.errors import PlacementError

Resources = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """So many of a kind, each with these resources."""

    what: str
    number: int
    each: Resources


def asked_for_training(config: Config) -> list[Asked]:
    """What a training run asks for."""
    runtime = config.runtime
    each = {"CPU": runtime.cpus_per_worker, "GPU": runtime.gpus_per_worker}
    return [Asked(what="training workers (runtime.workers)", number=runtime.least_workers, each=each)]


def asked_for_data(config: Config) -> list[Asked]:
    """What a data task asks for; more than one at once is a wish, one is a need."""
    return [Asked(what="data task (runtime.cpus_per_worker)", number=1, each={"CPU": config.runtime.cpus_per_worker})]


def asked_for_serving(config: Config, *, most: bool = False) -> list[Asked]:
    """What the endpoint asks for: at the start, or at most."""
    endpoint = config.runtime.endpoint
    each = {"CPU": endpoint.cpus_per_replica, "GPU": endpoint.gpus_per_replica}
    number = endpoint.most_replicas if most else endpoint.least_replicas
    return [Asked(what="replicas (runtime.endpoint.replicas)", number=number, each=each)]


def require_placement(asked: Sequence[Asked], nodes: Sequence[Resources]) -> None:
    """Raise PlacementError unless all that is asked for fits on the nodes at once (largest first, first fit)."""
    free = [dict(node) for node in nodes]
    units = [(unit.each, unit.what) for unit in asked for _ in range(unit.number)]
    for each, what in sorted(units, key=lambda unit: (-unit[0].get("GPU", 0), -unit[0].get("CPU", 0))):
        place = next((node for node in free if _fits(each, node)), None)
        if place is None:
            wanted = "; ".join(f"{unit.number} {unit.what} of {_form(unit.each)} each" for unit in asked)
            there = "; ".join(_form(node) for node in nodes) or "no node"
            raise PlacementError(
                f"expected room beside one another for {wanted}; found nodes with {there}, where no place is left for "
                f"one of the {what}. Ask for less, for example with --set runtime.cpus_per_worker=0.5, or add nodes."
            )
        for name, amount in each.items():
            place[name] = place.get(name, 0) - amount


def number_fitting(asked: Sequence[Asked], nodes: Sequence[Resources], *, beside: Sequence[Asked], most: int) -> int:
    """How often all of `asked` fits on the nodes at once, beside what is there in any case: at least 1, at most `most`."""
    for number in range(most, 1, -1):
        try:
            require_placement([*beside, *(each for _ in range(number) for each in asked)], nodes)
        except PlacementError:
            continue
        return number
    return 1


def cluster_nodes() -> list[Resources]:
    """CPUs and GPUs of every living node, in all."""
    import ray

    return [
        {name: node["Resources"].get(name, 0.0) for name in ("CPU", "GPU")} for node in ray.nodes() if node["Alive"]
    ]


def cluster_hosts() -> set[str]:
    """The names of the machines of the cluster."""
    import ray

    return {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}


def require_shared_state(config_hosts: set[str], *, sqlite: bool, local_storage: bool) -> None:
    """Raise PlacementError where state lies on one machine's disk and the cluster has several."""
    if len(config_hosts) > 1 and sqlite:
        raise PlacementError(
            "expected a database that all machines of the cluster can write to, found SQLite, a file of one machine, "
            f"and the machines {sorted(config_hosts)}. Set runtime.state_url to a PostgreSQL URL."
        )
    if len(config_hosts) > 1 and local_storage:
        from aifactory.observe.events import log_event

        log_event("warned", of="runtime.storage is a local path: it must be mounted on all machines of the cluster")


def _fits(each: Resources, node: Resources) -> bool:
    return all(node.get(name, 0) + 1e-9 >= amount for name, amount in each.items())


def _form(resources: Resources) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items() if amount or name == "CPU")
