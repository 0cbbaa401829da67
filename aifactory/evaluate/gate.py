"""The gate: from the figures of a scorecard to `Promote` or `Reject`, with reasons. Pure.

In this order, each with its figures: integrity, parity, guards, baseline, judge, no regression, no erosion, lm-eval, superiority. All are looked at, so that
a rejected candidate's reasons are complete. Where a batch's answers do not belong to its prompts the rejection names it, so that no
later candidate is trained on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aifactory.evaluate.guards import WORDS, GuardFigures, more_by_chance
from aifactory.evaluate.statistics import Interval, rate_sequence

if TYPE_CHECKING:
    from aifactory.config import PromoteGate
    from aifactory.evaluate.judge import Judgement
    from aifactory.evaluate.lm_eval import LmEvalFigures


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A candidate on one set of tasks, in bits per byte; a difference below zero is in its favour."""

    name: str
    candidate: Interval
    champion: Interval | None = None
    over_champion: Interval | None = None
    """Candidate minus the release in production, paired."""
    over_unigram: Interval | None = None
    """Candidate minus a model of token frequencies, paired."""
    prompt_gain: Interval | None = None
    """Of feedback: what the beginnings of answers cost more after another task's prompt than after their own."""
    exact: Interval | None = None
    """Share of the references that the candidate answers to the letter; none where there are no references."""
    exact_over_champion: Interval | None = None
    """The same, candidate minus the release in production, paired; above zero is in the candidate's favour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OverBest:
    """A candidate beside the release that is the best so far on the fixed holdout, where that is not the one in production."""

    release: str
    over: Interval
    """Candidate minus that one, bits per byte, paired."""
    exact: Interval | None = None
    """Of the references the share that is answered to the letter, likewise; none where there are no references."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchIntegrity:
    """A feedback batch on which no ancestor has trained, alone."""

    batch: str
    prompt_gain: Interval
    """As that of a comparison, on the batch's own holdout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that the gate looks at."""

    fixed: Comparison
    """The holdout of the sources."""
    target: Comparison | None
    """The holdout of the feedback; none where there is no feedback."""
    parity_error: float
    """Largest difference of a log-probability between trainer and server, nats."""
    best: OverBest | None = None
    """Beside the best release so far; none where that is the one in production, or there is none."""
    judge: Judgement | None = None
    """What a model elsewhere says of the answers; none where none was asked."""
    lm_eval: Sequence[LmEvalFigures] = ()
    """Tasks of lm-eval, where some were run."""
    guards: Sequence[GuardFigures] = ()
    """What answers may not hold, where they were looked through."""
    num_candidates: int = 1
    """Of so many it was chosen by these very scores; each interval then holds with a confidence of 1 - (1 - c) / so many, so
    that those of all candidates hold at once with c (Bonferroni), whichever was chosen."""
    new_batches: Sequence[BatchIntegrity] = ()
    """What is looked at alone, since a few bad rows among many good ones are not seen on the target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promote:
    """The candidate may be released."""

    reasons: Sequence[str] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return {"decision": "promote", "reasons": list(self.reasons)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """The candidate may not be released."""

    reasons: Sequence[str] = field(default=())
    refused: Sequence[str] = ()
    """Ids of feedback batches that no later cycle is to train on: their answers do not belong to their prompts."""

    def to_json(self) -> dict[str, Any]:
        refused = {"refused": list(self.refused)} if self.refused else {}
        return {"decision": "reject", "reasons": list(self.reasons), **refused}


Verdict = Promote | Reject


def judge(evidence: Evidence, gate: PromoteGate) -> Verdict:
    """Promote if and only if every check passes; the reasons say what was found in each."""
    checks = [check for check in _checks(evidence, gate) if check is not None]
    reasons = tuple(("passed: " if passed else "failed: ") + text for passed, text in checks)
    if all(passed for passed, _ in checks):
        return Promote(reasons=reasons)
    refused = [each.batch for each in evidence.new_batches if not (_batch_belongs(each, gate) or (True, ""))[0]]
    return Reject(reasons=reasons, refused=tuple(refused))


def _checks(evidence: Evidence, gate: PromoteGate) -> list[tuple[bool, str] | None]:
    deciding = evidence.target or evidence.fixed
    return [
        _choice(evidence, deciding) if evidence.num_candidates > 1 else None,
        _sample_size(evidence.fixed, gate),
        _sample_size(evidence.target, gate) if evidence.target else None,
        _answers_belong_to_prompts(evidence.target) if evidence.target else None,
        *(_batch_belongs(each, gate) for each in evidence.new_batches),
        _parity(evidence.parity_error, gate),
        *(_guard(found, evidence.fixed.candidate.confidence) for found in evidence.guards),
        _beats_unigram(evidence.fixed),
        _judge(evidence.judge) if evidence.judge is not None else None,
        _no_regression(evidence.fixed, gate) if evidence.target else None,
        _no_fewer_exact(evidence.fixed, gate),
        _no_erosion(evidence.best, evidence.fixed, gate),
        _no_erosion_of_exact(evidence.best, evidence.fixed, gate),
        *(_lm_eval(found) for found in evidence.lm_eval),
        _superiority(deciding),
    ]


def best_of(candidates: Sequence[Evidence]) -> int:
    """Which candidate needs the fewest bits per byte for what decides; of equals the first. What is no number is the worst."""
    bits = [(each.target or each.fixed).candidate.estimate for each in candidates]
    return min(range(len(bits)), key=lambda i: (math.isnan(bits[i]), bits[i]))


def _choice(evidence: Evidence, deciding: Comparison) -> tuple[bool, str]:
    number, found = evidence.num_candidates, deciding.candidate
    return True, (
        f"choice: the best of {number} candidates on {deciding.name}; each interval here holds with {found.confidence:.2%}, so "
        f"those of all {number} hold with {1 - number * (1 - found.confidence):.0%}, whichever was chosen"
    )


def _sample_size(on: Comparison, gate: PromoteGate) -> tuple[bool, str]:
    found = on.candidate
    passed = found.num_examples >= gate.min_tasks and found.num_clusters >= gate.min_clusters
    return passed, (
        f"sample: {found.num_examples} tasks of {found.num_clusters} independent rows or users on {on.name}, at least "
        f"{gate.min_tasks} of {gate.min_clusters} are needed"
    )


def _answers_belong_to_prompts(on: Comparison) -> tuple[bool, str] | None:
    if on.prompt_gain is None:
        return None
    return on.prompt_gain.low > 0, (
        f"integrity: after another task's prompt the answers of {on.name} begin at a cost of {on.prompt_gain} bits per byte "
        "more than after their own; above 0 they belong to their prompts"
    )


def _batch_belongs(batch: BatchIntegrity, gate: PromoteGate) -> tuple[bool, str] | None:
    """None where the batch has too few tasks of its own: then the target decides."""
    found = batch.prompt_gain
    if found.num_examples < gate.min_tasks or found.num_clusters < gate.min_clusters:
        return None
    return found.low > 0, (
        f"integrity: after another task's prompt the answers of {batch.batch} alone begin at a cost of {found} bits per byte "
        f"more than after their own, on {found.num_examples} tasks; above 0 they belong to their prompts"
    )


def _parity(error: float, gate: PromoteGate) -> tuple[bool, str]:
    return error <= gate.parity_tolerance, (
        f"parity: served and trained log-probabilities differ by {error:.2g} nats, at most {gate.parity_tolerance:g} is "
        "allowed"
    )


def _beats_unigram(on: Comparison) -> tuple[bool, str] | None:
    if on.over_unigram is None:
        return None
    return on.over_unigram.high < 0, (
        f"baseline: candidate minus unigram on {on.name} is {on.over_unigram} bits per byte, must be below 0"
    )


def _guard(found: GuardFigures, confidence: float) -> tuple[bool, str]:
    rate = rate_sequence(found.candidate, found.number, confidence=confidence)
    other = "" if found.champion is None else f", {found.champion} of production's"
    above = rate.low > found.tolerated
    more = found.champion is not None and more_by_chance(found) < 1 - confidence
    why = f"; at least {rate.low:.1%} is established, {found.tolerated:.1%} is tolerated"
    why += f"; by chance it would be so many more than production's in {more_by_chance(found):.2%}" if more else ""
    return not above and not more, (
        f"guard {found.guard}: {found.candidate} of {found.number} answers {WORDS[found.guard]}{other}{why}"
    )


def _judge(found: Judgement) -> tuple[bool, str]:
    said = (
        f"judge: {found.version} prefers the candidate in {found.wins}, production in {found.losses} and neither in {found.ties} "
        f"answers ({found.consistent:.0%} the same in both orders); its preference is {found.preference}"
    )
    agreed = found.agreement
    if not found.is_heeded:
        why = (
            "was not measured"
            if agreed is None
            else f"is {agreed.share:.0%} [{agreed.low:.0%}, {agreed.high:.0%}], too little"
        )
        return True, f"{said}; its agreement with people {why}, so that is not heeded"
    assert agreed is not None
    return found.preference.low >= -found.margin, (
        f"{said}, must not reach below {-found.margin:g}; it agrees with people on {agreed.share:.0%} [{agreed.low:.0%}, "
        f"{agreed.high:.0%}] of {agreed.number} pairs, kappa {agreed.kappa:.2f}"
    )


def _no_regression(on: Comparison, gate: PromoteGate) -> tuple[bool, str] | None:
    if on.over_champion is None:
        return None
    return on.over_champion.high <= gate.non_inferiority_margin, (
        f"no regression: candidate minus production on {on.name} is {on.over_champion} bits per byte, must not reach "
        f"above {gate.non_inferiority_margin:g}"
    )


def _no_fewer_exact(on: Comparison, gate: PromoteGate) -> tuple[bool, str] | None:
    if gate.exact_margin is None or on.over_champion is None:
        return None
    if on.exact_over_champion is None:
        return False, f"exact answers: no task on {on.name} has a reference, so promote.exact_margin can't be looked at"
    return on.exact_over_champion.low >= -gate.exact_margin, (
        f"exact answers: the candidate's share minus production's on {on.name} is {on.exact_over_champion}, must not reach "
        f"below {-gate.exact_margin:g}"
    )


def _no_erosion(best: OverBest | None, on: Comparison, gate: PromoteGate) -> tuple[bool, str] | None:
    if best is None:
        return None
    return best.over.high <= gate.most_eroded, (
        f"no erosion: candidate minus {best.release}, the best so far on {on.name}, is {best.over} bits per byte, must not reach "
        f"above {gate.most_eroded:g}, however many releases there are between them"
    )


def _no_erosion_of_exact(best: OverBest | None, on: Comparison, gate: PromoteGate) -> tuple[bool, str] | None:
    if best is None or gate.most_exact_eroded is None:
        return None
    if best.exact is None:
        return False, f"no erosion: no task on {on.name} has a reference, so promote.exact_margin can't be looked at"
    return best.exact.low >= -gate.most_exact_eroded, (
        f"no erosion: the candidate's share of exact answers minus that of {best.release}, the best so far on {on.name}, is "
        f"{best.exact}, must not reach below {-gate.most_exact_eroded:g}"
    )


def _lm_eval(found: LmEvalFigures) -> tuple[bool, str]:
    """A task of lm-eval; without a release in production it is shown."""
    said = f"lm-eval {found.task}: {found.metric} of the candidate is {found.candidate} over {found.candidate.num_examples} examples"
    if found.over_champion is None:
        return True, said
    return found.over_champion.low >= -found.margin, (
        f"{said}, minus production's {found.over_champion}, must not reach below {-found.margin:g}"
    )


def _superiority(on: Comparison) -> tuple[bool, str] | None:
    if on.over_champion is None:
        return None
    return on.over_champion.high < 0, (
        f"superiority: candidate minus production on {on.name} is {on.over_champion} bits per byte, must be below 0"
    )
