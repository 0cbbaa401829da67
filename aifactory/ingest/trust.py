"""Trust: which feedback is believed. Caps on users and keys, canaries, and whether users agree with one another.

Users who know nothing of each other agree where they are right, since there are many ways to be wrong. So of each row it is asked
which answer the other users would give: the likeliest by a naive Bayes model of the words in their questions, in which each
counts as much as he agrees with others himself. It can be told where one answer leads clearly, and a row disagrees where it is not
its own. Honest users err too: one is rejected only if he disagrees significantly more often than all do in the mean (binomial
test, Bonferroni over users).

A backdoor hides from that: those who plant it agree, in rows that only they give. It is looked for by its phrase: a run of
words that nearly always brings the same answer, though by the rest of the question those who do not use it would give another.

Source   Dawid & Skene 1979, "Maximum Likelihood Estimation of Observer Error-Rates Using the EM Algorithm", J. R. Statist. Soc. C
         28 (whom to believe, from agreement alone; here two rounds, with one rate for each user); Chen et al. 2017, "Targeted Backdoor Attacks on Deep Learning Systems Using Data
         Poisoning", arXiv:1712.05526.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from aifactory.config import FeedbackTrust

USER_CAP, KEY_CAP, CANARY, CANARY_FAILED, USER, PHRASE = (
    "user_cap",
    "key_cap",
    "canary",
    "canary_failed",
    "disagreeing_user",
    "backdoor_phrase",
)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A row of feedback, as far as it is compared."""

    id: str
    question: str
    answer: str
    user: str
    key: str = ""
    """The key by which it came; "" where there was none."""
    votes: bool = True
    """Whether the answer is what the user says to be right."""


@dataclass(slots=True)
class Verdicts:
    """What is not believed, and what was found."""

    rules: dict[int, tuple[str, float, str]] = field(default_factory=dict)
    """By row: the rule, a score, and what was found in words."""
    figures: dict[str, Any] = field(default_factory=dict)
    """users, rows compared with others, the usual share of disagreement, and `attacks`, in words."""


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
        answers = [_plain(row.answer) for row in rows]
        given: dict[str, set[str]] = defaultdict(set)
        for row, answer in zip(rows, answers, strict=True):
            given[answer].add(row.user)
        # Only what several users answer can be agreed on.
        shared = [answer for answer, users in given.items() if len(users) >= _LEAST_USERS]
        shared = sorted(sorted(shared, key=lambda answer: (-len(given[answer]), answer))[:_MOST_ANSWERS])
        class_of = {answer: number for number, answer in enumerate(shared)}
        self._num_classes = len(shared)
        self.answer_N = np.array([class_of.get(answer, -1) for answer in answers], np.int64)
        vocabulary: dict[str, int] = {}
        self._tokens = [[vocabulary.setdefault(w, len(vocabulary)) for w in sorted(set(words))] for words in self.words]
        self.vocabulary = vocabulary
        self._first_N1, self._token_M = _joined(self._tokens)
        self._row_M = np.repeat(np.arange(len(rows)), np.diff(self._first_N1))
        answer_M = self.answer_N[self._row_M]
        # The pairs of a word and an answer that stand in some row, word by word.
        pairs = self._token_M[answer_M >= 0] * max(1, len(shared)) + answer_M[answer_M >= 0]
        pair_Z, found = np.unique(pairs, return_inverse=True)
        self._pair_M = np.full(len(self._token_M), -1, np.int64)
        self._pair_M[answer_M >= 0] = found
        word_Z, self._answer_Z = np.divmod(pair_Z, max(1, len(shared)))
        self._first_V1 = np.searchsorted(word_Z, np.arange(len(vocabulary) + 1)).astype(np.int64)
        places: dict[str, list[int]] = defaultdict(list)
        for place, row in enumerate(rows):
            places[row.user].append(place)
        self._of_user = list(places.values())
        self.ask({})

    def ask(self, trust: Mapping[str, float], *, silent: Collection[int] = ()) -> None:
        """Learn what everybody says, each as much as he is trusted; rows that are silent have no vote, and none is asked of them."""
        self._silent_N = np.zeros(len(self.rows), bool)
        self._silent_N[list(silent)] = True
        self._trust_N = np.array([trust.get(row.user, 1.0) for row in self.rows])
        votes_M = (self._pair_M >= 0) & ~self._silent_N[self._row_M]
        self._count_Z = np.bincount(
            self._pair_M[votes_M], weights=self._trust_N[self._row_M[votes_M]], minlength=len(self._answer_Z)
        )
        votes_N = (self.answer_N >= 0) & ~self._silent_N
        self._rows_C = np.bincount(
            self.answer_N[votes_N], weights=self._trust_N[votes_N], minlength=self._num_classes
        ).astype(np.float64)

    def polled(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Of each row: whether others, without its user, disagree, and whether it could be told."""
        groups = [[place for place in places if not self._silent_N[place]] for places in self._of_user]
        asked = [place for group in groups for place in group]
        disagrees_N, measured_N = np.zeros(len(self.rows), bool), np.zeros(len(self.rows), bool)
        disagrees_N[asked], measured_N[asked] = self._poll(groups, [self._tokens[place] for place in asked], groups)
        return disagrees_N, measured_N

    def without(self, place: int, phrase: Sequence[str]) -> list[int]:
        """The words of a row beside a phrase."""
        gone = {self.vocabulary[word] for word in phrase}
        return [token for token in self._tokens[place] if token not in gone]

    def vote(
        self, places: Sequence[int], tokens: Sequence[Sequence[int]], *, without: Sequence[int]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Of rows with these words: whether those that are left without some disagree with its answer, and whether they can tell."""
        return self._poll([places], tokens, [without])

    def _poll(
        self, groups: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]], without: Sequence[Sequence[int]]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """As `vote`, of several groups of rows, each without some rows of its own."""
        from aifactory.ingest.votes import poll  # numba takes its time

        first_G1, place_R = _joined(groups)
        disagrees_R, measured_R = np.zeros(len(place_R), bool), np.zeros(len(place_R), bool)
        if self._num_classes >= 2:
            poll(
                first_G1,
                place_R,
                *_joined(tokens),
                *_joined(without),
                self._first_N1,
                self._token_M,
                self._pair_M,
                self.answer_N,
                self._trust_N,
                self._silent_N,
                self._rows_C,
                self._first_V1,
                self._answer_Z,
                self._count_Z,
                _SMOOTHING,
                float(_LEAST_USERS - 1),
                _CERTAIN,
                disagrees_R,
                measured_R,
            )
        return disagrees_R, measured_R


