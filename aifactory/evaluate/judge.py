"""The judge: a model elsewhere that says which of two answers is better, and how far it is to be believed.

Each pair is shown in both orders, since judges prefer places: what it says counts where both agree, and is a tie where they
do not. Its agreement with people is measured in the same way on pairs that people have labelled.

Source   Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv:2306.05685 (positions, their swap);
         Cohen 1960, "A Coefficient of Agreement for Nominal Scales", Educ. Psychol. Meas. 20.
"""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from aifactory.config import expand_environment
from aifactory.errors import ConfigError, JudgeError
from aifactory.evaluate.statistics import Interval, ratio_interval

if TYPE_CHECKING:
    from aifactory.config import Judge

Preferred = Literal["first", "second", "tie"]
_TRIES = 3
_PAUSE_S = 0.5
_MOST_BYTES = 1 << 20
_MOST_TOKENS = 8
_ASK = (
    "You compare two answers to one question. {rubric}\n"
    "Answer with one letter and nothing else: A if answer A is better, B if answer B is better, C if neither is."
)
_ASK_ALONE = (
    "You grade an answer to a question. {rubric}\n"
    "Answer with one letter and nothing else: A if the answer is good, B if it is not."
)
_SHOW_ALONE = "Question:\n{prompt}\n\nAnswer:\n{answer}\n\nIs it good (A) or not (B)?"
_SHOW = "Question:\n{prompt}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\nWhich is better, A, B or C?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two answers to a question."""

    prompt: str
    first: str
    second: str
    preferred: Preferred | None = None
    """By a person."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What was said of a pair: 1 for its first answer, -1 for its second, 0 for neither or nothing that can be read."""

    forward: float
    """Shown first to second."""
    backward: float
    """Shown second to first; still 1 for the first of the pair."""
    unclear: int = 0
    """Of the two answers, those that name no letter."""

    @property
    def value(self) -> float:
        return (self.forward + self.backward) / 2

    @property
    def preferred(self) -> Preferred:
        return "tie" if self.forward != self.backward or not self.forward else "first" if self.forward > 0 else "second"


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How often the judge says what people say."""

    share: float
    low: float
    high: float
    """95 % interval."""
    kappa: float
    """Cohen's: 1 is perfect, 0 is chance."""
    number: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class JudgeClient:
    """Asks a judge over HTTP."""

    def __init__(self, judge: Judge, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._judge = judge
        self._sleep = sleep
        self._key = None if judge.api_key is None else expand_environment(judge.api_key)

    def judge(self, pairs: Sequence[Pair]) -> list[Judged]:
        """What it says of each pair. Raises JudgeError if it can't be asked, or is another one than the one that is pinned."""
        system = _ASK.format(rubric=self._judge.rubric)
        letters = self._letters(
            [
                (system, _SHOW.format(prompt=pair.prompt, first=first, second=second))
                for pair in pairs
                for first, second in ((pair.first, pair.second), (pair.second, pair.first))
            ]
        )
        worth = {"A": 1.0, "B": -1.0}
        return [
            Judged(
                forward=worth.get(one or "", 0.0),
                backward=0.0 - worth.get(other or "", 0.0),
                unclear=(one is None) + (other is None),
            )
            for one, other in zip(letters[::2], letters[1::2], strict=True)
        ]

    def grade(self, asked: Sequence[tuple[str, str]]) -> list[bool | None]:
        """Of each prompt and answer, by itself: whether the answer is bad; None where that can't be read. Raises as `judge` does."""
        system = _ASK_ALONE.format(rubric=self._judge.answer_rubric)
        letters = self._letters([(system, _SHOW_ALONE.format(prompt=p, answer=answer)) for p, answer in asked])
        return [{"A": False, "B": True}.get(letter or "") for letter in letters]

    def _letters(self, asked: Sequence[tuple[str, str]]) -> list[str | None]:
        with ThreadPoolExecutor(self._judge.concurrency) as pool:
            try:
                return list(pool.map(lambda each: _letter(self._ask(*each)), asked))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # who fails once is not asked all the rest
                raise

    def _ask(self, system: str, shown: str) -> str:
        judge = self._judge
        body = {
            "model": judge.model,
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": shown},
            ],
            "temperature": 0,
            "max_tokens": _MOST_TOKENS,
            "seed": 0,
        }
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        url = f"{judge.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        told = self._answered(request)
        try:
            answer = json.loads(told)
            text = answer["choices"][0]["message"]["content"] or ""
            versions = {answer.get("model"), answer.get("system_fingerprint")} - {None}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise JudgeError(
                f"expected a chat completion from the judge at {judge.url}, found {told[:200]!r}; correct evaluate.judge.url."
            ) from error
        if judge.pinned not in versions:
            raise JudgeError(
                f"expected the judge {judge.pinned} at {judge.url}, found that it calls itself {sorted(versions)}; it was changed: "
                "set evaluate.judge.version to what it is now, and all is judged anew."
            )
        return str(text)

    def _answered(self, request: urllib.request.Request) -> bytes:
        for attempt in range(_TRIES):
            try:
                with urllib.request.urlopen(request, timeout=self._judge.timeout_s) as response:
                    return bytes(response.read(_MOST_BYTES))
            except urllib.error.HTTPError as error:
                found = f"{error.code} {error.reason}: {error.read(300).decode('utf-8', 'replace')}"
                if error.code != 429 and error.code < 500:
                    break  # asked again it would be no better
            except (OSError, http.client.HTTPException) as error:
                found = f"{type(error).__name__}: {error}"
            if attempt + 1 < _TRIES:
                self._sleep(_PAUSE_S * 4**attempt)
        raise JudgeError(
            f"expected an answer of the judge at {self._judge.url}, found {found}; see that it is up and that the key is right, "
            "then run the cycle again."
        )


