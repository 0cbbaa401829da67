"""Tasks: a plain function over many items, by Ray Data or in this process."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

Result = TypeVar("Result")


class RunTasks(Protocol):
    """Runs `function(*item)` for every item and returns the results in the order of the items."""

    def __call__(self, function: Callable[..., Result], items: Sequence[tuple[Any, ...]]) -> list[Result]: ...


def run_here(function: Callable[..., Result], items: Sequence[tuple[Any, ...]]) -> list[Result]:
    """Run the items one after another in this process."""
    return [function(*item) for item in items]


def ray_data_tasks(*, concurrency: int, cpus_per_task: float) -> RunTasks:
    """Run the items as Ray Data tasks, `concurrency` at once; a task whose worker dies is run again by Ray."""

    def run(function: Callable[..., Result], items: Sequence[tuple[Any, ...]]) -> list[Result]:
        import ray.data

        if not items:
            return []

        def call(row: dict[str, Any]) -> dict[str, Any]:
            return {"index": row["index"], "result": pickle.dumps(function(*pickle.loads(row["item"])))}

        logging.getLogger("ray.data").setLevel(logging.ERROR)  # it sets its own level when it is imported
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        # The factory's own errors must reach the caller as they are, not behind a page of the executor's log.
        context.log_internal_stack_trace_to_stdout = False
        context.verbose_stats_logs = False
        payload = [{"index": i, "item": pickle.dumps(item)} for i, item in enumerate(items)]
        pool = ray.data.TaskPoolStrategy(size=min(concurrency, len(items)))
        dataset = ray.data.from_items(payload, override_num_blocks=len(payload))
        rows = dataset.map(call, num_cpus=cpus_per_task, compute=pool).take_all()
        return [pickle.loads(row["result"]) for row in sorted(rows, key=lambda row: row["index"])]

    return run
