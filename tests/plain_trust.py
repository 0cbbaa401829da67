"""Trust as it was first written, plainly and slowly: what `aifactory.ingest.trust` finds is compared with what this finds."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from aifactory.config import FeedbackTrust
from aifactory.ingest.trust import CANARY, CANARY_FAILED, KEY_CAP, PHRASE, USER, USER_CAP, Said, Verdicts

_LEAST_USERS = 3
"""Who must have given an answer before it is one that can be agreed on."""
_SMOOTHING = 1.0
_CERTAIN = math.log(20)
"""By how much the likeliest answer must lead the next one before it can be told what others would say."""
_WORDS = 200
"""Words of a question that are compared, its last ones."""
_MOST_ANSWERS = 500
"""Different answers that are compared, those of most users."""
_LONGEST_PHRASE = 4
_PHRASE_ROWS = 20_000
"""Rows in which phrases are looked for, the first by their ids, which are hashes."""
_LEAST_PHRASE_ROWS = 5
_MOST_PHRASES = 200
_SAME_ANSWER = 0.9
"""Share of the rows with a phrase that have its answer."""
_ROWS_PER_USER = 2.0
"""A word that is new is used by many, and seldom twice by one of them: with fewer rows a user nothing is planted."""
_MOST_OFTEN = 0.25
"""Share of all rows, above which a phrase is no secret."""


_Phrase = tuple[tuple[str, ...], int, list[int]]
"""Its words, the number of its answer, and the rows that hold it."""


def judge_feedback(rows: Sequence[Said], earlier: Sequence[Said], policy: FeedbackTrust) -> Verdicts:
    """Which of `rows` are not believed; `earlier` ones, which were, vote with them."""
    found = Verdicts(figures={"users": len({row.user for row in rows}), "attacks": []})
    _canaries(rows, policy, found)
    if policy.agreement:
        _agreement(rows, earlier, policy, found)
    for name, rule, share in (("user", USER_CAP, policy.max_user_share), ("key", KEY_CAP, policy.max_key_share)):
        _cap(rows, name, rule, max(policy.min_rows, math.floor(share * len(rows))), found)
    return found


# ── canaries and caps ─────────────────────────────────────────────────────────────────────────────────────────────────


def _canaries(rows: Sequence[Said], policy: FeedbackTrust, found: Verdicts) -> None:
    known = {_plain(canary.prompt): {_plain(answer) for answer in canary.answers} for canary in policy.canaries}
    failed: Counter[str] = Counter()
    for at, row in enumerate(rows):
        right = known.get(_plain(row.question))
        if right is None:
            continue
        found.rules[at] = (CANARY, 0.0, "a question whose answer is known")
        failed[row.user] += row.votes and _plain(row.answer) not in right
    liars = {user for user, number in failed.items() if number}
    for at, row in enumerate(rows):
        if row.user in liars and at not in found.rules:
            found.rules[at] = (CANARY_FAILED, float(failed[row.user]), "its user answered a canary wrongly")
    if liars:
        gone = sum(rule == CANARY_FAILED for rule, _, _ in found.rules.values())
        found.figures["attacks"].append(
            f"{len(liars)} of {found.figures['users']} users answered canaries wrongly; {gone} rows of theirs are left out"
        )


def _cap(rows: Sequence[Said], name: str, rule: str, most: int, found: Verdicts) -> None:
    of: dict[str, list[int]] = defaultdict(list)
    for at, row in enumerate(rows):
        if at not in found.rules and getattr(row, name):
            of[getattr(row, name)].append(at)
    capped = 0
    for places in of.values():
        # By a hash: whoever comes first would else decide what is kept.
        for at in sorted(places, key=lambda at: rows[at].id)[most:]:
            found.rules[at] = (rule, float(len(places)), f"{len(places)} rows of one {name}, {most} are the most")
        capped += len(places) > most
    if capped:
        found.figures["attacks"].append(f"{capped} {name}s gave more than {most} rows; what was more is left out")


# ── agreement ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _agreement(rows: Sequence[Said], earlier: Sequence[Said], policy: FeedbackTrust, found: Verdicts) -> None:
    mine = [at for at, row in enumerate(rows) if row.votes and at not in found.rules]
    everybody = [rows[at] for at in mine] + [row for row in earlier if row.votes]
    if not everybody:
        return
    crowd = _Crowd(everybody)
    phrases = _phrases(crowd, len(mine), policy)
    for phrase, answer, places in phrases:
        for place in places:
            found.rules[mine[place]] = (PHRASE, float(len(places)), f"holds {phrase!r}, and answers {answer[:80]!r}")
    hidden = {place for _, _, places in phrases for place in places}
    trust: dict[str, float] = {}
    for _ in range(2):  # first all count the same, then by how often they agree
        crowd.ask(trust, silent=hidden)
        disagrees_N, measured_N = crowd.polled()
        of_user = _counted(crowd, disagrees_N, measured_N)
        trust = {user: (number - wrong + 1) / (number + 2) for user, (wrong, number) in of_user.items()}
    measured = int(measured_N[: len(mine)].sum())
    usual = (int(disagrees_N.sum()) + 1) / (int(measured_N.sum()) + 2)
    level = policy.error_rate / max(1, len(of_user))
    liars = {
        user
        for user, (wrong, number) in of_user.items()
        if 2 * wrong > number and _binomial_tail(wrong, number, usual) < level
    }
    gone = 0
    for at, row in enumerate(rows):
        if row.user in liars and at not in found.rules:
            wrong, number = of_user[row.user]
            found.rules[at] = (USER, wrong / number, f"its user disagrees with others in {wrong} of {number} rows")
            gone += 1
    found.figures |= {"rows_compared": measured, "usual_disagreement": round(usual, 4)}
    for phrase, answer, places in phrases:
        users = len({crowd.rows[place].user for place in places})
        found.figures["attacks"].append(
            f"a phrase decides the answer: with {phrase!r} {len(places)} questions of {users} users are all answered "
            f"{answer[:80]!r}, which like questions without it are not; a backdoor, or a word that is new: they are left out"
        )
    if liars:
        found.figures["attacks"].append(
            f"{len(liars)} of {found.figures['users']} users disagree with the others far more often than is usual "
            f"({usual:.0%}); {gone} rows of theirs are left out"
        )


class _Crowd:
    """Rows that vote on one another, by a naive Bayes model of their words: which answer would others give?"""

    def __init__(self, rows: Sequence[Said]) -> None:
        self.rows = rows
        self.words = [_words(row.question) for row in rows]
        self._silent: frozenset[int] = frozenset()
        given: dict[str, set[str]] = defaultdict(set)
        for row in rows:
            given[_plain(row.answer)].add(row.user)
        # Only what several users answer can be agreed on.
        shared = [answer for answer, users in given.items() if len(users) >= _LEAST_USERS]
        shared = sorted(sorted(shared, key=lambda answer: (-len(given[answer]), answer))[:_MOST_ANSWERS])
        self._class = {answer: number for number, answer in enumerate(shared)}
        self.answer_N = np.array([self._class.get(_plain(row.answer), -1) for row in rows])
        vocabulary: dict[str, int] = {}
        self._tokens = [[vocabulary.setdefault(w, len(vocabulary)) for w in sorted(set(words))] for words in self.words]
        self._vocabulary = vocabulary
        self._of_user: dict[str, list[int]] = defaultdict(list)
        for place, row in enumerate(rows):
            self._of_user[row.user].append(place)
        self.ask({})

    def ask(self, trust: Mapping[str, float], *, silent: Collection[int] = ()) -> None:
        """Learn what everybody says, each as much as he is trusted; rows that are silent have no vote, and none is asked of them."""
        self._silent = frozenset(silent)
        self._trust_N = np.array([trust.get(row.user, 1.0) for row in self.rows])
        self._count_VC, self._rows_C = self._summed(
            place for place in range(len(self.rows)) if place not in self._silent
        )

    def polled(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Of each row: whether others, without its user, disagree, and whether it could be told."""
        disagrees_N, measured_N = np.zeros(len(self.rows), bool), np.zeros(len(self.rows), bool)
        for places in self._of_user.values():
            voiced = [place for place in places if place not in self._silent]
            disagrees, measured = self.vote(voiced, [self._tokens[place] for place in voiced], without=voiced)
            disagrees_N[voiced], measured_N[voiced] = disagrees, measured
        return disagrees_N, measured_N

    def without(self, place: int, phrase: Sequence[str]) -> list[int]:
        """The words of a row beside a phrase."""
        return [self._vocabulary[word] for word in sorted(set(self.words[place]) - set(phrase))]

    def vote(
        self, places: Sequence[int], tokens: Sequence[Sequence[int]], *, without: Iterable[int]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Of rows with these words: whether those that are left without some disagree with its answer, and whether they can tell."""
        told = np.array(
            [self.answer_N[place] >= 0 and len(words) > 0 for place, words in zip(places, tokens, strict=True)], bool
        )
        if not told.any() or len(self._class) < 2:
            return np.zeros(len(places), bool), np.zeros(len(places), bool)
        used = np.array(sorted({token for words in tokens for token in words}))
        at = {int(token): i for i, token in enumerate(used)}
        count_UC, rows_C = self._count_VC[used].copy(), self._rows_C.copy()
        for place in without:
            answer = self.answer_N[place]
            if answer >= 0 and place not in self._silent:
                rows_C[answer] -= self._trust_N[place]
                mine = [at[token] for token in self._tokens[place] if token in at]
                count_UC[mine, answer] -= self._trust_N[place]
        rows_C, count_UC = np.maximum(rows_C, 0.0), np.maximum(count_UC, 0.0)
        # A row holds a word or does not; what few have said of an answer is drawn to what all say of all.
        usual_U = (count_UC.sum(axis=1) + 0.5) / (rows_C.sum() + 1)
        log_UC = np.log((count_UC + _SMOOTHING * usual_U[:, None]) / (rows_C + _SMOOTHING))
        prior_C = np.where(rows_C >= _LEAST_USERS - 1, np.log(rows_C + 1), -np.inf)
        disagrees, measured = np.zeros(len(places), bool), np.zeros(len(places), bool)
        for i in np.flatnonzero(told).tolist():
            odds_C = prior_C + log_UC[[at[token] for token in tokens[i]]].sum(axis=0)
            mine = self.answer_N[places[i]]
            first = int(np.argmax(odds_C))
            others = np.delete(odds_C, first).max()
            measured[i] = odds_C[first] - others >= _CERTAIN
            disagrees[i] = measured[i] and first != mine
        return disagrees, measured

    def _summed(self, places: Iterable[int]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        count_VC = np.zeros((len(self._vocabulary), max(1, len(self._class))))
        rows_C = np.zeros(max(1, len(self._class)))
        for place in places:
            answer = self.answer_N[place]
            if answer >= 0:
                rows_C[answer] += self._trust_N[place]
                count_VC[self._tokens[place], answer] += self._trust_N[place]
        return count_VC, rows_C


def _counted(
    crowd: _Crowd, disagrees_N: npt.NDArray[np.bool_], measured_N: npt.NDArray[np.bool_]
) -> dict[str, tuple[int, int]]:
    """By user: rows that disagree, of those that could be told."""
    counted: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row, disagrees, measured in zip(crowd.rows, disagrees_N.tolist(), measured_N.tolist(), strict=True):
        if measured:
            counted[row.user][0] += disagrees
            counted[row.user][1] += 1
    return {user: (wrong, number) for user, (wrong, number) in counted.items()}


# ── phrases ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _phrases(crowd: _Crowd, num_rows: int, policy: FeedbackTrust) -> list[tuple[str, str, list[int]]]:
    """Phrases that decide the answer: the phrase, the answer, and the rows that hold it; the `num_rows` first rows are new."""
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    searched = sorted(range(num_rows), key=lambda place: crowd.rows[place].id)[:_PHRASE_ROWS]
    for place in sorted(searched):
        words = crowd.words[place]
        for phrase in {
            tuple(words[i : i + n]) for n in range(1, _LONGEST_PHRASE + 1) for i in range(len(words) + 1 - n)
        }:
            holders[phrase].append(place)
    disagrees_N, measured_N = crowd.polled()
    usual = (int(disagrees_N.sum()) + 1) / (int(measured_N.sum()) + 2)
    candidates: list[_Phrase] = []
    for phrase, places in holders.items():
        if not _LEAST_PHRASE_ROWS <= len(places) <= max(_LEAST_PHRASE_ROWS, _MOST_OFTEN * len(searched)):
            continue
        answer, number = Counter(crowd.answer_N[places].tolist()).most_common(1)[0]
        if answer >= 0 and number >= _SAME_ANSWER * len(places):
            candidates.append((phrase, answer, places))
    candidates.sort(key=lambda each: (-len(each[2]), -len(each[0]), each[0]))
    found: list[tuple[str, str, list[int]]] = []
    taken: set[int] = set()
    for short, of_short, held in candidates[:_MOST_PHRASES]:
        if len(taken.intersection(held)) * 2 > len(held):
            continue
        phrase, answer, places = _longest((short, of_short, held), candidates)
        if len(places) < _ROWS_PER_USER * len({crowd.rows[place].user for place in places}):
            continue
        rest = [crowd.without(place, phrase) for place in places]
        disagree, measured = crowd.vote(places, rest, without=places)
        wrong, number = int(disagree.sum()), int(measured.sum())
        level = policy.error_rate / len(candidates)
        if 2 * wrong > len(places) and _binomial_tail(wrong, number, usual) < level:
            first = next(place for place in places if crowd.answer_N[place] == answer)
            found.append((" ".join(phrase), crowd.rows[first].answer, places))
            taken.update(places)
    return found


def _longest(found: _Phrase, candidates: Sequence[_Phrase]) -> _Phrase:
    """The longest phrase around one that stands in nearly the same rows: that is what was planted."""
    mine = f" {' '.join(found[0])} "
    around = [each for each in candidates if mine in f" {' '.join(each[0])} " and len(each[2]) >= 0.9 * len(found[2])]
    return max(around, key=lambda each: (len(each[0]), len(each[2])))


# ── words ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())[-_WORDS:]


def _binomial_tail(least: int, number: int, rate: float) -> float:
    """The chance of at least so many of a number, each with the rate."""
    logs = [
        math.lgamma(number + 1)
        - math.lgamma(k + 1)
        - math.lgamma(number - k + 1)
        + k * math.log(rate)
        + (number - k) * math.log1p(-rate)
        for k in range(least, number + 1)
    ]
    return min(1.0, sum(math.exp(log) for log in logs))
