"""Cycles as Ray jobs, with a job server that is a small class."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from typing import Any

import pytest

from aifactory.cluster.handover import HANDOVER_VARIABLE
from aifactory.cluster.jobs import CONFIG_VARIABLE, JobLauncher, job_id
from aifactory.config import Config
from aifactory.errors import PlacementError
from aifactory.improve.evaluator import JobOrTaskLauncher
from aifactory.records.journal import Bound, Cycle


class Status(StrEnum):
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    FAILED = "FAILED"
    SUCCEEDED = "SUCCEEDED"


class Job:
    def __init__(self, submitted: dict[str, Any]) -> None:
        self.submitted, self.status, self.message = submitted, Status.PENDING, "queued"


class FakeServer:
    """Ray's job server as its client shows it: an id is used once, what it does not know is a RuntimeError."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.submitted: list[str] = []
        self.trouble: str | None = None
        self.has_agent = True

    def submit_job(self, **values: Any) -> str:
        name = str(values["submission_id"])
        if not self.has_agent:  # the text of Ray 2.60
            raise RuntimeError(
                "Request failed with status code 500: No available agent to submit job, please try again later.."
            )
        if name in self.jobs:
            raise RuntimeError("Request failed with status code 500: already used.")
        self.jobs[name] = Job(values)
        self.submitted.append(name)
        return name

    def get_job_info(self, name: str) -> Job:
        if self.trouble is not None:
            raise RuntimeError(self.trouble)
        if name not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {name} does not exist.")
        return self.jobs[name]

    def get_job_status(self, name: str) -> Status:
        return self.get_job_info(name).status

    def delete_job(self, name: str) -> bool:
        del self.jobs[name]
        return True


class Handed(dict[str, str]):
    """What jobs of the cluster would find, by factory."""

    def __call__(self, factory: str, config: str) -> None:
        self[factory] = config


def cycle(attempt: int) -> Cycle:
    bound = Bound(kind="drift", sources_digest="")
    return Cycle(trigger="drift-ab", number=2, attempt=attempt, state="running", recipe={}, bound=bound, opened_at=0.0)


@pytest.fixture
def config() -> Config:
    source = {"name": "docs", "kind": "text", "path": "nowhere"}
    return Config.model_validate({"name": "small", "ingest": {"sources": [source]}, "train": {"max_steps": 7}})


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


def test_a_cycle_is_submitted_under_its_trigger_and_its_next_attempt(config: Config, server: FakeServer) -> None:
    JobLauncher(server, config, environment={}, hand_over=Handed()).turn(cycle(0))

    assert server.submitted == ["drift-ab-a1"] == [job_id(cycle(0), 1)]
    job = server.jobs["drift-ab-a1"].submitted
    words = [sys.executable, "-m", "aifactory", "run", "-", "--cycle", "drift-ab"]
    assert shlex.split(job["entrypoint"]) == words
    assert job["metadata"] == {"factory": "small", "cycle": "drift-ab"}
    assert "working_dir" not in job["runtime_env"]


def test_the_job_is_handed_the_very_configuration(config: Config, server: FakeServer) -> None:
    handed = Handed()
    JobLauncher(server, config, environment={}, hand_over=handed).turn(cycle(0))

    told = server.jobs["drift-ab-a1"].submitted["runtime_env"]["env_vars"]
    assert Config.from_text(handed[told[HANDOVER_VARIABLE]], origin="handed over") == config


def test_what_ray_shows_of_a_job_has_no_password(config: Config, server: FakeServer) -> None:
    runtime = {"state_url": "postgresql+psycopg://me:hush@db/factory"}
    config = Config.model_validate({**config.model_dump(), "runtime": runtime})
    handed = Handed()

    environment = {"env_vars": {CONFIG_VARIABLE: config.model_dump_json()}}
    JobLauncher(server, config, environment=environment, hand_over=handed).turn(cycle(0))

    assert "hush" in handed["small"]
    assert "hush" not in repr(server.jobs["drift-ab-a1"].submitted)


def test_what_was_packaged_and_set_for_us_is_used_again(config: Config, server: FakeServer) -> None:
    ours = {
        "working_dir": "gcs://_ray_pkg_1.zip",
        "py_modules": ["gcs://_ray_pkg_2.zip"],
        "env_vars": {"AWS_PROFILE": "lab", CONFIG_VARIABLE: "an older one"},
        "_ray_commit": "abc",
    }

    JobLauncher(server, config, environment=ours, hand_over=Handed()).turn(cycle(0))

    found = server.jobs["drift-ab-a1"].submitted["runtime_env"]
    assert found.keys() == {"working_dir", "py_modules", "env_vars"}
    assert found["working_dir"] == "gcs://_ray_pkg_1.zip"
    assert found["env_vars"]["AWS_PROFILE"] == "lab"
    assert CONFIG_VARIABLE not in found["env_vars"]