def read_labelled(text: str, *, origin: str) -> list[Pair]:
    """Pairs that people have labelled, from JSON lines. Raises ConfigError."""
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            values = {name: row[name] for name in ("prompt", "first", "second", "preferred")}
            valid = all(isinstance(value, str) for value in values.values())
        except (ValueError, LookupError, TypeError):
            valid = False
        if not valid or values["preferred"] not in ("first", "second", "tie"):
            raise ConfigError(
                f'{origin}:{number}: expected {{"prompt", "first", "second", "preferred": "first" | "second" | "tie"}}, found '
                f"{line[:120]!r}; correct or delete the line."
            )
        pairs.append(Pair(**values))
    if not pairs:
        raise ConfigError(f"expected pairs that people have labelled in {origin}, found none; leave labelled out.")
    return pairs


def agreement(pairs: Sequence[Pair], judged: Sequence[Judged]) -> Agreement:
    """How often the judge says of labelled pairs what people say of them."""
    people, machine = [pair.preferred for pair in pairs], [each.preferred for each in judged]
    same = [float(one == other) for one, other in zip(people, machine, strict=True)]
    share = sum(same) / len(same)
    mine, theirs = Counter(machine), Counter(people)
    chance = sum(mine[each] * theirs[each] for each in mine) / len(same) ** 2
    low, high = wilson(share, len(same))
    kappa = (share - chance) / (1 - chance) if chance < 1 else 1.0
    return Agreement(share=share, low=low, high=high, kappa=kappa, number=len(same))


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What a judge says of a candidate beside the release in production."""

    version: str
    preference: Interval
    """From 1, all of the candidate's answers are better, to -1."""
    wins: int
    losses: int
    ties: int
    """Said so, or said otherwise when their places were changed."""
    consistent: float
    """Share of the pairs of which it says the same in both orders."""
    unclear: int
    """Answers that name no letter."""
    agreement: Agreement | None
    is_heeded: bool
    """Whether that is measured and high enough."""
    margin: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def judgement(
    judge: Judge,
    judged: Sequence[Judged],
    clusters: Sequence[str],
    agreed: Agreement | None,
    *,
    confidence: float,
    samples: int,
) -> Judgement:
    """The figures of what a judge said; `clusters` are those of the examples."""
    said = Counter(each.preferred for each in judged)
    values = [each.value for each in judged]
    return Judgement(
        version=judge.pinned,
        preference=ratio_interval(values, [1.0] * len(values), clusters, confidence=confidence, samples=samples),
        wins=said["first"],
        losses=said["second"],
        ties=said["tie"],
        consistent=sum(each.forward == each.backward for each in judged) / len(judged),
        unclear=sum(each.unclear for each in judged),
        agreement=agreed,
        is_heeded=agreed is not None and agreed.low >= judge.min_agreement,
        margin=judge.margin,
    )


def judgement_of(figures: Any) -> Judgement | None:
    """A judgement as a scorecard's record keeps it."""
    if figures is None:
        return None
    agreed = None if figures["agreement"] is None else Agreement(**figures["agreement"])
    return Judgement(**{**figures, "preference": Interval(**figures["preference"]), "agreement": agreed})


def _letter(text: str) -> str | None:
    found = re.search(r"\b([ABC])\b", text.strip())
    return found.group(1) if found else None


def wilson(share: float, number: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    z2 = 1.96**2
    middle = (share + z2 / (2 * number)) / (1 + z2 / number)
    half = (z2 * (share * (1 - share) / number + z2 / (4 * number**2))) ** 0.5 / (1 + z2 / number)
    # Of all or none it ends there, but for the last bit.
    return min(share, middle - half), max(share, middle + half)
