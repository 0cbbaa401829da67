"""Ray jobs: a cycle as a job of its own, where the cluster has a job server."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any

from aifactory.cluster.handover import HANDOVER_VARIABLE, hand_over
from aifactory.config import Config
from aifactory.errors import PlacementError
from aifactory.observe.events import log_event
from aifactory.records.journal import Cycle

CONFIG_VARIABLE = "AIFACTORY_CONFIG"
"""Environment variable with a whole configuration as JSON; the config argument `-` reads it."""
_PASSED_ON = ("working_dir", "py_modules")
"""Packages that Ray keeps for as long as the cluster lives."""
_NO_AGENT = "No available agent to submit job"


def job_server() -> Any | None:
    """A client of the connected cluster's job server; None where it has none."""
    import ray
    from ray.job_submission import JobSubmissionClient

    address = _dashboard_address()
    if address is None or not ray.is_initialized():
        return None
    try:
        server = JobSubmissionClient(f"http://{address}")
        # Ray 2.60 names an address even for a cluster without a dashboard; another cluster of this machine may be there.
        found = server._do_request("GET", "/api/version").json().get("session_name")
    except (ConnectionError, RuntimeError):
        return None
    return server if found == ray.get_runtime_context().get_session_name() else None


class JobLauncher:
    """Turns cycles as Ray jobs `<trigger>-a<attempt>`: they outlive the actor that submitted them."""

    def __init__(
        self,
        server: Any,
        config: Config,
        *,
        environment: Mapping[str, Any],
        hand_over: Callable[[str, str], None] = hand_over,
    ) -> None:
        """`environment` is the runtime environment of the job that started us: what it packaged is used again."""
        self._server = server
        self._config = config
        self._environment = _environment_for(config, environment)
        self._hand_over = hand_over

    def is_turning(self, cycle: Cycle) -> bool:
        """The attempt in the journal is raised by the job itself, so the newest may be this one or the next."""
        return any(self._is_active(job_id(cycle, attempt)) for attempt in (cycle.attempt, cycle.attempt + 1))

    def turn(self, cycle: Cycle) -> None:
        """Submit the next attempt.

        Raises   PlacementError if no node's agent can start a job, as where the agent's port was taken.
        """
        submission_id = job_id(cycle, cycle.attempt + 1)
        if self._status(submission_id) is not None:
            # It was submitted and ended before it could claim the cycle; an id is never used twice.
            self._server.delete_job(submission_id)
        self._hand_over(self._config.name, self._config.model_dump_json())
        try:
            self._server.submit_job(
                entrypoint=shlex.join([sys.executable, "-m", "aifactory", "run", "-", "--cycle", cycle.trigger]),
                submission_id=submission_id,
                entrypoint_num_cpus=0,
                runtime_env=self._environment,
                metadata={"factory": self._config.name, "cycle": cycle.trigger},
            )
        except RuntimeError as error:
            # Ray 2.60 says in the text alone that it refused the job before it knew of it.
            if _NO_AGENT not in str(error):
                raise
            raise PlacementError(
                f"expected an agent of the cluster that starts the job {submission_id}, found none: {error} See to it that "
                "--dashboard-agent-listen-port is free on the cluster's nodes."
            ) from error
        log_event("submitted", job=submission_id)

    def ending(self, cycle: Cycle) -> str:
        """The job that ended before it could claim the cycle, else the one that had claimed it."""
        for attempt in (cycle.attempt + 1, cycle.attempt):
            if self._status(job_id(cycle, attempt)) is not None:
                job = self._server.get_job_info(job_id(cycle, attempt))
                return f"the job {job_id(cycle, attempt)} is {job.status.value}: {job.message}"
        return ""

    def _is_active(self, submission_id: str) -> bool:
        return self._status(submission_id) in ("PENDING", "RUNNING")

    def _status(self, submission_id: str) -> str | None:
        try:
            return str(self._server.get_job_status(submission_id).value)
        except RuntimeError as error:
            # Ray 2.60 says in the text alone that there is no such job; anything else is not known to be so.
            if "status code 404" not in str(error):
                raise
            return None


def stop_jobs(factory: str) -> list[str]:
    """Stop the jobs of the connected cluster that turn a cycle of a factory; their ids. Such a cycle can be gone on with."""
    server = job_server()
    if server is None:
        return []
    turning = [
        job.submission_id
        for job in server.list_jobs()
        if (job.metadata or {}).get("factory") == factory and job.status.value in ("PENDING", "RUNNING")
    ]
    return [each for each in turning if each is not None and server.stop_job(each)]


def job_id(cycle: Cycle, attempt: int) -> str:
    """The submission id of an attempt: the same attempt can't be submitted twice."""
    return f"{cycle.trigger}-a{attempt}"


def _environment_for(config: Config, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Whose configuration it is, and what was packaged and set for us."""
    environment = {name: ours[name] for name in _PASSED_ON if ours.get(name)}
    variables = {name: value for name, value in (ours.get("env_vars") or {}).items() if name != CONFIG_VARIABLE}
    return {**environment, "env_vars": {**variables, HANDOVER_VARIABLE: config.name}}


def _dashboard_address() -> str | None:
    from ray._private.worker import global_worker

    # Ray 2.60 has no public way to ask a worker's process for the dashboard's address.
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_initialized

    if not global_worker.connected or not _internal_kv_initialized():
        return None
    found = _internal_kv_get("dashboard", namespace="dashboard")
    return None if found is None else found.decode()
