"""Releases as a replica holds them: the one that takes requests, the one on trial beside it, and older ones until their
last answer is given.

A swap loads the new release beside the old one, checks that it says what its trainer said, and only then lets it take
requests. A request ends on the release on which it began. A release that does not load never takes one, and is tried
again ever more rarely: what kept it from loading may have been the storage, not the release.

What is on trial is loaded and checked in the same way, where memory allows it. Promoted, it takes production as it is.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from aifactory.engine.protocol import CacheUse, Engine
from aifactory.observe import metrics
from aifactory.observe.events import log_event
from aifactory.records.artifacts import Model
from aifactory.records.books import Books
from aifactory.records.registry import Release, Standing
from aifactory.records.trials import ShareOf, Trial
from aifactory.serve.adapters import ServedAdapter, put_on
from aifactory.serve.memory import require_memory
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
    """Follows the channel `production` of the registry, and the trial beside it."""

    def __init__(
        self,
        books: Books,
        load: Loader,
        *,
        clock: Callable[[], float] = time.monotonic,
        replica: str = "",
        require_room: Callable[[Path], None] = require_memory,
    ) -> None:
        """`replica` is what the journal calls who has swapped, where there are several; `require_room` raises where the model
        of a folder does not fit beside the one in production."""
        self.books = books
        self._replica = replica
        self._load = load
        self._clock = clock
        self._require_room = require_room
        self._current: Served | None = None
        self._tried: Served | None = None
        self._trial: Trial | None = None
        """Of `_tried`."""
        self._holds: Counter[Served] = Counter()
        self._refused: dict[Hashable, Refused] = {}
        """By number for production; for a trial by what it began with: another one is another chance."""
        self._loading: dict[int, asyncio.Task[Served]] = {}
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
        engines, uses = [served.engine for served in self._here()], self.cache_uses
        return {
            "answers": sum(engine.num_unfinished for engine in engines),
            "cache_used": sum(use.num_used for use in uses),
            "cache_reserved": sum(use.num_reserved for use in uses),
        }

    @property
    def cache_uses(self) -> list[CacheUse]:
        """Of the engines here; one that keeps its cache in another process does not tell."""
        engines = [served.engine for served in self._here()]
        return [use for engine in engines if (use := getattr(engine, "cache_use", None)) is not None]

    @property
    def tried(self) -> tuple[Trial, Served] | None:
        """The trial that is on and the release that is tried; None where it is not loaded here."""
        return None if self._tried is None or self._trial is None else (self._trial, self._tried)

    @contextmanager
    def hold(
        self, number: int | None = None, *, model: str | None = None, asker: Mapping[ShareOf, str] | None = None
    ) -> Iterator[Served | None]:
        """What takes a request now, not closed while the block runs: a request that is still being read has begun.

        number   the release by which a request began elsewhere; None is held if it is not here, or no more
        model    what it asks for; a release on trial takes what names it
        asker    who asks and what, of which a release on trial may take a share
        """
        served = self._chosen(model, asker) if number is None else self._find(number)
        if served is None:
            yield None
            return
        with self._held(served):
            yield served

    @contextmanager
    def hold_tried(self) -> Iterator[tuple[Trial, Served] | None]:
        """The release on trial, not closed while the block runs; None where none is."""
        tried = self.tried
        if tried is None:
            yield None
            return
        with self._held(tried[1]):
            yield tried

    @contextmanager
    def _held(self, served: Served) -> Iterator[None]:
        self._holds[served] += 1
        try:
            yield
        finally:
            self._holds[served] -= 1
            if not self._holds[served]:
                del self._holds[served]

    def _chosen(self, model: str | None, asker: Mapping[ShareOf, str] | None) -> Served | None:
        current, trial, tried = self._current, self._trial, self._tried
        if tried is None or trial is None or current is None or trial.kind != "canary" or model is None:
            return current
        if model in tried.names and model not in current.names:
            return tried
        is_one_of_them = asker is not None and model == tried.release.factory and trial.takes(asker[trial.by])
        return tried if is_one_of_them else current

    async def come_to(self, number: int, longest_s: float) -> None:
        """Wait until a release that is in production, or on trial, has been loaded here too; at most so long."""
        deadline = time.monotonic() + longest_s
        while self._find(number) is None and time.monotonic() < deadline:
            standing = await asyncio.to_thread(self.books.registry.standing)
            if number not in [each.number for each in (standing.production, standing.tried) if each is not None]:
                return
            await asyncio.sleep(_COMING_POLL_S)

    def _here(self) -> list[Served]:
        return [*self._warm, *(each for each in (self._tried, self._current) if each is not None)]

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
                self._refuse(candidate, error, candidate.number)
        assert first_error is not None
        raise first_error

    async def follow(self, poll_s: float, drain_timeout_s: float) -> None:
        """Look for another release in production and on trial, for ever; swap to it.

        Each by itself: while one that is tried is loaded, a promotion or a rollback waits for nothing.
        """
        looks = (self._look_at_production, self._look_at_trial)
        await asyncio.gather(*(self._repeat(look, poll_s, drain_timeout_s) for look in looks))

    async def look(self, drain_timeout_s: float) -> None:
        """Swap if the channel has moved, and load or leave what is on trial if that has changed."""
        await self._look_at_production(drain_timeout_s)
        await self._look_at_trial(drain_timeout_s)

    async def _repeat(self, look: Callable[[float], Awaitable[None]], poll_s: float, drain_timeout_s: float) -> None:
        while True:
            await asyncio.sleep(poll_s)
            try:
                await look(drain_timeout_s)
            except Exception as error:  # a database that is away for a while must not end the watch
                log_event("looked", error=f"{type(error).__name__}: {error}")

    async def _look_at_production(self, drain_timeout_s: float) -> None:
        release = await asyncio.to_thread(self.books.registry.production)
        serving = None if self._current is None else self._current.release.number
        if release is None or release.number == serving or self._waits(release.number):
            return
        begin = time.perf_counter()
        try:
            fresh = self._tried_as(release.number) or await self._loaded_once(release)
        except Exception as error:  # whatever is wrong with a release, the one before it goes on
            await asyncio.to_thread(self._refuse, release, error, release.number)
            return
        self._refused.pop(release.number, None)
        # No await from here to the end of the swap: a request sees the old release or the new one.
        old, self._current = self._current, fresh
        if self._tried is fresh:
            self._tried = self._trial = None
        if old is not None:
            self._leave(old, drain_timeout_s)
        seconds = time.perf_counter() - begin
        log_event("swapped", release=release.name, seconds=round(seconds, 2), replica=self._replica)
        metrics.SERVE_SWAPS.add(outcome="swapped")
        metrics.SERVE_SWAP_SECONDS.observe(seconds)
        detail = {"replica": self._replica}
        write = self.books.journal.write
        await asyncio.to_thread(write, "swapped", subject=release.name, detail=detail, seconds=seconds)

    async def _look_at_trial(self, drain_timeout_s: float) -> None:
        standing = await asyncio.to_thread(self.books.registry.standing)
        self._take_up(standing, drain_timeout_s)
        trial, release = standing.trial, standing.tried
        if trial is None or release is None or self._find(release.number) is not None:
            return
        key = ("trial", trial.begun)
        if self._waits(key):
            return
        begin = time.perf_counter()
        told = {"trial": trial.begun, "replica": self._replica}
        try:
            fresh = await self._loaded_once(release, beside=True)
        except Exception as error:  # whatever is wrong with it, production goes on
            await asyncio.to_thread(self._refuse, release, error, key, told)
            return
        self._refused.pop(key, None)
        standing = await asyncio.to_thread(self.books.registry.standing)
        if fresh is self._current:  # promoted while it was loaded
            return
        self._tried = fresh
        self._take_up(standing, drain_timeout_s)
        seconds = time.perf_counter() - begin
        log_event("loaded", release=release.name, seconds=round(seconds, 2), replica=self._replica)
        write = self.books.journal.write
        await asyncio.to_thread(write, "trial_loaded", subject=release.name, detail=told, seconds=seconds)

    def _take_up(self, standing: Standing, drain_timeout_s: float) -> None:
        """Go by the trial as the registry has it: its share, its kind, or its end."""
        tried, number = self._tried, None if standing.trial is None else standing.trial.release
        if tried is not None and tried.release.number == number:
            self._trial = standing.trial
            return
        in_production = None if standing.production is None else standing.production.number
        if tried is None or tried.release.number == in_production:  # which is about to be swapped to
            return
        self._tried = self._trial = None
        self._leave(tried, drain_timeout_s)

    def _tried_as(self, number: int) -> Served | None:
        return self._tried if self._tried is not None and self._tried.release.number == number else None

    def _waits(self, key: Hashable) -> bool:
        """Whether what was refused is not to be tried again yet."""
        refused = self._refused.get(key)
        return refused is not None and self._clock() < refused.again_at

    def _leave(self, old: Served, drain_timeout_s: float) -> None:
        """Others take its place; what it has begun it ends."""
        self._warm.append(old)
        task = asyncio.create_task(self._drain(old, drain_timeout_s))
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)

    def close(self, drain_timeout_s: float) -> None:
        """Take no more, and let what is in flight end."""
        if self._current is not None:
            self._current.engine.close(drain_timeout_s)
        if self._tried is not None:
            self._tried.engine.close(drain_timeout_s)

    async def _loaded_once(self, release: Release, *, beside: bool = False) -> Served:
        """The release, loaded; whoever asks for it while it is being loaded gets the same."""
        task = self._loading.get(release.number)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(self._loaded, release, beside=beside))
            self._loading[release.number] = task
            task.add_done_callback(lambda _: self._loading.pop(release.number, None))
        return await asyncio.shield(task)

    def _loaded(self, release: Release, *, beside: bool = False) -> Served:
        """`beside` production, if there is room for it; production itself is loaded in any case."""
        model = self.books.artifacts.get(Model, release.model)
        folder = self.books.artifacts.fetch(model)
        if beside:
            self._require_room(folder)
        engine, tokenizer = self._load(folder)
        try:
            adapters, refused = put_on(engine, tokenizer, release, self.books)
        except BaseException:
            engine.close(0.0)
            raise
        return Served(release=release, engine=engine, tokenizer=tokenizer, adapters=adapters, refused=refused)

    def _refuse(
        self, release: Release, error: Exception, key: Hashable, told: Mapping[str, object] | None = None
    ) -> None:
        """Remember when to try again, and write the reason down where it is new."""
        before = self._refused.get(key)
        times = 1 if before is None else before.times + 1
        pause_s = min(_FIRST_RETRY_S * 2 ** (times - 1), _LONGEST_RETRY_S)
        reason = f"{type(error).__name__}: {error}"
        self._refused[key] = Refused(reason=reason, times=times, again_at=self._clock() + pause_s)
        log_event("load_failed", release=release.name, reason=reason)
        metrics.SERVE_SWAPS.add(outcome="load_failed")
        if before is None or before.reason != reason:
            self.books.journal.write("load_failed", subject=release.name, detail={"reason": reason, **(told or {})})

    async def _drain(self, old: Served, drain_timeout_s: float) -> None:
        """Close a release after its last answer, or cut off what is left when the time is up."""
        # Looked at, not waited for in a thread: a few swaps would take all threads that answers are written with.
        deadline = time.monotonic() + drain_timeout_s
        while (old in self._holds or old.engine.num_unfinished) and time.monotonic() < deadline:
            await asyncio.sleep(_DRAIN_POLL_S)
        self._warm.remove(old)
        await asyncio.to_thread(old.engine.close, 0.0)
