"""The watch by a judge: some of the answers that are given are shown to it, and whether too many are bad is decided by bets.

It triggers and never promotes. A judge whose agreement with people was not measured, or is below what is asked, is not used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from aifactory.evaluate.sequential import mean_exceeds
from aifactory.observe.events import log_event
from aifactory.records.books import Books
from aifactory.records.identity import share_of
from aifactory.records.registry import Release
from aifactory.records.verdicts import JUDGE_MEASURED, Verdict

Grade = Callable[[Sequence[tuple[str, str]]], list[bool | None]]
"""Of each prompt and answer: whether the answer is bad; None where the judge does not say."""
JUDGED_BAD = "judged_bad"
"""Event: answers of the release `subject`, since the detail's `since`, are established to be bad more often than is tolerated."""
UNJUDGED = "unjudged"
"""Event: why answers of the release `subject` are not judged for now."""
_AT_ONCE = 16
_LOOKED_THROUGH = 1000
_SETTLED_S = 5.0
_HOUR_S = 3600.0
_TRY_AGAIN_AFTER_S = 60.0
_LONGEST_ERROR = 500


class JudgeWatch:
    """Has answers of the release in production judged, each at most once; killed, it goes on where the verdicts end."""

    def __init__(self, books: Books, grade: Grade) -> None:
        self.books = books
        self._grade = grade
        # A judge may take minutes to answer, and nothing else of a tick waits for it.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="judge")
        self._asked: tuple[Release, str, list[str], Future[list[bool | None]]] | None = None
        self._of: tuple[int, float] | None = None
        self._last = (0.0, "")
        self._left_until = 0.0
        self._said: str | None = None

    def look(self, release: Release, since: float) -> None:
        """One look at the answers that `release` has given after `since`; what the judge says is kept at the next one."""
        policy, judge = self.books.config.improve.live_judge, self.books.config.evaluate.judge
        if policy is None or judge is None:
            return
        self._keep()
        self._decide(release, since)
        if self._asked is not None or self.books.journal.clock() < self._left_until:
            return
        if (why := why_unused(self.books)) is not None:
            self._leave(release, why)
            return
        some = self._sampled(release, since)
        if some:
            name = judge.measured_as("answers")
            future = self._pool.submit(self._grade, [each[1:] for each in some])
            self._asked = (release, name, [each[0] for each in some], future)

    def settle(self, timeout_s: float) -> None:
        """Wait until the judge has answered what it was asked."""
        deadline = time.monotonic() + timeout_s
        while self._asked is not None and not self._asked[3].done() and time.monotonic() < deadline:
            time.sleep(0.005)

    def _keep(self) -> None:
        """Keep what the judge has said since the last look."""
        if self._asked is None or not self._asked[3].done():
            return
        (release, judge, ids, future), self._asked = self._asked, None
        try:
            said = future.result()
        except Exception as error:  # a judge that is away must not end the watch over anything else
            self._of = None  # those that it did not answer are asked of again
            self._leave(release, f"{type(error).__name__}: {error}"[-_LONGEST_ERROR:])
            return
        self._said = None
        self.books.verdicts.add(
            [
                Verdict(completion=completion, release=release.number, judge=judge, is_bad=is_bad)
                for completion, is_bad in zip(ids, said, strict=True)
            ]
        )

    def _sampled(self, release: Release, since: float) -> list[tuple[str, str, str]]:
        """Id, prompt and answer of those that are to be judged next."""
        policy, books = self.books.config.improve.live_judge, self.books
        assert policy is not None
        if self._of != (release.number, since):
            self._of, self._last = (release.number, since), (since, "")
        now = books.journal.clock()
        given = books.feedback.given(
            release=release.number, since=since, until=now - _SETTLED_S, after=self._last, limit=_LOOKED_THROUGH
        )
        left = min(_AT_ONCE, policy.per_hour - books.verdicts.number_since(now - _HOUR_S))
        drawn = [each for each in given if share_of(each[1], salt="judge") < policy.share]
        known = books.verdicts.known([name for _, name, *_ in drawn])
        new = [each for each in drawn if each[1] not in known]
        if left <= 0:
            new = []  # of this hour enough was judged: what was given in it beyond that is passed over
        elif len(new) > left:
            new = new[:left]
            given = given[: given.index(new[-1]) + 1]
        if given:
            self._last = given[-1][:2]
        return [(name, prompt, answer) for _, name, prompt, answer in new]

    def _decide(self, release: Release, since: float) -> None:
        """Write it down, once, when too many answers are established to be bad."""
        policy, judge = self.books.config.improve.live_judge, self.books.config.evaluate.judge
        assert policy is not None and judge is not None
        if judged_bad(self.books, release, since) is not None:
            return
        bad = self.books.verdicts.of(release.number, judge=judge.measured_as("answers"), since=since)
        found = mean_exceeds(
            [float(each) for each in bad], [1.0] * len(bad), policy.tolerated, confidence=policy.confidence
        )
        if not found.is_established:
            return
        said = (
            f"{sum(bad)} of {len(bad)} answers are bad by {judge.pinned}, {policy.tolerated:.0%} is tolerated; the evidence that it "
            f"is more came to {found.won:.3g} to 1, {found.needed:.3g} to 1 establishes it at {policy.confidence:.0%}"
        )
        detail = {"since": since, "bad": sum(bad), "number": len(bad), "won": found.won, "said": said}
        self.books.journal.write(JUDGED_BAD, subject=release.name, detail=detail)
        log_event(JUDGED_BAD, release=release.name, because=said)

    def _leave(self, release: Release, why: str) -> None:
        """Ask no more for a while, and say why once."""
        self._left_until = self.books.journal.clock() + _TRY_AGAIN_AFTER_S
        if why != self._said:
            self._said = why
            self.books.journal.write(UNJUDGED, subject=release.name, detail={"error": why})
            log_event(UNJUDGED, release=release.name, error=why)


def judged_bad(books: Books, release: Release, since: float) -> Mapping[str, Any] | None:
    """What has established that answers of a release since then are bad too often; None where nothing has."""
    found = (e.detail for e in books.journal.events(event=JUDGED_BAD) if e.subject == release.name)
    return next((detail for detail in found if detail["since"] == since), None)


def why_unused(books: Books) -> str | None:
    """Why the judge of the configuration may not be used for answers that are given, and what to do; None where it may."""
    policy, judge = books.config.improve.live_judge, books.config.evaluate.judge
    assert policy is not None and judge is not None
    name = judge.measured_as("answers")
    found = [event.detail for event in books.journal.events(event=JUDGE_MEASURED) if event.subject == name]
    do = 'measure it: aifactory judge measure FILE CONFIG, with rows {"prompt", "answer", "good"} that people have labelled'
    if not found:
        return (
            f"expected the judge {judge.pinned} of improve.live_judge to have been measured beside people, with the rubric that it has "
            f"now, found that it was not; {do}, or leave improve.live_judge out."
        )
    accuracy, kappa = found[-1]["accuracy"]["low"], found[-1]["kappa_low"]
    if accuracy >= policy.min_agreement and kappa >= policy.min_kappa:
        return None
    return (
        f"expected the judge {judge.pinned} of improve.live_judge to agree with people on at least {policy.min_agreement:.0%} of answers, "
        f"with a kappa of at least {policy.min_kappa:g}, found {accuracy:.0%} and {kappa:.2f} by the lower ends of their intervals on "
        f"{found[-1]['number']} answers; take another judge or rubric, or label more answers and {do}."
    )
