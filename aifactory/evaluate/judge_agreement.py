"""How far a judge agrees with people, on pairs or single answers that people have labelled, and whether it loves a place.

Source   Cohen 1960, "A Coefficient of Agreement for Nominal Scales", Educ. Psychol. Meas. 20; the interval of kappa is a bootstrap
         of the rows (Efron & Tibshirani 1993, chapter 13), that of a share Wilson's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from aifactory.errors import ConfigError
from aifactory.evaluate.judge import Judged, Pair, wilson

_SAMPLES = 2000
MeasuredKind = Literal["pairs", "answers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledAnswer:
    """An answer, and whether a person finds it good."""

    prompt: str
    answer: str
    is_good: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A share with its 95 % interval."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.0%} [{self.low:.0%}, {self.high:.0%}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeAgreement:
    """What a judge is worth on one kind of labelled rows."""

    kind: MeasuredKind
    number: int
    accuracy: Share
    """Rows of which it says what people say. What it says unclearly agrees with nobody."""
    kappa: float
    """Cohen's: 1 is perfect, 0 is what chance gives; 0, too, where people say the same of all rows."""
    kappa_low: float
    kappa_high: float
    unclear: int
    """Rows of which it did not say what can be read (of pairs: of either order)."""
    first_place: Share | None = None
    """Of pairs: how often it prefers the answer that is shown first, in both orders together. Without a love of places: half."""
    consistent: float | None = None
    """Of pairs: the share of which it says the same in both orders."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The same as text."""
        lines = [
            f"{self.number} labelled {self.kind}: accuracy {self.accuracy}, kappa {self.kappa:.2f} [{self.kappa_low:.2f}, "
            f"{self.kappa_high:.2f}], {self.unclear} unclear"
        ]
        if self.first_place is not None:
            lines.append(
                f"  position: the first shown is preferred in {self.first_place}; {self.consistent:.0%} the same in both orders"
            )
        return lines


def read_labels(text: str, *, origin: str) -> tuple[list[Pair], list[LabelledAnswer]]:
    """Pairs and answers that people have labelled, from JSON lines of either kind. Raises ConfigError."""
    pairs: list[Pair] = []
    answers: list[LabelledAnswer] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        row = _row(line)
        strings = {name for name, value in row.items() if isinstance(value, str)}
        if strings >= {"prompt", "first", "second"} and row.get("preferred") in ("first", "second", "tie"):
            pairs.append(Pair(**{name: row[name] for name in ("prompt", "first", "second", "preferred")}))
        elif strings >= {"prompt", "answer"} and isinstance(row.get("good"), bool):
            answers.append(LabelledAnswer(prompt=row["prompt"], answer=row["answer"], is_good=row["good"]))
        else:
            raise ConfigError(
                f'{origin}:{number}: expected {{"prompt", "answer", "good": true | false}} or {{"prompt", "first", "second", '
                f'"preferred": "first" | "second" | "tie"}}, found {line[:120]!r}; correct or delete the line.'
            )
    if not pairs and not answers:
        raise ConfigError(f"expected rows that people have labelled in {origin}, found none; label some.")
    return pairs, answers


def agreement_on_pairs(pairs: Sequence[Pair], judged: Sequence[Judged]) -> JudgeAgreement:
    """Of what a judge said of labelled pairs, shown in both orders."""
    people = [str(pair.preferred) for pair in pairs]
    machine = [each.preferred for each in judged]
    firsts = sum((each.forward > 0) + (each.backward < 0) for each in judged)
    seconds = sum((each.forward < 0) + (each.backward > 0) for each in judged)
    return _agreement(
        "pairs",
        people,
        list(machine),
        unclear=sum(each.unclear > 0 for each in judged),
        first_place=_share(firsts, firsts + seconds),
        consistent=sum(each.forward == each.backward for each in judged) / len(judged),
    )


def agreement_on_answers(answers: Sequence[LabelledAnswer], bad: Sequence[bool | None]) -> JudgeAgreement:
    """Of what a judge said of labelled answers, each by itself: whether it is bad, or None where that can't be read."""
    people = ["good" if each.is_good else "bad" for each in answers]
    machine = ["unclear" if each is None else "bad" if each else "good" for each in bad]
    return _agreement("answers", people, machine, unclear=machine.count("unclear"))


def _agreement(
    kind: MeasuredKind, people: Sequence[str], machine: Sequence[str], *, unclear: int, **more: Any
) -> JudgeAgreement:
    names = sorted({*people, *machine})
    at = {name: i for i, name in enumerate(names)}
    counts_KK = np.zeros((len(names), len(names)))
    for one, other in zip(people, machine, strict=True):
        counts_KK[at[one], at[other]] += 1
    number = len(people)
    generator = np.random.Generator(np.random.Philox(key=0))
    drawn_SKK = generator.multinomial(number, counts_KK.ravel() / number, size=_SAMPLES).reshape(-1, *counts_KK.shape)
    low, high = np.quantile(_kappa(drawn_SKK), [0.025, 0.975])
    return JudgeAgreement(
        kind=kind,
        number=number,
        accuracy=_share(int(np.trace(counts_KK)), number),
        kappa=float(_kappa(counts_KK[None])[0]),
        kappa_low=float(low),
        kappa_high=float(high),
        unclear=unclear,
        **more,
    )


def _kappa(counts_SKK: Any) -> Any:
    number = counts_SKK.sum(axis=(1, 2))
    same = np.trace(counts_SKK, axis1=1, axis2=2) / number
    chance = (counts_SKK.sum(axis=1) * counts_SKK.sum(axis=2)).sum(axis=1) / number**2
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(chance < 1 - 1e-12, (same - chance) / (1 - chance), 0.0)


def _share(count: int, number: int) -> Share:
    if not number:
        return Share(estimate=0.5, low=0.0, high=1.0)
    low, high = wilson(count / number, number)
    return Share(estimate=count / number, low=low, high=high)


def _row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
