"""Ray jobs: a cycle as a job of its own, where the cluster has a job server."""

from __future__ import annotations

import sys
from typing import Any

from aifactory.config import Config
from aifactory.observe.events import log_event
from aifactory.records.journal import Cycle

CONFIG_VARIABLE = "AIFACTORY_CONFIG"
"""Environment variable with a whole configuration as JSON; the config argument `-` reads it."""


def job_server() -> Any | None:
    """A client of the connected cluster's job server; None where it has none."""
    import ray
    from ray.job_submission import JobSubmissionClient

    address = _dashboard_address()
    if address is None or not ray.is_initialized():
        return None
    try:
        return JobSubmissionClient(f"http://{address}")
    except (ConnectionError, RuntimeError):
        return None


class JobLauncher:
    """Turns cycles as Ray jobs `<trigger>-a<attempt>`: they outlive the actor that submitted them."""

    def __init__(self, server: Any, config: Config) -> None:
        self._server = server
        self._config = config

    def is_turning(self, cycle: Cycle) -> bool:
        """The attempt in the journal is raised by the job itself, so the newest may be this one or the next."""
        return any(self._is_active(job_id(cycle, attempt)) for attempt in (cycle.attempt, cycle.attempt + 1))

    def turn(self, cycle: Cycle) -> None:
        submission_id = job_id(cycle, cycle.attempt + 1)
        if self._status(submission_id) is not None:
            # It was submitted and ended before it could claim the cycle; an id is never used twice.
            self._server.delete_job(submission_id)
        self._server.submit_job(
            entrypoint=f"{sys.executable} -m aifactory run - --cycle {cycle.trigger}",
            submission_id=submission_id,
            entrypoint_num_cpus=0,
            runtime_env=_runtime_env(self._config),
            metadata={"factory": self._config.name, "cycle": cycle.trigger},
        )
        log_event("submitted", job=submission_id)

    def _is_active(self, submission_id: str) -> bool:
        return str(self._status(submission_id)) in ("PENDING", "RUNNING")

    def _status(self, submission_id: str) -> str | None:
        try:
            return str(self._server.get_job_status(submission_id).value)
        except RuntimeError:
            return None


def job_id(cycle: Cycle, attempt: int) -> str:
    """The submission id of an attempt: the same attempt can't be submitted twice."""
    return f"{cycle.trigger}-a{attempt}"


def _runtime_env(config: Config) -> dict[str, Any]:
    """The configuration, and the working directory that was packaged for the job that started us."""
    import ray

    environment: dict[str, Any] = {"env_vars": {CONFIG_VARIABLE: config.model_dump_json()}}
    packaged = ray.get_runtime_context().runtime_env.get("working_dir")
    if packaged:
        environment["working_dir"] = packaged
    return environment


def _dashboard_address() -> str | None:
    from ray._private.worker import global_worker

    # Ray 2.60 has no public way to ask a worker's process for the dashboard's address.
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_initialized

    if not global_worker.connected or not _internal_kv_initialized():
        return None
    found = _internal_kv_get("dashboard", namespace="dashboard")
    return None if found is None else found.decode()
