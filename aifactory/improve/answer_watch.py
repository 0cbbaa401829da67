"""The watch over answers: whether what is given breaks the guards more often than is tolerated. It writes down and changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from aifactory.evaluate.guards import GUARDS, WORDS
from aifactory.evaluate.statistics import rate_sequence
from aifactory.observe.events import log_event
from aifactory.records.artifacts import Model
from aifactory.records.books import Books

CheckAnswers = Callable[[Model, Sequence[str]], list[frozenset[str]]]
"""Which guards each of the answers of a model breaks."""
GUARD_BROKEN = "guard_broken"
"""Event: answers of the release `subject` are established to break the detail's `of` more often than is tolerated."""
_AT_ONCE = 200
_SETTLED_S = 5.0


class AnswerWatch:
    """Counts over the answers of the release in production, each once; killed, it counts again."""

    def __init__(self, books: Books, check: CheckAnswers) -> None:
        self.books = books
        self._check = check
        self._release: int | None = None
        self._last = (0.0, "")
        self._broken: Counter[str] = Counter()
        self.number = 0
        """Answers that were looked through."""

    def look(self) -> None:
        """Look through what is new."""
        policy, release = self.books.config.evaluate.guards, self.books.registry.production()
        if policy is None or release is None:
            return
        if release.number != self._release:
            self._release, self._last, self.number = release.number, (0.0, ""), 0
            self._broken.clear()
        until = self.books.journal.clock() - _SETTLED_S
        given = self.books.feedback.given(
            release=release.number, since=0.0, until=until, after=self._last, limit=_AT_ONCE
        )
        if not given:
            return
        model = self.books.artifacts.get(Model, release.model)
        for broken in self._check(model, [answer for *_, answer in given]):
            self._broken.update(broken)
        self._last = given[-1][:2]
        self.number += len(given)
        said = {e.detail["of"] for e in self.books.journal.events(event=GUARD_BROKEN) if e.subject == release.name}
        for guard in GUARDS:
            count, tolerated = self._broken[guard], policy.tolerated(guard)
            rate = rate_sequence(
                count, self.number, confidence=1 - (1 - self.books.config.improve.confidence) / len(GUARDS)
            )
            if rate.low > tolerated and guard not in said:
                text = (
                    f"{count} of {self.number} answers {WORDS[guard]}; at least {rate.low:.1%} is established, "
                    f"{tolerated:.1%} is tolerated"
                )
                detail = {"of": guard, "count": count, "number": self.number, "low": rate.low, "said": text}
                self.books.journal.write(GUARD_BROKEN, subject=release.name, detail=detail)
                log_event(GUARD_BROKEN, release=release.name, because=text)
