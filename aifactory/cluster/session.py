"""The Ray session: the cluster that is there, or one of our own that ends with this process.

Environment variables that Ray and its workers read are set here and nowhere else.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys

from aifactory.errors import PlacementError
from aifactory.observe.events import log_event

# Read by Ray, torch and OpenMP when they start; a user's own setting stays.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # OpenMP's workers would spin between products and starve one another on a shared machine.
    "GOMP_SPINCOUNT": "0",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "true",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Serve's access log costs as much as a short answer.
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    # A process that asks whether a node is about to be taken away: ours is not.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
# Read by Serve's controller and its proxies when they start: in the controller's environment, or in that of a cluster's pods.
SERVING = {
    # What a proxy says of answers that nobody ends.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "aifactory.serve.proxy.middlewares",
    # A proxy is started anew when three looks in a row have found it dead; every 10 s in Ray 2.60, while nobody listens.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
}
_made: dict[str, str] = {}
"""What guards the cluster that this process has started. Ray puts the machine's address in the place of 127.0.0.1 (2.60), and
whoever speaks to its ports can run code."""
# Where Ray looks for a token before it looks into the home folder.
_TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
# Read by Ray Train in the driver, whatever cluster it is connected to.
_TRAINING = {
    # A dead worker is seen so soon; 2 s in Ray 2.60.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # How long a group waits for its place before its size is decided anew, again and again; 60 s in Ray 2.60, in which a
    # group that has lost a node waits for that node.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
}


def namespace(factory: str) -> str:
    """Ray's namespace of a factory: named actors of two factories never meet."""
    return f"aifactory-{factory}"


def app_name(factory: str) -> str:
    """Serve's application of a factory."""
    return f"aifactory-{factory}"


def is_ray_job() -> bool:
    """Whether this process is the driver of a Ray job, whose working directory is a passing copy."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def connect(factory: str) -> bool:
    """Connect to the cluster that `RAY_ADDRESS` or a running session names, else start one. True if it was started.

    Raises   PlacementError if the address can't be reached.
    """
    import ray

    for name, value in _TRAINING.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS")
    logging.getLogger("ray").setLevel(logging.WARNING)
    if address or is_ray_job():
        try:
            ray.init(namespace=namespace(factory), logging_level=logging.WARNING, log_to_driver=False)
        except ConnectionError as error:
            raise PlacementError(f"expected a Ray cluster at RAY_ADDRESS={address}, found none: {error}") from error
        log_event("connected", cluster=address or "this job's")
        return False
    for name, value in (ENVIRONMENT | _authentication()).items():
        os.environ.setdefault(name, value)
    _reread_authentication()
    log_event("starting", cluster="a Ray of its own on this machine")
    ray.init(
        address="local",
        namespace=namespace(factory),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )
    return True


def _authentication() -> dict[str, str]:
    """How a cluster of our own is guarded where the user says nothing of it: by a token that its processes inherit.

    A local ray.init() would write one into the home folder (Ray 2.60), where other clusters would take it for theirs.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        _made["RAY_AUTH_MODE"] = "token"
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() == "token" and not any(os.environ.get(name) for name in _TOKENS):
        _made["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return _made


def _reread_authentication() -> None:
    """Ray reads how it authenticates once, when it is imported, and its token at the first use (2.60)."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def join(factory: str) -> None:
    """Connect to the cluster that `RAY_ADDRESS` names; none is started.

    Raises   PlacementError where there is none.
    """
    import ray

    address = os.environ["RAY_ADDRESS"]
    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        ray.init(address, namespace=namespace(factory), logging_level=logging.WARNING, log_to_driver=False)
    except ConnectionError as error:
        raise PlacementError(f"expected a Ray cluster at {address}, found none: {error}") from error


def disconnect() -> None:
    """Leave the cluster; one that was started here ends, and what opened it is good for nothing more."""
    if "ray" in sys.modules:
        import ray

        if ray.is_initialized():
            ray.shutdown()
    for name, value in _made.items():
        if os.environ.get(name) == value:
            del os.environ[name]
    if _made:
        _made.clear()
        _reread_authentication()
