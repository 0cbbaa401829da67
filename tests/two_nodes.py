"""`python two_nodes.py PORT`: a cluster of two simulated nodes of one CPU each, with a job server on PORT, until SIGTERM."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": int(sys.argv[1])}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    print("ready", flush=True)
    signal.sigwait([signal.SIGTERM])
    cluster.shutdown()
