"""Tasks: a plain function over many items, as Ray tasks or in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from aifactory.errors import TaskError

Result = TypeVar("Result")
_MAX_RETRIES = 5


class RunTasks(Protocol):
    """Runs `function(*item)` for every item and returns the results in the order of the items."""

    def __call__(self, function: Callable[..., Result], items: Sequence[tuple[Any, ...]]) -> list[Result]: ...


def run_here(function: Callable[..., Result], items: Sequence[tuple[Any, ...]]) -> list[Result]:
    """Run the items one after another in this process."""
    return [function(*item) for item in items]


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


def ray_tasks(*, concurrency: int, cpus_per_task: float) -> RunTasks:
    """Run the items as Ray tasks, `concurrency` at once, wherever in the cluster there is room.

    A task whose worker or node dies is run again by Ray, up to _MAX_RETRIES times. The first error of the function itself
    ends the run: what is in flight is cancelled, and the error reaches the caller as the function raised it.
    """

    def run(function: Callable[..., Result], items: Sequence[tuple[Any, ...]]) -> list[Result]:
        import ray
        from ray.exceptions import RayError, RayTaskError

        task = ray.remote(num_cpus=cpus_per_task, max_retries=_MAX_RETRIES, scheduling_strategy="SPREAD")(function)
        results: dict[int, Result] = {}
        flying: dict[Any, int] = {}
        waiting = iter(enumerate(items))
        try:
            while len(results) < len(items):
                while len(flying) < concurrency and (following := next(waiting, None)) is not None:
                    number, item = following
                    flying[task.remote(*item)] = number
                done, _ = ray.wait(list(flying), num_returns=1)
                for reference in done:
                    results[flying.pop(reference)] = ray.get(reference)
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