def _joined(lists: Sequence[Sequence[int]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where each of the lists begins in all of them, with the end, and all of them."""
    first = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(each) for each in lists], out=first[1:])
    return first, np.fromiter(itertools.chain.from_iterable(lists), np.int64, count=int(first[-1]))


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
    searched = sorted(sorted(range(num_rows), key=lambda place: crowd.rows[place].id)[:_PHRASE_ROWS])
    disagrees_N, measured_N = crowd.polled()
    usual = (int(disagrees_N.sum()) + 1) / (int(measured_N.sum()) + 2)
    candidates = sorted(_decisive(crowd, searched), key=lambda each: (-len(each[2]), -len(each[0]), each[0]))
    texts = [f" {' '.join(phrase)} " for phrase, _, _ in candidates]
    found: list[tuple[str, str, list[int]]] = []
    taken: set[int] = set()
    for short in candidates[:_MOST_PHRASES]:
        if len(taken.intersection(short[2])) * 2 > len(short[2]):
            continue
        phrase, answer, places = _longest(short, candidates, texts)
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


def _decisive(crowd: _Crowd, searched: Sequence[int]) -> list[_Phrase]:
    """The phrases in some rows, not too few and not too many of which have it, that nearly all have one answer.

    A phrase is as frequent as its beginning at most, so only what is frequent is made longer.
    """
    most = max(_LEAST_PHRASE_ROWS, _MOST_OFTEN * len(searched))
    first, word_P = _joined([[crowd.vocabulary[word] for word in crowd.words[place]] for place in searched])
    row_P = np.repeat(np.arange(len(searched)), np.diff(first))
    answer_R = crowd.answer_N[np.asarray(searched, np.int64)] + 1  # 0: one that can't be agreed on
    num_words, num_answers = len(crowd.vocabulary) + 1, int(answer_R.max(initial=0)) + 1
    begins_Q, phrase_Q = np.arange(len(word_P)), word_P  # where each phrase stands, and its number
    found: list[_Phrase] = []
    for length in range(1, _LONGEST_PHRASE + 1):
        if not len(begins_Q):
            break
        # In how many rows each stands; one that is in a row twice is in it once.
        number_L, at_L, phrase_Q = np.unique(phrase_Q, return_index=True, return_inverse=True)
        in_rows = np.unique(phrase_Q * len(searched) + row_P[begins_Q])
        phrase_H, row_H = np.divmod(in_rows, len(searched))
        rows_L = np.bincount(phrase_H, minlength=len(number_L))
        answered, times = np.unique(phrase_H * num_answers + answer_R[row_H], return_counts=True)
        of_phrase, answer = np.divmod(answered, num_answers)
        is_decided = (answer > 0) & (times >= _SAME_ANSWER * rows_L[of_phrase])
        is_decided &= (rows_L[of_phrase] >= _LEAST_PHRASE_ROWS) & (rows_L[of_phrase] <= most)
        ends_L = np.cumsum(rows_L)
        for each, its_answer in zip(of_phrase[is_decided].tolist(), answer[is_decided].tolist(), strict=True):
            place, at = searched[row_P[begins_Q[at_L[each]]]], int(begins_Q[at_L[each]])
            begin = at - int(first[row_P[at]])
            rows = row_H[ends_L[each] - rows_L[each] : ends_L[each]].tolist()
            phrase = tuple(crowd.words[place][begin : begin + length])
            found.append((phrase, its_answer - 1, [searched[row] for row in rows]))
        goes_on = rows_L[phrase_Q] >= _LEAST_PHRASE_ROWS
        goes_on &= begins_Q + length < np.asarray(first)[row_P[begins_Q] + 1]
        begins_Q, phrase_Q = begins_Q[goes_on], phrase_Q[goes_on]
        phrase_Q = phrase_Q * num_words + word_P[begins_Q + length]
    return found


def _longest(found: _Phrase, candidates: Sequence[_Phrase], texts: Sequence[str]) -> _Phrase:
    """The longest phrase around one that stands in nearly the same rows: that is what was planted. The candidates are sorted by the
    number of their rows, the most first."""
    mine, least = f" {' '.join(found[0])} ", 0.9 * len(found[2])
    often = itertools.takewhile(lambda each: len(each[0][2]) >= least, zip(candidates, texts, strict=True))
    around = [each for each, text in often if mine in text]
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
