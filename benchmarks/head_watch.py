"""What a head says of itself, for `served_head.py`: `head_watch.py FACTORY ADDRESS`. A process of its own, connected to the head.

Asked for nothing, it answers what Serve says: by deployment how many replicas run, whether all of the application and the
proxies is well, or {} where it says nothing. Asked for `held`, what requests hold of each replica, by deployment.
"""

from __future__ import annotations

import sys
from typing import Any

import ray
from contenders import serve_lines
from ray import serve

from aifactory.cluster.session import app_name, namespace

_LONGEST_S = 10.0


def main(factory: str, address: str) -> None:
    ray.init(address, namespace=namespace(factory), log_to_driver=False, logging_level="ERROR")
    name = app_name(factory)

    def answer(*, held: bool = False) -> Any:
        try:
            status = serve.status()
            deployments = status.applications[name].deployments
            if held:
                return {deployment: _held(deployment, name) for deployment in deployments}
            running = {each: deployments[each].replica_states.get("RUNNING", 0) for each in deployments}
            proxies = {str(state.value) for state in status.proxies.values()}
            return {
                "running": running,
                "well": status.applications[name].status.value == "RUNNING" and proxies == {"HEALTHY"},
            }
        except Exception:  # whatever is away, the next question may find it there
            return {}

    serve_lines(answer, ready="connected")


def _held(deployment: str, name: str) -> list[dict[str, int]]:
    return list(serve.get_deployment_handle(deployment, name).broadcast("held").results(timeout_s=_LONGEST_S))


if __name__ == "__main__":
    main(*sys.argv[1:])
