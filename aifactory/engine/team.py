"""ThreadTeam: threads that run one compiled function side by side, each with its number. Knows neither torch nor numba.

The function must let go of Python's lock and wait for the others itself where it needs them: a hand-over costs tens of
microseconds, a barrier inside less than one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

Work = tuple[Callable[..., None], tuple[Any, ...]]


class ThreadTeam:
    """The caller's thread and `num_threads - 1` others, which sleep between calls."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        # Two callers at once would meet at each other's barriers.
        self._lock = threading.Lock()
        self._queues: list[SimpleQueue[Work | None]] = [SimpleQueue() for _ in range(num_threads - 1)]
        self._threads = [
            threading.Thread(target=_serve, args=(number, num_threads, queue), name=f"engine-{number}", daemon=True)
            for number, queue in enumerate(self._queues, start=1)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, function: Callable[..., None], *args: Any) -> None:
        """`function(number, num_threads, *args)` in every thread; it must return in all of them only when all are done."""
        with self._lock:
            for queue in self._queues:
                queue.put((function, args))
            function(0, self.num_threads, *args)

    def close(self) -> None:
        """End the other threads. The team can't be used any more."""
        for queue in self._queues:
            queue.put(None)
        for thread in self._threads:
            thread.join()


def _serve(number: int, num_threads: int, queue: SimpleQueue[Work | None]) -> None:
    while (work := queue.get()) is not None:
        function, args = work
        function(number, num_threads, *args)
        del function, args, work
