"""A configuration handed to a job of the same cluster.

Ray's dashboard, its logs and `ray job list` show a job's environment, and a configuration holds the database's password. So what a
job is told is the factory's name alone, and the configuration lies in the store of Ray's control service, which only who may run
code on the cluster can read.
"""

from __future__ import annotations

from aifactory.cluster import session
from aifactory.errors import PlacementError

HANDOVER_VARIABLE = "AIFACTORY_CONFIG_OF"
"""Environment variable of a job with the name of the factory whose configuration was handed over."""
_KEY = "config"


def hand_over(factory: str, config: str) -> None:
    """Have jobs of the connected cluster find this configuration, as JSON, in place of an earlier one."""
    # Ray 2.60 has no public way to its control service's store.
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(_KEY, config, namespace=session.namespace(factory))


def handed_over(factory: str) -> str:
    """What was handed over last; connects to the cluster.

    Raises   PlacementError where nothing was.
    """
    from ray.experimental.internal_kv import _internal_kv_get

    session.connect(factory)
    found: bytes | None = _internal_kv_get(_KEY, namespace=session.namespace(factory))
    if found is None:
        raise PlacementError(
            f"expected a configuration of {factory} that the cluster was handed, found none: {HANDOVER_VARIABLE} is set by the "
            "evaluation actor for the jobs that it submits. Leave it unset, and name a configuration file."
        )
    return found.decode()
