"""Releases as a replica holds them: the one that takes requests, and older ones until their last answer is given.

A swap loads the new release beside the old one, checks that it says what its trainer said, and only then lets it take
requests. A request ends on the release on which it began. A release that does not load never takes one, and is tried
again ever more rarely: what kept it from loading may have been the storage, not the release.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from aifactory.engine.protocol import Engine
from aifactory.observe.events import log_event
from aifactory.records.artifacts import Model
from aifactory.records.books import Books
from aifactory.records.registry import Release
from aifactory.serve.adapters import ServedAdapter, put_on
from aifactory.text.tokenizer import TextTokenizer

_FIRST_RETRY_S = 60.0
_LONGEST_RETRY_S = 3_600.0
_DRAIN_POLL_S = 0.05
_COMING_POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Served:
    """A release that is loaded."""

    release: Release
    engine: Engine
    tokenizer: TextTokenizer
    adapters: Mapping[str, ServedAdapter | None] = field(default_factory=dict)
    """Beside it, by name; None for a name that is the release itself."""
    refused: frozenset[str] = frozenset()
    """Names of adapters that do not fit it."""

    names: Mapping[str, ServedAdapter | None] = field(init=False)
    """All that can be asked for as `model`, and the adapter that it stands for; None: the release itself."""

    def __post_init__(self) -> None:
        whole = {self.release.factory: None, self.release.name: None}
        exact = {adapter.model: adapter for adapter in self.adapters.values() if adapter is not None}
        object.__setattr__(self, "names", {**whole, **self.adapters, **exact})


Loader = Callable[[Path], tuple[Engine, TextTokenizer]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A release that did not load."""

    reason: str
    times: int
    again_at: float
    """When it is tried again, on the clock of `Releases`."""


