"""Tasks: a plain function over many items, as Ray tasks or in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from aifactory.errors import TaskError
from aifactory.observe.usage import Usage, usage

Result = TypeVar("Result")
_MAX_RETRIES = 5


class RunTasks(Protocol):
    """Runs `function(*item)` for every item and returns the results in the order of the items."""

    def __call__(self, function: Callable[..., Result], items: Sequence[tuple[Any, ...]]) -> list[Result]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What tasks took, all together."""

    tasks: int = 0
    used: Usage = field(default_factory=Usage)
    queued_s: float = 0.0
    """Between the handing over of a task and its beginning."""

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            tasks=self.tasks + other.tasks, used=self.used + other.used, queued_s=self.queued_s + other.queued_s
        )

    def __sub__(self, before: Spent) -> Spent:
        return Spent(
            tasks=self.tasks - before.tasks, used=self.used - before.used, queued_s=self.queued_s - before.queued_s
        )


class TaskLedger:
    """What the tasks of this process have taken since it began."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spent = Spent()

    def add(self, spent: Spent) -> None:
        with self._lock:
            self._spent += spent

    @property
    def spent(self) -> Spent:
        return self._spent


ledger = TaskLedger()


class Measured:
    """A function that also says what a call took."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, handed_at: float, *item: Any) -> tuple[Any, Spent]:
        """`handed_at`: seconds since 1970, by the clock of who handed it over."""
        queued_s, before = max(0.0, time.time() - handed_at), usage()
        result = self._function(*item)
        return result, Spent(tasks=1, used=usage() - before, queued_s=queued_s)


def run_here(function: Callable[..., Result], items: Sequence[tuple[Any, ...]]) -> list[Result]:
    """Run the items one after another in this process."""
    results = []
    for item in items:
        result, spent = Measured(function)(time.time(), *item)
        ledger.add(spent)
        results.append(result)
    return results


def run_threads(calls: Sequence[Callable[[], Result]], *, at_once: int) -> list[Result]:
    """Call all of them, so many at once, each in a thread of this process; the results in their order.

    All are called, whatever becomes of one; then the first error in their order is raised. An interrupt is not held up.
    """
    results: dict[int, Result] = {}
    errors: dict[int, BaseException] = {}
    waiting = iter(enumerate(calls))
    taking = threading.Lock()

    def work() -> None:
        while True:
            with taking:
                following = next(waiting, None)
            if following is None:
                return
            number, call = following
            try:
                results[number] = call()
            except BaseException as error:
                errors[number] = error

    # Daemons: a process that is interrupted ends, with what they wait for.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(at_once, len(calls)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[min(errors)]
    return [results[number] for number in range(len(calls))]


def threads_here(*, concurrency: int, threads_each: int) -> RunTasks:
    """Run the items in threads of this process, `concurrency` at once, each with so many of torch's threads as a task would have: what
    is small has ended before the process of a task has imported what it needs."""

    def run(function: Callable[..., Result], items: Sequence[tuple[Any, ...]]) -> list[Result]:
        import torch

        threads_before, before = torch.get_num_threads(), usage()
        seconds: list[float] = []

        def call(item: tuple[Any, ...]) -> Result:
            torch.set_num_threads(threads_each)
            begun = time.perf_counter()
            try:
                return function(*item)
            finally:
                seconds.append(time.perf_counter() - begun)

        try:
            return run_threads([partial(call, item) for item in items], at_once=concurrency)
        finally:
            torch.set_num_threads(threads_before)
            # The CPU time of one process: what each thread had of it is not told apart.
            used = replace(usage() - before, seconds=sum(seconds))
            ledger.add(Spent(tasks=len(seconds), used=used))

    return run


def ray_tasks(*, concurrency: int, cpus_per_task: float) -> RunTasks:
    """Run the items as Ray tasks, `concurrency` at once, wherever in the cluster there is room.

    A task whose worker or node dies is run again by Ray, up to _MAX_RETRIES times. The first error of the function itself
    ends the run: what is in flight is cancelled, and the error reaches the caller as the function raised it.
    """

    def run(function: Callable[..., Result], items: Sequence[tuple[Any, ...]]) -> list[Result]:
        import ray
        from ray.exceptions import RayError, RayTaskError

        def measured(handed_at: float, *item: Any) -> tuple[Result, Spent]:
            return Measured(function)(handed_at, *item)

        measured.__name__ = measured.__qualname__ = function.__name__
        task = ray.remote(num_cpus=cpus_per_task, max_retries=_MAX_RETRIES, scheduling_strategy="SPREAD")(measured)
        results: dict[int, Result] = {}
        flying: dict[Any, int] = {}
        waiting = iter(enumerate(items))
        try:
            while len(results) < len(items):
                while len(flying) < concurrency and (following := next(waiting, None)) is not None:
                    number, item = following
                    flying[task.remote(time.time(), *item)] = number
                done, _ = ray.wait(list(flying), num_returns=1)
                for reference in done:
                    results[flying.pop(reference)], spent = ray.get(reference)
                    ledger.add(spent)
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            raise TaskError(
                f"expected every task of {function.__name__} to end, found that one did not after {_MAX_RETRIES} further "
                f"tries: {error} What was published is intact: free memory or lower runtime.data_tasks, and run the same "
                "command again."
            ) from error
        finally:
            for reference in flying:
                ray.cancel(reference, force=True)
        return [results[number] for number in range(len(items))]

    return run
