"""The rehearsal: simulated users close the loop once, over real HTTP, and what they saw is written down.

    serve, improve ─▶ users ask and correct ─▶ the evaluation actor decides and retrains ─▶ the release is swapped in
                      └──────────────── requests at a constant rate all the while ────────────────┘

Killed anywhere, the same command goes on: feedback that was acknowledged is not given again, a cycle that runs is seen
through, and what has ended stays as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from aifactory.config import Config
from aifactory.errors import AIFactoryError, ConfigError
from aifactory.observe.events import log_event
from aifactory.observe.progress import progress
from aifactory.records.books import Books
from aifactory.records.identity import hash_parts
from aifactory.records.journal import TICK_FAILED, Cycle
from aifactory.records.keys import IssuedKey
from aifactory.traffic.users import Asked, Seen, ask_and_correct, questions, steady_requests

REHEARSAL_BEGUN = "rehearsal_begun"
REHEARSED = "rehearsed"
_POLL_S = 0.5
_ANSWERS_AFTER_SWAP = 5
_KEY_SLACK_S = 86_400.0
"""What users may take to ask before they wait for the loop; a rehearsal that is killed leaves a key that ends by itself."""


class Loop(Protocol):
    """What the users need of a factory."""

    def open(self) -> tuple[str, str]:
        """Serve, and let the evaluation actor watch; the URL and the name of the model."""

    def is_settled(self) -> bool:
        """Whether all that was said was looked at and found to be no reason for a retrain."""

    def close(self) -> None:
        """End what `open` started."""


def rehearse(books: Books, loop: Loop, texts: Callable[[], Sequence[tuple[str, str]]]) -> None:
    """Close the loop once with the configuration's simulated users; nothing happens if they have done so before.

    `texts` gives pairs of a user and the text that this user knows.
    """
    config = books.config
    traffic = config.traffic
    assert traffic is not None
    asked = questions(texts(), traffic, config.evaluate, factory=config.name)
    name = rehearsal_name(asked)
    if any(event.subject == name for event in books.journal.events(event=REHEARSED)):
        return
    if books.registry.production() is None:
        return  # the first cycle was rejected: there is nothing to ask
    _require_enough(config, asked)
    begun_after = _begin(books, name)
    key = _key(books)
    token = None if key is None else key.token
    try:
        url, model = loop.open()
        with steady_requests(url, model, asked, traffic, token=token) as steady:
            done = books.feedback.feedback_keys() & {question.key for question in asked}
            with progress("ask", total=len(asked)) as shown:
                seen = ask_and_correct(url, model, asked, traffic, done=done, shown=shown, token=token)
            log_event("asked", answers=sum(seen.answered.values()), corrected=len(seen.acknowledged) + len(done))
            cycle = _wait_for_the_loop(books, loop, begun_after, seen, steady)
        books.journal.write(REHEARSED, subject=name, detail=_found(seen, steady, cycle, len(done)))
    finally:
        loop.close()
        if key is not None:
            books.keys.revoke(key.key.id, reason="the rehearsal has ended")


def _key(books: Books) -> IssuedKey | None:
    """A key for the users where one is required, for as long as they ask."""
    traffic = books.config.traffic
    assert traffic is not None
    if books.config.runtime.gateway.keys != "required":
        return None
    return books.keys.create("simulated users", expires_in_s=2 * traffic.timeout_s + _KEY_SLACK_S)


def rehearsal_name(asked: Sequence[Asked]) -> str:
    """The identity of the rehearsal: what the users ask, however fast and however long they do so."""
    return hash_parts(*(question.key for question in asked))[:16]


def _require_enough(config: Config, asked: Sequence[Asked]) -> None:
    if len(asked) < config.improve.min_scored:
        raise ConfigError(
            f"expected the traffic's source to hold at least improve.min_scored = {config.improve.min_scored} questions, "
            f"found {len(asked)}; lower it, raise traffic.requests, or let traffic.source hold more."
        )


def _begin(books: Books, name: str) -> int:
    """The number of the last cycle before the rehearsal, written down so that one that goes on knows it too."""
    for event in books.journal.events(event=REHEARSAL_BEGUN):
        if event.subject == name:
            return int(event.detail["after_cycle"])
    after_cycle = max((cycle.number for cycle in books.journal.cycles()), default=0)
    books.journal.write(REHEARSAL_BEGUN, subject=name, detail={"after_cycle": after_cycle})
    return after_cycle


def _wait_for_the_loop(books: Books, loop: Loop, begun_after: int, seen: Seen, steady: Seen) -> Cycle | None:
    """The cycle that the evaluation actor began, ended and, if it was promoted, swapped in; None if it found no need.

    Raises   AIFactoryError after `traffic.timeout_s`.
    """
    traffic = books.config.traffic
    assert traffic is not None
    deadline, started = time.monotonic() + traffic.timeout_s, books.journal.clock()
    said = "asking"
    while time.monotonic() < deadline:
        time.sleep(_POLL_S)
        begun = [c for c in books.journal.cycles() if c.bound.is_retrain and c.number > begun_after]
        cycle = begun[-1] if begun else None
        state = "scoring" if cycle is None else f"cycle {cycle.number} {cycle.state}"
        if state != said:
            said = state
            log_event("waiting", state=state)
        if cycle is None:
            if loop.is_settled():
                return None
        elif cycle.state == "promoted":
            release = books.registry.production()
            assert release is not None
            # Swapped in: answers have come from it.
            if steady.answered[release.name] >= _ANSWERS_AFTER_SWAP:
                return cycle
        elif cycle.state not in ("running", "trial"):
            return cycle
    failed = seen.failed + steady.failed
    stopped = [event for event in books.journal.events(event=TICK_FAILED) if event.at >= started]
    raise AIFactoryError(
        f"expected the loop to close within traffic.timeout_s = {traffic.timeout_s:g} s, found it at {said!r}"
        + (f" with {len(failed)} failed requests, the first: {failed[0]}" if failed else "")
        + (f"; the evaluation actor was stopped by: {stopped[-1].detail['error']}" if stopped else "")
        + "; the same command goes on from there. `aifactory status` says more."
    )


def _found(seen: Seen, steady: Seen, cycle: Cycle | None, before: int) -> dict[str, Any]:
    answered = seen.answered + steady.answered
    return {
        "requests": sum(answered.values()) + len(seen.failed) + len(steady.failed),
        "failed": len(seen.failed) + len(steady.failed),
        "failures": (seen.failed + steady.failed)[:10],
        "answered_by": dict(sorted(answered.items())),
        "corrections": len(seen.acknowledged) + before,
        "cycle": None if cycle is None else cycle.number,
    }