class Releases:
    """Follows the channel `production` of the registry."""

    def __init__(
        self, books: Books, load: Loader, *, clock: Callable[[], float] = time.monotonic, replica: str = ""
    ) -> None:
        """`replica` is what the journal calls who has swapped, where there are several."""
        self.books = books
        self._replica = replica
        self._load = load
        self._clock = clock
        self._current: Served | None = None
        self._holds: Counter[Served] = Counter()
        self._refused: dict[int, Refused] = {}
        self._draining: set[asyncio.Task[None]] = set()
        self._warm: list[Served] = []
        """Those that others have taken the place of, until they are closed."""

    @property
    def current(self) -> Served | None:
        """What takes requests now; None before the first release."""
        return self._current

    @property
    def held(self) -> Mapping[str, int]:
        """What requests hold of the engines here: answers in them, and tokens of their caches, in slots and reserved."""
        engines = [served.engine for served in self._here()]
        # An engine that keeps its cache in another process does not tell.
        uses = [use for engine in engines if (use := getattr(engine, "cache_use", None)) is not None]
        return {
            "answers": sum(engine.num_unfinished for engine in engines),
            "cache_used": sum(use.num_used for use in uses),
            "cache_reserved": sum(use.num_reserved for use in uses),
        }

    @contextmanager
    def hold(self, number: int | None = None) -> Iterator[Served | None]:
        """What takes requests now, not closed while the block runs: a request that is still being read has begun.

        number   the release by which a request began elsewhere; None is held if it is not here, or no more.
        """
        served = self._current if number is None else self._find(number)
        if served is None:
            yield None
            return
        self._holds[served] += 1
        try:
            yield served
        finally:
            self._holds[served] -= 1
            if not self._holds[served]:
                del self._holds[served]

    async def come_to(self, number: int, longest_s: float) -> None:
        """Wait until a release that is in production has been loaded here too; at most so long."""
        deadline = time.monotonic() + longest_s
        while self._find(number) is None and time.monotonic() < deadline:
            wanted = await asyncio.to_thread(self.books.registry.production)
            if wanted is None or wanted.number != number:
                return
            await asyncio.sleep(_COMING_POLL_S)

    def _here(self) -> list[Served]:
        return [*self._warm, *([] if self._current is None else [self._current])]

    def _find(self, number: int) -> Served | None:
        return next((served for served in reversed(self._here()) if served.release.number == number), None)

    def load_first(self) -> None:
        """Load the release in production before the first request; if it doesn't load, what served before it.

        Raises what loading the release in production raises, if none of them loads.
        """
        release = self.books.registry.production()
        if release is None:
            return
        first_error: Exception | None = None
        history = [promotion["release"] for promotion in reversed(self.books.registry.promotions())]
        for number in dict.fromkeys([release.number, *history]):
            candidate = self.books.registry.release(number)
            assert candidate is not None, "a promotion of no release"
            try:
                self._current = self._loaded(candidate)
                return
            except Exception as error:
                first_error = first_error or error
                self._refuse(candidate, error)
        assert first_error is not None
        raise first_error

    async def follow(self, poll_s: float, drain_timeout_s: float) -> None:
        """Look for another release in production, for ever; swap to it."""
        while True:
            await asyncio.sleep(poll_s)
            try:
                await self.look(drain_timeout_s)
            except Exception as error:  # a database that is away for a while must not end the watch
                log_event("looked", error=f"{type(error).__name__}: {error}")

    async def look(self, drain_timeout_s: float) -> None:
        """Swap if the channel has moved."""
        release = await asyncio.to_thread(self.books.registry.production)
        serving = None if self._current is None else self._current.release.number
        if release is None or release.number == serving:
            return
        refused = self._refused.get(release.number)
        if refused is not None and self._clock() < refused.again_at:
            return
        begin = time.perf_counter()
        try:
            fresh = await asyncio.to_thread(self._loaded, release)
        except Exception as error:  # whatever is wrong with a release, the one before it goes on
            await asyncio.to_thread(self._refuse, release, error)
            return
        self._refused.pop(release.number, None)
        # No await from here to the end of the swap: a request sees the old release or the new one.
        old, self._current = self._current, fresh
        if old is not None:
            self._warm.append(old)
            task = asyncio.create_task(self._drain(old, drain_timeout_s))
            self._draining.add(task)
            task.add_done_callback(self._draining.discard)
        seconds = time.perf_counter() - begin
        log_event("swapped", release=release.name, seconds=round(seconds, 2), replica=self._replica)
        detail = {"replica": self._replica}
        write = self.books.journal.write
        await asyncio.to_thread(write, "swapped", subject=release.name, detail=detail, seconds=seconds)

    def close(self, drain_timeout_s: float) -> None:
        """Take no more, and let what is in flight end."""
        if self._current is not None:
            self._current.engine.close(drain_timeout_s)

    def _loaded(self, release: Release) -> Served:
        model = self.books.artifacts.get(Model, release.model)
        engine, tokenizer = self._load(self.books.artifacts.fetch(model))
        try:
            adapters, refused = put_on(engine, tokenizer, release, self.books)
        except BaseException:
            engine.close(0.0)
            raise
        return Served(release=release, engine=engine, tokenizer=tokenizer, adapters=adapters, refused=refused)

    def _refuse(self, release: Release, error: Exception) -> None:
        """Remember when to try again, and write the reason down where it is new."""
        before = self._refused.get(release.number)
        times = 1 if before is None else before.times + 1
        pause_s = min(_FIRST_RETRY_S * 2 ** (times - 1), _LONGEST_RETRY_S)
        reason = f"{type(error).__name__}: {error}"
        self._refused[release.number] = Refused(reason=reason, times=times, again_at=self._clock() + pause_s)
        log_event("load_failed", release=release.name, reason=reason)
        if before is None or before.reason != reason:
            self.books.journal.write("load_failed", subject=release.name, detail={"reason": reason})

    async def _drain(self, old: Served, drain_timeout_s: float) -> None:
        """Close a release after its last answer, or cut off what is left when the time is up."""
        # Looked at, not waited for in a thread: a few swaps would take all threads that answers are written with.
        deadline = time.monotonic() + drain_timeout_s
        while (old in self._holds or old.engine.num_unfinished) and time.monotonic() < deadline:
            await asyncio.sleep(_DRAIN_POLL_S)
        self._warm.remove(old)
        await asyncio.to_thread(old.engine.close, 0.0)
