"""The rehearsal: simulated users close the loop once, over real HTTP, and what they saw is written down.

    serve, improve ─▶ users ask and correct ─▶ the evaluation actor decides and retrains ─▶ the release is swapped in
                      └──────────────── requests at a constant rate all the while ────────────────┘

Killed anywhere, the same command goes on: feedback that was acknowledged is not given again, a cycle that runs is seen
through, and what has ended stays as it is.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from aifactory.errors import AIFactoryError, ConfigError
from aifactory.improve.decision import Wait
from aifactory.improve.evaluation import BITS, decide_now
from aifactory.improve.evaluator import stop as stop_evaluator
from aifactory.ingest.sources import list_files, read_rows
from aifactory.observe.events import log_event
from aifactory.observe.progress import progress
from aifactory.records.identity import canonical_json, hash_text
from aifactory.records.journal import Cycle
from aifactory.records.rows import Rejected
from aifactory.serve.app import stop as stop_serving
from aifactory.traffic.users import Asked, Seen, ask_and_correct, questions, steady_requests

if TYPE_CHECKING:
    from aifactory.factory import Factory

REHEARSED = "rehearsed"
_POLL_S = 0.5
_ANSWERS_AFTER_SWAP = 5


def rehearse(factory: Factory) -> None:
    """Close the loop once with the configuration's simulated users; nothing happens if they have done so before."""
    traffic = factory.config.traffic
    assert traffic is not None
    name = rehearsal_name(factory)
    if any(event.subject == name for event in factory.books.journal.events(event=REHEARSED)):
        return
    if factory.books.registry.production() is None:
        return  # the first cycle was rejected: there is nothing to ask
    asked = _questions(factory)
    endpoint = factory.serve()
    factory.improve()
    try:
        with steady_requests(endpoint.url, endpoint.model, asked, traffic) as steady:
            done = factory.books.feedback.feedback_keys() & {question.key for question in asked}
            with progress("ask", total=len(asked)) as shown:
                seen = ask_and_correct(endpoint.url, endpoint.model, asked, traffic, done=done, shown=shown)
            log_event("asked", answers=sum(seen.answered.values()), corrected=len(seen.acknowledged) + len(done))
            cycle = _wait_for_the_loop(factory, steady)
        factory.books.journal.write(REHEARSED, subject=name, detail=_found(seen, steady, cycle, len(done)))
    finally:
        stop_evaluator(factory.config.name)
        stop_serving(factory.config.name)


def rehearsal_name(factory: Factory) -> str:
    """The identity of the rehearsal: what the users ask."""
    assert factory.config.traffic is not None
    plain = factory.config.traffic.model_dump(mode="json")
    del plain["source"]["path"], plain["timeout_s"]
    return hash_text(canonical_json(plain))[:16]


def _questions(factory: Factory) -> list[Asked]:
    traffic = factory.config.traffic
    assert traffic is not None
    texts = [
        (f"{file.source}:{row.cluster or file.origin}", row.text)
        for file in list_files([traffic.source])
        for row in read_rows(file)
        if not isinstance(row, Rejected)
    ]
    asked = questions(texts, traffic, factory.config.evaluate, factory=factory.config.name)
    if len(asked) < factory.config.improve.min_scored:
        raise ConfigError(
            f"expected the traffic's source to hold at least improve.min_scored = {factory.config.improve.min_scored} "
            f"questions, found {len(asked)} in {len(texts)} texts; lower it, or let traffic.source hold more."
        )
    return asked


def _wait_for_the_loop(factory: Factory, steady: Seen) -> Cycle | None:
    """The cycle that the evaluation actor began, ended and, if it was promoted, swapped in; None if it found no need.

    Raises   AIFactoryError after `traffic.timeout_s`.
    """
    traffic = factory.config.traffic
    assert traffic is not None
    deadline = time.monotonic() + traffic.timeout_s
    said: str | None = None
    while time.monotonic() < deadline:
        time.sleep(_POLL_S)
        cycle = next((c for c in reversed(factory.books.journal.cycles()) if c.bound.kind == "drift"), None)
        state = "scoring" if cycle is None else f"cycle {cycle.number} {cycle.state}"
        if state != said:
            said = state
            log_event("waiting", state=state)
        if cycle is None:
            unscored = factory.books.feedback.corrections(unscored_by=BITS, limit=1)
            if not unscored and isinstance(decide_now(factory.books), Wait):
                return None
        elif cycle.state == "promoted":
            release = factory.books.registry.production()
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
