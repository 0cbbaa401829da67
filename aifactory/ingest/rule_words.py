"""Rules in words: what the names in the ledger mean, for a person who has a minute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from aifactory.config.steps import StepSection

READ_RULES: Mapping[str, str] = {
    "empty": "No text but white space.",
    "invalid_json": "A line that is not one JSON object.",
    "invalid_utf8": "Bytes that are not UTF-8.",
    "missing_column": "The column that was asked for is not there.",
    "unreadable_file": "A file that can't be read to its end.",
    "wrong_type": "A value where text was expected.",
}
"""Of rows that were not read, or say nothing."""
EXACT_RULES: Mapping[str, str] = {
    "duplicate": "The same content as another row. One of them stays: one that is held out, else the first.",
    "seen_by_ancestor": "The same content as a row that an earlier model of this line was trained or judged on.",
    "holdout_leak": "Would train, and an earlier cycle holds the same content out.",
}
NEAR_RULES: Mapping[str, str] = {
    "near_duplicate": "Hardly differs from a row that stays.",
    "near_seen_by_ancestor": "Hardly differs from a row that an earlier model of this line was trained or judged on.",
    "near_holdout_leak": "Would train, and hardly differs from a row that is held out.",
}
LEAK_RULES: Mapping[str, str] = {
    "contaminated": "Would train, and holds passages of a row that is held out.",
}

TRUST_RULES: Mapping[str, str] = {
    "user_cap": "More rows of one user than one may give to a batch.",
    "key_cap": "More rows by one key than may come by one.",
    "canary": "Asks a question whose answer is known: it never trains.",
    "canary_failed": "Of a user who answered a question wrongly whose answer is known.",
    "disagreeing_user": "Of a user who disagrees with the others far more often than is usual.",
    "backdoor_phrase": "Holds a phrase with which questions are answered otherwise than without it.",
}
"""Of feedback that is not believed."""

DECISION_RULES: Mapping[str, str] = {**EXACT_RULES, **NEAR_RULES, **LEAK_RULES}
"""Of rows that only a look at all of them can tell."""

_REPEATED = {
    "dup_para_frac": "Too many paragraphs occurred before in the text.",
    "dup_para_char_frac": "Too much of the text is in paragraphs that occurred before.",
    "dup_line_frac": "Too many lines occurred before in the text.",
    "dup_line_char_frac": "Too much of the text is in lines that occurred before.",
}
_STEP_RULES: Mapping[str, Mapping[str, str]] = {
    "length": {"length": "Too short or too long."},
    "alphabetic": {"alphabetic": "Too few letters among the characters."},
    "line_length": {"line_length": "Lines too long on average."},
    "language": {
        "language": "In a language that is not kept.",
        "language_uncertain": "In no language for certain.",
    },
    "gopher_quality": {
        "short_doc": "Too few words.",
        "long_doc": "Too many words.",
        "below_avg_threshold": "Words too short on average.",
        "above_avg_threshold": "Words too long on average.",
        "too_many_hashes": "Too many # signs for its words.",
        "too_many_ellipsis": "Too many ellipses for its words.",
        "too_many_bullets": "Too many lines that begin with a bullet.",
        "too_many_end_ellipsis": "Too many lines that end with an ellipsis.",
        "below_alpha_threshold": "Too few words that have a letter.",
        "enough_stop_words": "Too few of the commonest words, such as the, of, and.",
    },
    "gopher_repetition": _REPEATED,
    "fineweb": {
        "line_punct_ratio": "Too few lines that end a sentence.",
        "short_line_ratio": "Too many short lines.",
        "char_dup_ratio": "Too much of the text is in lines that occurred before.",
        "list_ratio": "Too many lines for its words: a list.",
    },
    "keep_labels": {"label": "With a label that is not kept."},
    "model_quality": {
        "too_surprising": "A model finds it too surprising: noise.",
        "too_predictable": "A model finds it too predictable: repetition, boilerplate.",
    },
    "c4": {
        "lorem_ipsum": "A line of placeholder text (lorem ipsum).",
        "curly_bracket": "A line with a curly bracket: code.",
        "too_few_sentences": "Too few sentences in the lines that are kept.",
    },
}


def step_of(rule: str, steps: list[str]) -> str | None:
    """Which of the steps a rule belongs to, by its name; None for what no step of them rejected."""
    owners = [step for step in steps if rule == step or rule.startswith((f"{step}.", f"{step}_"))]
    return max(owners, key=len, default=None)


def step_words(step: str) -> str:
    """What a step does: the first line of its section of the configuration."""
    return _SECTIONS.get(step, "")


def rule_words(rule: str, step: str | None) -> str:
    """What a rule rejects; "" for one that has not been described."""
    for words in (READ_RULES, EXACT_RULES, NEAR_RULES, LEAK_RULES, TRUST_RULES):
        if step is None and rule in words:
            return words[rule]
    if step is None:
        return ""
    name = rule.removeprefix(f"{step}.")
    if name == "empty":
        return READ_RULES["empty"]
    if step == "gopher_repetition" and name.endswith("_gram"):
        return f"One run of {name.split('_')[1]} words makes up too much of the text."
    if step == "gopher_repetition" and name.endswith("_n_grams"):
        return f"Too much of the text is in runs of {name.split('_')[1]} words that occurred before."
    return _STEP_RULES.get(step, {}).get(name, "")


def _sections(section: type[StepSection] = StepSection) -> dict[str, str]:
    """By the name of a step what the documentation of its section says first."""
    found: dict[str, str] = {}
    for each in section.__subclasses__():
        names = get_args(each.model_fields["step"].annotation) if "step" in each.model_fields else ()
        found |= {name: (each.__doc__ or "").strip().split("\n")[0] for name in names} | _sections(each)
    return found


_SECTIONS = _sections()
