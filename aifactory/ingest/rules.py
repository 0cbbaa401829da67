"""Rules: what a row must be like to be kept. Each returns the ledger's rule, score and detail, or None to keep it."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Literal

from aifactory.config import AlphabeticFilter, Filter, LengthFilter, LineLengthFilter

Broken = tuple[str, float, str]


def normalize(text: str, form: Literal["none", "nfc"]) -> str:
    """The text in the form that the configuration asks for."""
    return text if form == "none" else unicodedata.normalize("NFC", text)


def broken_rule(text: str, filters: Sequence[Filter]) -> Broken | None:
    """The first rule that the text breaks: its name, what it measured, and in words."""
    if not text.strip():
        return "empty", 0.0, "no text but white space"
    for rule in filters:
        broken = _check(text, rule)
        if broken is not None:
            return broken
    return None


def _check(text: str, rule: Filter) -> Broken | None:
    match rule:
        case LengthFilter():
            size = len(text.encode("utf-8", "surrogatepass"))
            if not rule.min_bytes <= size <= rule.max_bytes:
                return rule.rule, float(size), f"{size} bytes, not within {rule.min_bytes} to {rule.max_bytes}"
        case AlphabeticFilter():
            visible = "".join(text.split())
            share = sum(map(str.isalpha, visible)) / len(visible)
            if share < rule.min_share:
                return rule.rule, share, f"{share:.3f} of the visible characters are letters, not {rule.min_share}"
        case LineLengthFilter():
            mean = len(text) / (text.count("\n") + 1)
            if mean > rule.max_mean_chars:
                return rule.rule, mean, f"{mean:.0f} characters a line, more than {rule.max_mean_chars:g}"
    return None
