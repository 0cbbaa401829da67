"""Limits: what a rule with a threshold expects, in words, for the ledger."""

from __future__ import annotations

from collections.abc import Mapping

from aifactory.config import GopherRepetitionStep, RowStep

_OPTIONS: Mapping[str, tuple[str, str]] = {
    "gopher_quality.short_doc": ("at least", "min_doc_words"),
    "gopher_quality.long_doc": ("at most", "max_doc_words"),
    "gopher_quality.below_avg_threshold": ("at least", "min_avg_word_length"),
    "gopher_quality.above_avg_threshold": ("at most", "max_avg_word_length"),
    "gopher_quality.too_many_hashes": ("at most", "max_symbol_word_ratio"),
    "gopher_quality.too_many_ellipsis": ("at most", "max_symbol_word_ratio"),
    "gopher_quality.too_many_bullets": ("at most", "max_bullet_lines_ratio"),
    "gopher_quality.too_many_end_ellipsis": ("at most", "max_ellipsis_lines_ratio"),
    "gopher_quality.below_alpha_threshold": ("at least", "max_non_alpha_words_ratio"),
    "gopher_quality.enough_stop_words": ("at least", "min_stop_words"),
    "gopher_repetition.dup_para_frac": ("at most", "dup_para_frac"),
    "gopher_repetition.dup_para_char_frac": ("at most", "dup_para_char_frac"),
    "gopher_repetition.dup_line_frac": ("at most", "dup_line_frac"),
    "gopher_repetition.dup_line_char_frac": ("at most", "dup_line_char_frac"),
    "fineweb.line_punct_ratio": ("at least", "line_punct_thr"),
    "fineweb.short_line_ratio": ("at most", "short_line_thr"),
    "fineweb.char_dup_ratio": ("at most", "char_duplicates_ratio"),
    "fineweb.list_ratio": ("at most", "new_line_ratio"),
    "c4.too_few_sentences": ("at least", "min_num_sentences"),
}
"""By rule the option of its step that is its threshold, and on which side of it a text is kept."""
_FOUND: Mapping[str, str] = {
    "c4.lorem_ipsum": 'a line with "lorem ipsum"',
    "c4.curly_bracket": "a line with a curly bracket",
}
"""Rules without a threshold: what they look for."""


def beyond(step: RowStep, rule: str, score: float) -> str:
    """What was found of a row that broke a rule of a step, and what was expected of it."""
    if rule.endswith(".empty"):
        return "no text but white space is left"
    if rule in _FOUND:
        return f"{_FOUND[rule]}, expected none"
    if rule in _OPTIONS:
        side, option = _OPTIONS[rule]
        return f"{score:.6g}, expected {side} {getattr(step, option):g} ({option})"
    assert isinstance(step, GopherRepetitionStep), rule
    kind, words = rule.removeprefix("gopher_repetition.").split("_")[:2]
    option, limits = ("top_n_grams", step.top_n_grams) if kind == "top" else ("dup_n_grams", step.dup_n_grams)
    share = dict(limits)[int(words)]
    return f"{score:.6g}, expected at most {share:g} ({option}, {words} words)"
