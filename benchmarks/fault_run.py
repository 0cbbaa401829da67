"""One training run on a Ray of its own, in which workers or nodes are lost; tells how soon it went on.

    python fault_run.py TASK RUNTIME [--nodes N] [--kill worker|freeze|node --at STEP...] [--returns at-once|later]

TASK is a pickled `Work` over a local storage root, RUNTIME a JSON file with the section `runtime`. With --nodes the run is
on so many simulated nodes of one CPU, whose first can't be lost. As soon as the checkpoint of STEP or a later one is
committed, a worker, chosen by --seed, or the last node is killed with SIGKILL, or the worker frozen with SIGSTOP.
--returns: another node takes its place, at once or when the run goes on. The last line on standard output is JSON:
first_step_s   from `fit()` to the first step
back_s         of each kill, from SIGKILL to the next finished step
killed_after   of each kill, the newest checkpoint then
exported       what the run exported
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from aifactory.cluster.session import connect, disconnect
from aifactory.config import Runtime
from aifactory.train.checkpoint import Checkpoints
from aifactory.train.run_log import PROGRESS
from aifactory.train.trainer import train_on_ray
from aifactory.train.work import Work

WORKER = "RayTrainWorker"
_LOOK_S = 0.02
_LAST_WORDS_S = 2.0
"""What workers say for so long after one of them was killed may still be about a step before."""
# With these, which `ray start` reads, a node that is silent is given up in about 3 s; Ray 2.60: 15 s and more.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


class Killer:
    """Watches a run from outside and kills what it is told to."""

    def __init__(self, task: Work, arguments: argparse.Namespace, cluster: Any) -> None:
        self.task, self.arguments, self.cluster = task, arguments, cluster
        self.progress = Path(task.storage.path(*task.run_folder, PROGRESS))
        self.random = random.Random(arguments.seed)
        self.first_step_s: float | None = None
        self.back_s: list[float | None] = []
        self.killed_after: list[int] = []
        self.ended = threading.Event()

    def run(self) -> None:
        began = time.monotonic()
        if not self.wait_for(lambda: self.told() is not None):
            return
        self.first_step_s = time.monotonic() - began
        checkpoints = Checkpoints(self.task.storage, *self.task.run_folder)
        for at in self.arguments.at or []:
            if not self.wait_for(lambda least=at: max(checkpoints.committed(), default=0) >= least):  # type: ignore[misc]
                return
            self.killed_after.append(max(checkpoints.committed()))
            self.back_s.append(None)
            killed = time.monotonic()
            self.kill()
            if self.arguments.returns == "at-once":
                self.cluster.add_node(num_cpus=1)
            time.sleep(_LAST_WORDS_S)
            before = self.told()
            if not self.wait_for(lambda old=before: self.told() != old):  # type: ignore[misc]
                return
            self.back_s[-1] = time.monotonic() - killed
            if self.arguments.returns:
                self.cluster.add_node(num_cpus=1)

    def kill(self) -> None:
        if self.arguments.kill == "node":
            node = self.cluster.list_all_nodes()[-1]
            self.cluster.remove_node(node, allow_graceful=False)
            return
        freezes = self.arguments.kill == "freeze"
        os.kill(self.random.choice(sorted(workers())), signal.SIGSTOP if freezes else signal.SIGKILL)

    def wait_for(self, condition: Any) -> bool:
        while not condition():
            if self.ended.wait(_LOOK_S):
                return False
        return True

    def told(self) -> bytes | None:
        """What the run said last of a step; None before the first."""
        try:
            return self.progress.read_bytes()
        except FileNotFoundError:
            return None


def workers() -> list[int]:
    """The processes of the training workers of this run's Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if WORKER in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task", type=Path)
    parser.add_argument("runtime", type=Path)
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--kill", choices=["worker", "freeze", "node"], default="worker")
    parser.add_argument("--at", type=int, nargs="*")
    parser.add_argument("--returns", choices=["at-once", "later"])
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    task = pickle.loads(arguments.task.read_bytes())
    cluster = None
    if arguments.nodes:
        from ray.cluster_utils import Cluster

        os.environ.update(HEALTH)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        for _ in range(arguments.nodes - 1):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        os.environ["RAY_ADDRESS"] = cluster.address
    connect("faults")
    killer = Killer(task, arguments, cluster)
    runtime = Runtime.model_validate_json(arguments.runtime.read_text(encoding="utf-8"))
    # Nodes can be added by the main thread alone.
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train_on_ray, task, name=task.run_folder[-1], runtime=runtime)
        training.add_done_callback(lambda _: killer.ended.set())
        try:
            killer.run()
            exported = training.result()
        finally:
            disconnect()
            if cluster is not None:
                cluster.shutdown()
    found = {"first_step_s": killer.first_step_s, "back_s": killer.back_s, "killed_after": killer.killed_after}
    print(json.dumps({**found, "exported": exported}))


if __name__ == "__main__":
    main()
