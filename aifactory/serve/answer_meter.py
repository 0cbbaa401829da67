"""What a replica measures of its answers. The clock is the event loop's; a token that an engine has made is counted where it
arrives, so that a reader who is slow makes no answer slow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from aifactory.observe import metrics
from aifactory.observe.usage import usage

if TYPE_CHECKING:
    from aifactory.serve.gateway import Gateway

NO_RELEASE = "none"
NO_ROUTE = "unknown"
QUEUE_FULL = "queue_full"
"""The code of a request for which there was no room."""


class AnswerMeter:
    """Measures the answers to one question."""

    def __init__(self, release: str, prompt_tokens: int, *, asked: float) -> None:
        """`asked`: when, on the loop's clock."""
        self._release = release
        self._asked = asked
        self._last: dict[int, float] = {}
        self._first = metrics.SERVE_FIRST_TOKEN.of(release=release)
        self._between = metrics.SERVE_BETWEEN_TOKENS.of(release=release)
        self._tokens = metrics.SERVE_ANSWER_TOKENS.of(release=release)
        self._prompt_tokens = prompt_tokens

    def admitted(self, now: float) -> None:
        """It is let into the engine."""
        metrics.SERVE_QUEUE_SECONDS.observe(now - self._asked)
        metrics.SERVE_PROMPT_TOKENS.add(self._prompt_tokens, release=self._release)

    def arrived(self, index: int, num_tokens: int, now: float) -> None:
        """Tokens of an answer have come."""
        if not num_tokens:
            return
        last = self._last.get(index)
        if last is None:
            self._first.observe(now - self._asked)
        else:
            self._between.observe((now - last) / num_tokens, num_tokens)
        self._last[index] = now
        self._tokens.add(num_tokens)

    def ended(self, how: str, times: int = 1) -> None:
        """So many of its answers have ended."""
        if times:
            metrics.SERVE_ANSWERS.add(times, release=self._release, end=how)


class Load:
    """What the answers of a replica wait for, from one taking to the next."""

    def __init__(self, gateway: Callable[[], Gateway]) -> None:
        """`gateway` gives the replica's, which may be made later."""
        self._gateway = gateway
        self._waiting_s = self._running_s = self._cache_share = 0.0
        self._before = usage()
        self._engine_s, self._refused, self._requests = _engine_s(), _refused(), _requests()

    def look(self, seconds: float) -> None:
        """What there is now has been for so long."""
        gateway = self._gateway()
        self._waiting_s += gateway.admission.waiting * seconds
        self._running_s += gateway.admission.running * seconds
        shares = [use.num_reserved / use.max_tokens for use in gateway.releases.cache_uses if use.max_tokens]
        self._cache_share = max([self._cache_share, *shares])

    def take(self) -> dict[str, Any]:
        """What was measured since it was last taken, as `bottleneck.ServingMeasured` has it."""
        endpoint = self._gateway().books.config.runtime.endpoint
        now, engine_s, refused, requests = usage(), _engine_s(), _refused(), _requests()
        used = now - self._before
        measured = {
            "kind": "serving",
            "seconds": used.seconds,
            "waiting_s": self._waiting_s,
            "running_s": self._running_s,
            "engine_s": engine_s - self._engine_s,
            "used": asdict(used),
            "cpus_each": endpoint.cpus_per_replica,
            "slots": endpoint.slots,
            "refused": int(refused - self._refused),
            "requests": int(requests - self._requests),
            "cache_share": self._cache_share,
            "gpus_each": endpoint.gpus_per_replica,
        }
        self._before, self._engine_s, self._refused, self._requests = now, engine_s, refused, requests
        self._waiting_s = self._running_s = self._cache_share = 0.0
        return measured


def _engine_s() -> float:
    return sum(series.sum for _, series in metrics.ENGINE_STEP_SECONDS.series())


def _requests() -> float:
    return sum(series.value for _, series in metrics.SERVE_REQUESTS.series())


def _refused() -> float:
    """For want of room; what a key's limits refuse waits for nothing."""
    return metrics.SERVE_REFUSED.of(code=QUEUE_FULL).value


def watch(gateway: Gateway) -> Callable[[], None]:
    """Set the gauges of a replica before each reading of the meters; what is returned ends that."""
    endpoint = gateway.books.config.runtime.endpoint

    def look() -> None:
        held, current = gateway.held, gateway.releases.current
        metrics.SERVE_WAITING.set(held["waiting"])
        metrics.SERVE_RUNNING.set(held["running"])
        metrics.SERVE_OPEN.set(held["open"])
        metrics.SERVE_SLOTS.set(endpoint.slots)
        metrics.SERVE_RELEASE.set(0 if current is None else current.release.number)
        uses = gateway.releases.cache_uses
        for state in ("used", "reserved", "kept"):
            metrics.SERVE_CACHE.set(sum(getattr(use, f"num_{state}") for use in uses), state=state)
        metrics.SERVE_CACHE.set(sum(use.max_tokens for use in uses), state="most")
        metrics.SERVE_REUSED.set(sum(use.num_reused for use in uses))

    return metrics.meters.before_reading(look)
