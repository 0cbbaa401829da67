"""Stages: what happened to the rows of a corpus, in order, and which rules took how many.

In       the figures of a corpus (see `pipeline`)
Law      what the stages take adds up to what was rejected: what the last one leaves is what was kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from aifactory.ingest.rule_words import (
    DECISION_RULES,
    EXACT_RULES,
    LEAK_RULES,
    NEAR_RULES,
    TRUST_RULES,
    step_of,
    step_words,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One of the things that happen to rows: reading, a step, a decision over all of them."""

    name: str
    words: str
    rows_in: int
    taken: int
    step: str | None = None
    """The step of the configuration, if it is one that looks at one row alone."""
    rules: Mapping[str, int] = field(default_factory=dict)
    """What each rule took, most first."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """What the step itself counted."""


def stages(figures: Mapping[str, Any]) -> list[Stage]:
    """What happened to the rows, in order; what the stages take adds up to what was rejected."""
    steps = figures["steps"]
    names = [step["step"] for step in steps]
    owners = {
        rule: step_of(rule, names)
        for rule in figures["rejected_by_rule"]
        if rule not in {*DECISION_RULES, *TRUST_RULES}
    }
    left = figures["rows_in"]
    found = []

    def add(name: str, words: str, rules: Mapping[str, int], taken: int, **more: Any) -> None:
        nonlocal left
        found.append(Stage(name=name, words=words, rows_in=left, taken=taken, rules=rules, **more))
        left -= taken

    read = _rules(figures, [rule for rule, owner in owners.items() if owner is None])
    add("reading", "Rows that can't be read, or say nothing.", read, sum(read.values()))
    for at, step in enumerate(steps):
        name = step["step"]
        # Of a step that comes twice the ledger has one name, so the rules stand at the first.
        mine = [rule for rule, owner in owners.items() if owner == name and name not in names[:at]]
        add(name, step_words(name), _rules(figures, mine), step.get("rows_rejected", 0), step=name, figures=step)
    is_quarantined = figures.get("quarantine") is not None
    near = ("near_duplicates", step_words("near_duplicates"))
    if is_quarantined:
        near = ("quarantine", "Rejects rows that would train and nearly equal one that is held out.")
    decisions = (
        ("trust", "Feedback that is not believed.", TRUST_RULES, "trust" in figures),
        ("exact duplicates", "Contents that are there already.", EXACT_RULES, True),
        (*near, NEAR_RULES, is_quarantined or "near_duplicates" in figures["corpus_steps"]),
        ("decontaminate", step_words("decontaminate"), LEAK_RULES, "decontaminate" in figures["corpus_steps"]),
    )
    for name, words, known, is_done in decisions:
        rules = _rules(figures, known)
        if is_done or rules:
            add(name, words, rules, sum(rules.values()))
    return found


def _rules(figures: Mapping[str, Any], wanted: Collection[str]) -> dict[str, int]:
    """What each of these rules rejected, most first."""
    rules = {rule: rows for rule, rows in figures["rejected_by_rule"].items() if rule in wanted}
    return dict(sorted(rules.items(), key=lambda item: (-item[1], item[0])))
