"""`python losing_a_node.py CONFIG`: tokenize over two simulated nodes, of which one is lost as soon as parts are made."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from aifactory import Factory

if __name__ == "__main__":
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    lost = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address
    done = threading.Event()

    def lose() -> None:
        parts = Path(factory.books.storage.path("parts"))
        while len(list(parts.glob("*/*/part.json"))) < 3 and not done.is_set():
            time.sleep(0.02)
        if not done.is_set():
            cluster.remove_node(lost, allow_graceful=False)
            print("lost a node", flush=True)

    try:
        with Factory.from_yaml(sys.argv[1]) as factory:
            thread = threading.Thread(target=lose)
            thread.start()
            factory.tokenize()
            done.set()
            thread.join()
            import ray

            ray.shutdown()
    finally:
        cluster.shutdown()