def test_a_job_is_active_before_and_after_it_has_claimed_its_attempt(config: Config, server: FakeServer) -> None:
    launcher = JobLauncher(server, config, environment={}, hand_over=Handed())
    assert not launcher.is_turning(cycle(0))
    launcher.turn(cycle(0))

    assert launcher.is_turning(cycle(0))
    server.jobs["drift-ab-a1"].status = Status.RUNNING
    assert launcher.is_turning(cycle(0))
    assert launcher.is_turning(cycle(1))
    assert JobLauncher(server, config, environment={}, hand_over=Handed()).is_turning(cycle(1))
    server.jobs["drift-ab-a1"].status = Status.FAILED
    assert not launcher.is_turning(cycle(1))


def test_a_job_that_ended_before_it_claimed_the_cycle_is_replaced_and_one_that_claimed_it_is_followed(
    config: Config, server: FakeServer
) -> None:
    launcher = JobLauncher(server, config, environment={}, hand_over=Handed())
    launcher.turn(cycle(0))
    server.jobs["drift-ab-a1"].status = Status.FAILED

    launcher.turn(cycle(0))
    assert server.submitted == ["drift-ab-a1", "drift-ab-a1"]
    server.jobs["drift-ab-a1"].status = Status.FAILED
    launcher.turn(cycle(1))
    assert server.submitted[-1] == "drift-ab-a2"


def test_the_ending_of_a_job_is_told_in_its_own_words(config: Config, server: FakeServer) -> None:
    launcher = JobLauncher(server, config, environment={}, hand_over=Handed())
    assert launcher.ending(cycle(0)) == ""
    launcher.turn(cycle(0))
    server.jobs["drift-ab-a1"].status, server.jobs["drift-ab-a1"].message = Status.FAILED, "no such module"

    told = "the job drift-ab-a1 is FAILED: no such module"
    assert launcher.ending(cycle(0)) == told
    assert launcher.ending(cycle(1)) == told


class Tasks:
    """Cycles as tasks, which end when told."""

    def __init__(self) -> None:
        self.turned: list[str] = []
        self.ended = ""

    def is_turning(self, cycle: Cycle) -> bool:
        return cycle.trigger in self.turned and not self.ended

    def turn(self, cycle: Cycle) -> None:
        self.turned.append(cycle.trigger)

    def ending(self, cycle: Cycle) -> str:
        return self.ended


def test_what_no_agent_can_start_as_a_job_is_turned_as_a_task_and_the_next_as_a_job_again(
    config: Config, server: FakeServer
) -> None:
    tasks = Tasks()
    launcher = JobOrTaskLauncher(JobLauncher(server, config, environment={}, hand_over=Handed()), tasks)
    server.has_agent = False

    launcher.turn(cycle(0))
    assert (server.submitted, tasks.turned) == ([], ["drift-ab"])
    assert launcher.is_turning(cycle(1))
    tasks.ended = "OSError: full"
    assert not launcher.is_turning(cycle(1))
    assert launcher.ending(cycle(1)) == "OSError: full"

    server.has_agent, tasks.ended = True, ""
    tasks.turned.clear()
    launcher.turn(cycle(1))
    assert (server.submitted, tasks.turned) == (["drift-ab-a2"], [])
    assert launcher.is_turning(cycle(1))


def test_a_job_that_no_agent_can_start_says_what_to_look_at(config: Config, server: FakeServer) -> None:
    server.has_agent = False
    with pytest.raises(PlacementError, match=r"drift-ab-a1.*No available agent.*dashboard-agent-listen-port"):
        JobLauncher(server, config, environment={}, hand_over=Handed()).turn(cycle(0))


def test_a_server_in_trouble_is_not_taken_for_one_without_the_job(config: Config, server: FakeServer) -> None:
    launcher = JobLauncher(server, config, environment={}, hand_over=Handed())
    launcher.turn(cycle(0))
    server.trouble = "Request failed with status code 500: out of memory."

    with pytest.raises(RuntimeError, match="500"):
        launcher.is_turning(cycle(1))
    with pytest.raises(RuntimeError, match="500"):
        launcher.turn(cycle(1))
    assert server.submitted == ["drift-ab-a1"]
