"""`python two_nodes.py CONFIG REPORT`: the whole loop over two simulated nodes of one CPU each; writes the report as JSON.

The port of the nodes' agents is taken, as where two clusters share a machine: there is a job server that can start no job.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

from aifactory import Factory
from aifactory.observe.events import log_to_stderr

if __name__ == "__main__":
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    import ray
    from ray.cluster_utils import Cluster

    log_to_stderr()
    taken = socket.create_server(("", 0))
    port = taken.getsockname()[1]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "dashboard_agent_listen_port": port})
    cluster.add_node(num_cpus=1, dashboard_agent_listen_port=port)
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        with Factory.from_yaml(sys.argv[1]) as factory:
            report = factory.run()
            nodes = [node for node in ray.nodes() if node["Alive"]]
            # Not to standard output, where Ray prints warnings.
            Path(sys.argv[2]).write_text(json.dumps({"nodes": len(nodes), "report": report.to_json()}))
    finally:
        ray.shutdown()
        cluster.shutdown()
