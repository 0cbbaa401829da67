"""Judging: the judge of the configuration measured beside people, and asked about answers that were given."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aifactory.config import Judge
from aifactory.errors import ConfigError
from aifactory.evaluate.judge import JudgeClient
from aifactory.evaluate.judge_agreement import (
    JudgeAgreement,
    agreement_on_answers,
    agreement_on_pairs,
    read_labels,
)
from aifactory.improve.judge_watch import why_unused
from aifactory.records.books import Books
from aifactory.records.verdicts import JUDGE_MEASURED


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeMeasurement:
    """What a judge is worth beside people, as it was kept, and whether that is enough."""

    judge: str
    """The version that is pinned."""
    labelled: str
    agreements: Sequence[JudgeAgreement]
    shortcomings: Sequence[str]
    """What the configuration asks for and was not reached."""

    @property
    def holds(self) -> bool:
        """Whether it reaches what the configuration asks for."""
        return not self.shortcomings

    def to_json(self) -> dict[str, Any]:
        return {
            "judge": self.judge,
            "labelled": self.labelled,
            "agreements": [each.to_json() for each in self.agreements],
            "holds": self.holds,
            "shortcomings": list(self.shortcomings),
        }

    def lines(self) -> list[str]:
        """The same as text."""
        lines = [f"The judge {self.judge} on {self.labelled}:"]
        lines += [line for each in self.agreements for line in each.lines()]
        return (
            [*lines, *self.shortcomings] if self.shortcomings else [*lines, "That is what the configuration asks for."]
        )


def measure_judge(books: Books, labelled: str) -> JudgeMeasurement:
    """Ask the judge of `evaluate.judge` about what people have labelled, and keep how far it agrees with them.

    Raises   ConfigError without a judge, and for a file that can't be read; JudgeError.
    """
    judge = _judge_of(books)
    try:
        text = Path(labelled).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"expected a text file of labelled rows at {labelled}, found: {error}.") from error
    pairs, answers = read_labels(text, origin=labelled)
    client = JudgeClient(judge)
    agreements = []
    if pairs:
        agreements.append(agreement_on_pairs(pairs, client.judge(pairs)))
    if answers:
        said = client.grade([(each.prompt, each.answer) for each in answers])
        agreements.append(agreement_on_answers(answers, said))
    digest = hashlib.sha256(text.encode()).hexdigest()
    for each in agreements:
        detail = {**each.to_json(), "version": judge.pinned, "labelled": digest}
        books.journal.write(JUDGE_MEASURED, subject=judge.measured_as(each.kind), detail=detail)
    return JudgeMeasurement(
        judge=judge.pinned,
        labelled=labelled,
        agreements=agreements,
        shortcomings=_shortcomings(books, judge, agreements),
    )


def require_measured(books: Books) -> None:
    """Raise ConfigError where answers that are given are to be judged by a judge that was not measured, or is not good enough."""
    if books.config.improve.live_judge is not None and (why := why_unused(books)) is not None:
        raise ConfigError(why)


class GradeAnswers:
    """Asks the judge about answers, each by itself. Cheap to pickle."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def __call__(self, asked: Sequence[tuple[str, str]]) -> list[bool | None]:
        """Of each prompt and answer: whether the answer is bad."""
        return JudgeClient(self._judge).grade(asked)


def _judge_of(books: Books) -> Judge:
    judge = books.config.evaluate.judge
    if judge is None:
        raise ConfigError(
            "expected evaluate.judge in the configuration, found none; say which judge is to be measured."
        )
    return judge


def _shortcomings(books: Books, judge: Judge, agreements: Sequence[JudgeAgreement]) -> list[str]:
    found = []
    of: Mapping[str, JudgeAgreement] = {each.kind: each for each in agreements}
    if "pairs" in of and of["pairs"].accuracy.low < judge.min_agreement:
        found.append(
            f"It agrees with people on at least {of['pairs'].accuracy.low:.0%} of pairs; evaluate.judge.min_agreement asks for "
            f"{judge.min_agreement:.0%}."
        )
    if "answers" in of and books.config.improve.live_judge is not None and (why := why_unused(books)) is not None:
        found.append(why)
    return found
