"""Asking for a retrain: what was asked, and what stands in its way now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from aifactory.errors import StateError
from aifactory.improve.decision import Decision, Wait
from aifactory.improve.evaluation import decide_now
from aifactory.records.books import Books
from aifactory.records.retrain_requests import RetrainRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrainAsked:
    """Requests, and what would be decided now."""

    requests: Sequence[RetrainRequest]
    decision: Decision

    def to_json(self) -> dict[str, Any]:
        return {"requests": [asdict(each) for each in self.requests], "decision": self.decision.to_json()}

    def lines(self) -> list[str]:
        """The same as text."""
        lines = [f"{each.id} ({each.reason}): {each.state}" for each in self.requests] or ["No request was open."]
        if any(each.state == "open" for each in self.requests):
            now = "waits" if isinstance(self.decision, Wait) else "begins it at its next look"
            lines.append(f"The evaluation actor {now}: " + "; ".join(self.decision.reasons))
            lines.append("It runs with `aifactory improve`; `aifactory status` shows the cycle.")
        return lines


def ask(books: Books, *, reason: str, despite_cooldown: bool, key: str | None) -> RetrainAsked:
    """Ask for a retrain of the release in production. Raises StateError where there is none."""
    if books.registry.production() is None:
        raise StateError(
            f"expected a release of the factory {books.config.name} in production to retrain, found none; run a cycle first: "
            "aifactory run CONFIG."
        )
    request = books.retrain_requests.ask(reason=reason, despite_cooldown=despite_cooldown, key=key)
    return RetrainAsked(requests=[request], decision=decide_now(books))


def withdraw_open(books: Books, *, reason: str) -> RetrainAsked:
    """Withdraw the requests that no cycle has taken up."""
    return RetrainAsked(requests=books.retrain_requests.withdraw(reason=reason), decision=decide_now(books))
