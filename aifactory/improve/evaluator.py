"""Improve: completions and feedback -> the next cycle. The rim that knows Ray: the evaluation actor.

The actor is named and detached, and holds nothing that is not in the books: it may be killed at any time, Ray starts it
again, and it goes on. A retrain is a Ray job where a job server takes it, else a task in the same cluster.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from aifactory.cluster import metrics_port
from aifactory.cluster.session import namespace
from aifactory.config import Config
from aifactory.errors import PlacementError
from aifactory.improve.answer_watch import CheckAnswers
from aifactory.improve.evaluation import LONGEST_ERROR, Evaluation, IdentifyLanguages, Launcher, ScoreTasks
from aifactory.improve.judge_watch import Grade
from aifactory.observe import metrics
from aifactory.observe.events import log_event, log_to_stderr
from aifactory.records.books import Books
from aifactory.records.journal import TICK_FAILED, Cycle

ACTOR_NAME = "evaluator"
Turn = Callable[[Config, str], None]


class Evaluator:
    """The body of the actor: a thread that ticks."""

    def __init__(
        self,
        books: Books,
        score: ScoreTasks,
        turn: Turn,
        check: CheckAnswers | None = None,
        grade: Grade | None = None,
        identify: IdentifyLanguages | None = None,
    ) -> None:
        log_to_stderr()
        metrics_port.export(books.config.name)
        self._books = books
        launcher = _launcher(books.resolved_config(), turn)
        self._evaluation = Evaluation(
            books, score=score, launcher=launcher, check=check, grade=grade, identify=identify
        )
        self._thread = threading.Thread(target=self._tick_for_ever, name="evaluation", daemon=True)
        self._thread.start()

    def pid(self) -> int:
        """The process of the actor."""
        import os

        return os.getpid()

    def _tick_for_ever(self) -> None:
        import torch

        torch.set_num_threads(1)
        said = None
        while True:
            time.sleep(self._books.config.runtime.tick_s)
            try:
                self._evaluation.tick()
                metrics.IMPROVE_TICKS.add(outcome="done")
                said = None
            except Exception as error:  # a database that is away for a while must not end the watch
                metrics.IMPROVE_TICKS.add(outcome="failed")
                text = f"{type(error).__name__}: {error}"
                if text != said:
                    said = text
                    log_event("tick_failed", error=text)
                    # For who waits for the loop; no event where it is the books that are away.
                    with suppress(Exception):
                        self._books.journal.write(TICK_FAILED, detail={"error": text[-LONGEST_ERROR:]})


class TaskLauncher:
    """Turns cycles as tasks of this cluster; they end with the actor that started them, and it starts them again."""

    def __init__(self, config: Config, turn: Turn) -> None:
        self._config = config
        self._turn = turn
        self._started: dict[str, Any] = {}
        self._endings: dict[str, str] = {}

    def is_turning(self, cycle: Cycle) -> bool:
        import ray

        reference = self._started.get(cycle.trigger)
        if reference is None:
            return False
        ready, _ = ray.wait([reference], timeout=0)
        if not ready:
            return True
        del self._started[cycle.trigger]
        try:
            ray.get(reference)
        except Exception as error:
            self._endings[cycle.trigger] = f"{type(error).__name__}: {error}"
        return False

    def turn(self, cycle: Cycle) -> None:
        import ray

        # It waits for the tasks and workers that it starts, and needs no CPU of its own.
        task = ray.remote(num_cpus=0, max_retries=0)(self._turn)
        self._started[cycle.trigger] = task.remote(self._config, cycle.trigger)

    def ending(self, cycle: Cycle) -> str:
        return self._endings.pop(cycle.trigger, "")


class JobOrTaskLauncher:
    """Turns cycles as Ray jobs, and those as tasks that no agent of the cluster could start."""

    def __init__(self, jobs: Launcher, tasks: Launcher) -> None:
        self._jobs = jobs
        self._tasks = tasks

    def is_turning(self, cycle: Cycle) -> bool:
        return self._tasks.is_turning(cycle) or self._jobs.is_turning(cycle)

    def turn(self, cycle: Cycle) -> None:
        try:
            self._jobs.turn(cycle)
        except PlacementError as error:
            log_event("warned", of=f"the cycle {cycle.trigger} is a task, not a job: {error}")
            self._tasks.turn(cycle)

    def ending(self, cycle: Cycle) -> str:
        return self._tasks.ending(cycle) or self._jobs.ending(cycle)


def start(
    books: Books,
    *,
    score: ScoreTasks,
    turn: Turn,
    check: CheckAnswers | None = None,
    grade: Grade | None = None,
    identify: IdentifyLanguages | None = None,
) -> Any:
    """Start the evaluation actor of a factory on the connected cluster, or find the one that runs."""
    import ray

    actor = (
        ray.remote(Evaluator)
        .options(
            name=ACTOR_NAME,
            namespace=namespace(books.config.name),
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_task_retries=-1,
            num_cpus=0,
        )
        .remote(books, score, turn, check, grade, identify)
    )
    ray.get(actor.pid.remote())
    return actor


def is_there(factory: str) -> bool:
    """Whether the connected cluster has the evaluation actor of a factory, be it just being started again."""
    import ray

    try:
        ray.get_actor(ACTOR_NAME, namespace=namespace(factory))
    except ValueError:
        return False
    return True


def stop(factory: str) -> None:
    """End the evaluation actor of a factory, if there is one. A cycle that it began is gone on with when it starts."""
    import ray

    if not ray.is_initialized():  # Ray would start a cluster of its own to look for it
        return
    try:
        actor = ray.get_actor(ACTOR_NAME, namespace=namespace(factory))
    except ValueError:
        return
    ray.kill(actor)
    # The name is free only when the actor is gone.
    for _ in range(100):
        try:
            ray.get_actor(ACTOR_NAME, namespace=namespace(factory))
        except ValueError:
            return
        time.sleep(0.05)


def _launcher(config: Config, turn: Turn) -> Launcher:
    import ray

    from aifactory.cluster.jobs import JobLauncher, job_server

    tasks = TaskLauncher(config, turn)
    server = job_server()
    if server is None:
        return tasks
    return JobOrTaskLauncher(JobLauncher(server, config, environment=ray.get_runtime_context().runtime_env), tasks)
