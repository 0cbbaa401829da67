"""Admission: who is let into the engine next. At most so many answers run; the others wait, key beside key, in turn.

Turns    start-time fair queueing: the line that was given least comes first, of keys, and of the users of one key. An
         answer is one turn, so n answers are n. Whoever was away begins where the others are, and has saved nothing up.
Bound    where the queue is full, the newest of the longest line makes room for somebody with a shorter one, so that one
         who sends a thousand requests can't fill the queue for all.
Behind   work in the background (batches) runs when nobody waits in front, and takes half of the room at most.
Source   Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996; Suter et al., "Buffer management schemes ...
         per-flow queueing", 1999 (longest queue drop).

One event loop calls all of it; there are no locks.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from aifactory.errors import CapacityError


class Entry:
    """A request on its way into the engine, until all of its answers have ended."""

    def __init__(self, admission: Admission, path: Sequence[str], cost: int, *, behind: bool) -> None:
        self.path = tuple(path)
        self.cost = cost
        self.behind = behind
        self.running = 0
        """Answers in the engine; 0 while it waits."""
        self.waits = True
        """Whether it stands in the queue."""
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._admission = admission

    def free(self, count: int = 1) -> None:
        """So many of its answers have ended."""
        count = min(count, self.running)
        self.running -= count
        self._admission.take_back(self, count)

    def leave(self, why: Exception | None = None) -> None:
        """Free all that is left of it; whoever waits for `admitted` gets `why`."""
        if self.waits:
            self.waits = False
            self._admission.remove(self)
            # Whoever waited for it may have been cancelled, and it with them.
            if not self.admitted.done() and why is not None:
                self.admitted.set_exception(why)
        self.free(self.running)


class _Line:
    """Those who wait under one name: entries, or lines by the next name of their paths."""

    def __init__(self, given: float = 0.0) -> None:
        self.given = given
        """Virtual time: turns that it was given, or that it came too late for."""
        self.waiting = 0
        """Answers that wait in it."""
        self.entries: deque[Entry] = deque()
        self.lines: dict[str, _Line] = {}
        self._now = 0.0

    def push(self, entry: Entry, depth: int = 0) -> None:
        self.waiting += entry.cost
        if depth == len(entry.path):
            self.entries.append(entry)
            return
        self.lines.setdefault(entry.path[depth], _Line(self._now)).push(entry, depth + 1)

    def pop(self) -> Entry:
        """The entry whose turn it is."""
        if not self.lines:
            entry = self.entries.popleft()
        else:
            name = min(self.lines, key=lambda each: self.lines[each].given)
            line = self.lines[name]
            self._now = line.given
            entry = line.pop()
            line.given += entry.cost
            if not line.waiting:
                del self.lines[name]
        self.waiting -= entry.cost
        return entry

    def remove(self, entry: Entry, depth: int = 0) -> None:
        self.waiting -= entry.cost
        if depth == len(entry.path):
            self.entries.remove(entry)
            return
        line = self.lines[entry.path[depth]]
        line.remove(entry, depth + 1)
        if not line.waiting:
            del self.lines[entry.path[depth]]

    def newest_of_longest(self) -> Entry:
        line = self
        while line.lines:
            line = max(line.lines.values(), key=lambda each: each.waiting)
        return line.entries[-1]

    def whom_to_drop(self, entry: Entry) -> Entry | None:
        """The entry that gives its place to a newer one whose line is shorter; None where there is none."""
        line = self
        for name in entry.path:
            if not line.lines:
                return None
            longest = max(line.lines.values(), key=lambda each: each.waiting)
            mine = line.lines.get(name)
            if longest is not mine and longest.waiting > (0 if mine is None else mine.waiting) + entry.cost:
                return longest.newest_of_longest()
            if mine is None:
                return None
            line = mine
        return None


class Admission:
    """The queue before the engine."""

    def __init__(self, *, max_running: int, max_waiting: int) -> None:
        """Both in answers. A request of more answers than `max_running` runs when there is room for one of them."""
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._running = 0
        self._running_behind = 0
        self._front = _Line()
        self._behind = _Line()

    @property
    def waiting(self) -> int:
        """Answers that wait, those in the background apart."""
        return self._front.waiting

    @property
    def running(self) -> int:
        """Answers in the engine."""
        return self._running

    def enter(self, path: Sequence[str], cost: int, *, behind: bool = False) -> Entry:
        """Stand in line, under a key and a user; wait for `Entry.admitted`, and leave in any case.

        Raises   CapacityError if the queue is full of others with as much right to it.
        """
        entry = Entry(self, path, cost, behind=behind)
        line = self._behind if behind else self._front
        fits_now = not line.waiting and self._has_room(behind=behind)
        while not behind and not fits_now and line.waiting + cost > self._max_waiting:
            dropped = line.whom_to_drop(entry)
            if dropped is None:
                raise self._full()
            dropped.leave(self._full())
        line.push(entry)
        self._let_in()
        return entry

    def take_back(self, entry: Entry, count: int) -> None:
        """So many answers have ended."""
        self._running -= count
        if entry.behind:
            self._running_behind -= count
        self._let_in()

    def remove(self, entry: Entry) -> None:
        """Somebody waits no longer."""
        (self._behind if entry.behind else self._front).remove(entry)

    def _has_room(self, *, behind: bool) -> bool:
        if behind and (self._front.waiting or self._running_behind >= max(1, self._max_running // 2)):
            return False
        return self._running < self._max_running

    def _let_in(self) -> None:
        for line, behind in ((self._front, False), (self._behind, True)):
            while line.waiting and self._has_room(behind=behind):
                entry = line.pop()
                entry.running = entry.cost
                self._running += entry.cost
                if behind:
                    self._running_behind += entry.cost
                entry.waits = False
                entry.admitted.set_result(None)

    def _full(self) -> CapacityError:
        return CapacityError(
            f"Expected room in the queue of {self._max_waiting} answers, found it full. Send it again later."
        )
