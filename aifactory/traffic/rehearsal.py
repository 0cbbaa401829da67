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
from aifactory.records.identity import canonical_json, hash_text
from aifactory.records.journal import Cycle
from aifactory.traffic.users import Asked, Seen, ask_and_correct, questions, steady_requests

REHEARSED = "rehearsed"
_POLL_S = 0.5
_ANSWERS_AFTER_SWAP = 5


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
    name = rehearsal_name(config)
    if any(event.subject == name for event in books.journal.events(event=REHEARSED)):
        return
    if books.registry.production() is None:
        return  # the first cycle was rejected: there is nothing to ask
    asked = _questions(config, texts())
    url, model = loop.open()
    try:
        with steady_requests(url, model, asked, traffic) as steady:
            done = books.feedback.feedback_keys() & {question.key for question in asked}
            with progress("ask", total=len(asked)) as shown:
                seen = ask_and_correct(url, model, asked, traffic, done=done, shown=shown)
            log_event("asked", answers=sum(seen.answered.values()), corrected=len(seen.acknowledged) + len(done))
            cycle = _wait_for_the_loop(books, loop, steady)
        books.journal.write(REHEARSED, subject=name, detail=_found(seen, steady, cycle, len(done)))
    finally:
        loop.close()


def rehearsal_name(config: Config) -> str:
    """The identity of the rehearsal: what the users ask."""
    return hash_text(canonical_json(config.recipe("traffic")))[:16]


def _questions(config: Config, texts: Sequence[tuple[str, str]]) -> list[Asked]:
    assert config.traffic is not None
    asked = questions(texts, config.traffic, config.evaluate, factory=config.name)
    if len(asked) < config.improve.min_scored:
        raise ConfigError(
            f"expected the traffic's source to hold at least improve.min_scored = {config.improve.min_scored} questions, "
            f"found {len(asked)} in {len(texts)} texts; lower it, or let traffic.source hold more."
        )
    return asked


def _wait_for_the_loop(books: Books, loop: Loop, steady: Seen) -> Cycle | None:
    """The cycle that the evaluation actor began, ended and, if it was promoted, swapped in; None if it found no need.

    Raises   AIFactoryError after `traffic.timeout_s`.
    """
    traffic = books.config.traffic
    assert traffic is not None
    deadline = time.monotonic() + traffic.timeout_s
    said: str | None = None
    while time.monotonic() < deadline:
        time.sleep(_POLL_S)
        cycle = next((c for c in reversed(books.journal.cycles()) if c.bound.kind == "drift"), None)
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
        elif cycle.state != "running":
            return cycle
    raise AIFactoryError(
        f"expected the loop to close within traffic.timeout_s = {traffic.timeout_s:g} s, found it {said}; the same command "
        "goes on from there. `aifactory status` says more."
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
