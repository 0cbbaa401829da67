"""Steps: what is done to the rows of a block, in the order of the configuration.

A step changes texts, adds columns or breaks rows by a rule; the first rule that a row breaks sends it to the ledger. Each
is a function of a row alone, so that neither blocks nor workers can be seen in what comes out.
Law      rows_in == rows_kept + rows_rejected, checked at each step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aifactory.config import (
    AlphabeticStep,
    C4Step,
    FineWebStep,
    GopherQualityStep,
    GopherRepetitionStep,
    KeepLabelsStep,
    LabelByFunctionStep,
    LabelByModelStep,
    LabelByRuleStep,
    LanguageStep,
    LengthStep,
    LineLengthStep,
    ModelQualityStep,
    ModelStep,
    PersonalStep,
    RowStep,
    Step,
    UnicodeStep,
)
from aifactory.ingest import labels, model_scores
from aifactory.ingest.columns import Verdicts
from aifactory.ingest.limits import beyond
from aifactory.ingest.model_scores import StepModel, step_model
from aifactory.records.rows import one_array
from aifactory.text.buffers import text_buffers

if TYPE_CHECKING:
    from aifactory.ingest.language import Languages


@dataclass(frozen=True, slots=True)
class Broken:
    """Rows that break a rule."""

    rows: pa.Table
    rules: list[str]
    scores: list[float]
    details: list[str]


@dataclass(slots=True)
class Figures:
    """What the steps did; adds up over blocks."""

    steps: list[Counter[str]] = field(default_factory=list)
    """By position in the configuration: rows_in, rows_kept, rows_rejected, and what the step itself counts."""

    def add(self, at: int, counted: Mapping[str, int]) -> None:
        while len(self.steps) <= at:
            self.steps.append(Counter())
        self.steps[at].update(counted)


@dataclass(frozen=True, slots=True)
class Applied:
    """What a step made of a block."""

    table: pa.Table
    verdicts: Verdicts | None = None
    details: Sequence[str] | None = None
    """In words what was found of each row, where the score does not say it."""
    before: pa.Table | None = None
    """The rows as they were, where the table has no text of those that are broken."""
    counted: Mapping[str, int] = field(default_factory=dict)


def apply_steps(
    table: pa.Table,
    steps: Sequence[RowStep],
    figures: Figures,
    *,
    restored: Mapping[str, frozenset[str]] | None = None,
    models: Mapping[str, StepModel] | None = None,
) -> tuple[pa.Table, list[Broken]]:
    """The rows that stay and those that go, each in the order of the block.

    restored   by rule the keys of rows that a person has brought back: that rule does not reject them again, nor do those
               of the same step that come after it, which nobody has asked about.
    models     the models that steps ask, by the names that the configuration gives them
    """
    rejected = []
    # Taking rows out copies all others, so what is broken stays where it is as long as the steps look at texts alone.
    stays_N = np.ones(table.num_rows, bool)
    for at, step in enumerate(steps):
        rows_in = int(stays_N.sum())
        if not isinstance(step, _TEXTS_ALONE) or rows_in < _LEAST_SHARE * table.num_rows:
            table = _without(table, stays_N)
            stays_N = np.ones(table.num_rows, bool)
        applied = _apply(table, step, models or {}, stays_N, writes_all=bool(restored))
        if step.CHANGES_TEXT:
            applied = _with_emptied(table, applied, stays_N)
        table = applied.table
        if applied.verdicts is not None:
            places, broken = _broken(table, step, applied, applied.verdicts, restored or {}, stays_N)
            if broken.rules:
                rejected.append(broken)
                stays_N[places] = False
        gone = rows_in - int(stays_N.sum())
        figures.add(at, {"rows_in": rows_in, "rows_kept": rows_in - gone, "rows_rejected": gone, **applied.counted})
    return _without(table, stays_N), rejected


def _without(table: pa.Table, stays_N: np.ndarray[Any, Any]) -> pa.Table:
    """The rows that stay."""
    if stays_N.all():
        return table
    mask, at = pa.array(stays_N), table.schema.get_field_index("text")
    texts = one_array(table["text"])
    _, offsets_N1 = text_buffers(texts)
    if not np.diff(offsets_N1)[~stays_N].any():
        # Those that go have no text any more, so that of the others lies end to end already.
        offsets = np.append(offsets_N1[:-1][stays_N], offsets_N1[-1])
        kept = pa.Array.from_buffers(
            texts.type, len(offsets) - 1, [None, pa.py_buffer(offsets.astype(np.int32)), texts.buffers()[2]]
        )
        return table.remove_column(at).filter(mask).add_column(at, "text", kept)
    return table.filter(mask)


def reject_empty(table: pa.Table) -> tuple[pa.Table, Broken]:
    """Rows without any text but white space, which no recipe keeps."""
    blank_N = _is_blank(one_array(table["text"]))
    count = int(blank_N.sum())
    gone = table.filter(pa.array(blank_N)) if count else table.slice(0, 0)
    broken = Broken(gone, ["empty"] * count, [0.0] * count, ["no text but white space"] * count)
    return (table.filter(pa.array(~blank_N)) if count else table), broken


def _is_blank(texts: pa.Array) -> np.ndarray[Any, Any]:
    """Which of N texts hold nothing but white space."""
    data_B, offsets_N1 = text_buffers(texts)
    starts_N, is_empty_N = offsets_N1[:-1], offsets_N1[1:] == offsets_N1[:-1]
    first_N = np.full(len(texts), 0x20, np.uint8)
    first_N[~is_empty_N] = data_B[starts_N[~is_empty_N]]
    # Hardly a text begins as one must that is blank, and only those are looked through.
    places = np.flatnonzero((first_N <= 0x20) | (first_N >= 0x80))
    blank_N: np.ndarray[Any, Any] = np.zeros(len(texts), bool)
    looked_at = texts.take(pa.array(places))
    blank_N[places] = pc.equal(pc.utf8_trim_whitespace(looked_at), "").to_numpy(zero_copy_only=False)
    return blank_N


def _with_emptied(table: pa.Table, applied: Applied, stays_N: np.ndarray[Any, Any]) -> Applied:
    """The rows of which a step leaves nothing, as they were before, break its rule `empty`."""
    after = one_array(applied.table["text"])
    count = table.num_rows
    known = applied.verdicts or Verdicts((), np.zeros(count, np.uint8), np.zeros(count))
    # None was empty before: such a row has been rejected.
    emptied = _is_blank(after) & stays_N & (known.broken_N == 0)
    if not emptied.any():
        return applied
    verdicts = Verdicts(
        (*known.rules, "empty"), np.where(emptied, len(known.rules) + 1, known.broken_N).astype(np.uint8), known.score_N
    )
    texts = pc.if_else(pa.array(emptied), one_array(table["text"]), after)
    return replace(applied, table=_with_texts(applied.table, texts), verdicts=verdicts)


def _broken(
    table: pa.Table,
    step: RowStep,
    applied: Applied,
    verdicts: Verdicts,
    restored: Mapping[str, frozenset[str]],
    stays_N: np.ndarray[Any, Any],
) -> tuple[np.ndarray[Any, Any], Broken]:
    """Which of the rows that are still there break a rule, and what there is to say of them."""
    places = np.flatnonzero((verdicts.broken_N != 0) & stays_N)
    names = [_full_name(step, rule) for rule in verdicts.rules]
    rules = [names[verdicts.broken_N[i] - 1] for i in places]
    if restored and len(places):
        keys = table["key"].take(pa.array(places)).to_pylist()
        stays = [key in restored.get(rule, ()) for key, rule in zip(keys, rules, strict=True)]
        places = places[~np.array(stays, bool)]
        rules = [rule for rule, kept in zip(rules, stays, strict=True) if not kept]
    if not len(places):
        return places, Broken(table.slice(0, 0), [], [], [])
    scores = verdicts.score_N[places].tolist()
    if applied.details is None:
        details = [_detail(step, rule, score) for rule, score in zip(rules, scores, strict=True)]
    else:
        details = [applied.details[i] for i in places.tolist()]
    rows = (table if applied.before is None else applied.before).take(pa.array(places))
    return places, Broken(rows, rules, scores, details)


def _full_name(step: RowStep, rule: str) -> str:
    """A rule as the ledger names it: after its step, where the step has several."""
    return rule if rule.startswith(step.step) else f"{step.step}.{rule}"


def _detail(step: RowStep, rule: str, score: float) -> str:
    """In words what was expected and what was found."""
    match step:
        case LengthStep():
            return f"{score:.0f} bytes, not within {step.min_bytes} to {step.max_bytes}"
        case AlphabeticStep():
            return f"{score:.3f} of the visible characters are letters, less than {step.min_share:g}"
        case LineLengthStep():
            return f"{score:.0f} characters a line, more than {step.max_mean_chars:g}"
        case ModelQualityStep():
            return f"{score:.3f} bits per byte, not within {step.min_bits_per_byte:g} to {step.max_bits_per_byte:g}"
        case _:
            return beyond(step, rule, score)


def step_recipes(steps: Sequence[Step], models: Mapping[str, StepModel]) -> list[dict[str, Any]]:
    """What of the steps bears identity: what they say, the digests of the models that they ask, the sources of functions.

    Raises   ConfigError for a function that is not there, before any row is read.
    """
    recipes = []
    for step in steps:
        recipe = step.recipe()
        if isinstance(step, ModelStep):
            recipe["model_digest"] = step_model(models, step).digest
        elif isinstance(step, LabelByFunctionStep):
            recipe["function_source"] = labels.source_digest(step.function)
        recipes.append(recipe)
    return recipes


_TEXTS_ALONE = (
    LengthStep,
    AlphabeticStep,
    LineLengthStep,
    UnicodeStep,
    GopherQualityStep,
    GopherRepetitionStep,
    FineWebStep,
    C4Step,
)
"""Steps that look at nothing but the text, and take hardly longer for some rows more."""
_LEAST_SHARE = 0.75
"""Of the rows that are there must stay, else those that don't are taken out."""


def _apply(
    table: pa.Table,
    step: RowStep,
    models: Mapping[str, StepModel],
    stays_N: np.ndarray[Any, Any],
    *,
    writes_all: bool,
) -> Applied:
    """What a step makes of the rows, of which those count that stay.

    writes_all   the table has the text of every row that was there, also of those that break a rule
    """
    texts = one_array(table["text"])
    match step:
        case LengthStep():
            sizes = pc.binary_length(texts).to_numpy(zero_copy_only=False).astype(np.float64)
            return Applied(table, _verdicts("length", (sizes < step.min_bytes) | (sizes > step.max_bytes), sizes))
        case AlphabeticStep():
            shares = _letter_shares(texts)
            return Applied(table, _verdicts("alphabetic", shares < step.min_share, shares))
        case LineLengthStep():
            lines = pc.add(pc.count_substring(texts, "\n"), 1)
            means = pc.divide(pc.cast(pc.utf8_length(texts), pa.float64()), pc.cast(lines, pa.float64())).to_numpy()
            return Applied(table, _verdicts("line_length", means > step.max_mean_chars, means))
        case UnicodeStep():
            from aifactory.ingest.unicode import Fixes, repair

            repaired = repair(texts, Fixes(**_options(step)))
            return Applied(
                _with_texts(table, repaired.texts), counted={"changed": int((repaired.changed_N & stays_N).sum())}
            )
        case LanguageStep():
            from aifactory.ingest.language import language_verdicts

            found, verdicts = language_verdicts(texts, **_options(step))
            at = table.schema.get_field_index("language")
            return Applied(
                table.set_column(at, "language", found.codes), verdicts, _language_details(step, found, verdicts)
            )
        case GopherQualityStep():
            from aifactory.ingest.quality import GopherQuality, gopher_quality

            return Applied(table, gopher_quality(texts, GopherQuality(**_options(step))))
        case GopherRepetitionStep():
            from aifactory.ingest.quality import GopherRepetition, gopher_repetition

            return Applied(table, gopher_repetition(texts, GopherRepetition(**_options(step))))
        case FineWebStep():
            from aifactory.ingest.quality import FineWebQuality, fineweb_quality

            return Applied(table, fineweb_quality(texts, FineWebQuality(**_options(step))))
        case C4Step():
            from aifactory.ingest.quality import C4Quality, c4_quality

            kept, verdicts = c4_quality(texts, C4Quality(**_options(step)), only_N=None if writes_all else stays_N)
            looked_at = stays_N & (verdicts.broken_N == 0)
            changed = int((pc.not_equal(kept, texts).to_numpy(zero_copy_only=False) & looked_at).sum())
            return Applied(_with_texts(table, kept), verdicts, before=table, counted={"changed": changed})
        case PersonalStep():
            return _mask(table, step)
        case LabelByRuleStep():
            known = {step.default or "", *(rule.label for rule in step.rules)}
            found = labels.labels_by_rule(table, step)
            table, counted = labels.with_labels(table, found, keep_existing=step.keep_existing, possible=known)
            return Applied(table, counted=counted)
        case LabelByFunctionStep():
            found = labels.labels_by_function(table, step)
            table, counted = labels.with_labels(table, found, keep_existing=step.keep_existing)
            return Applied(table, counted=counted)
        case LabelByModelStep():
            names, confidence_N = model_scores.model_labels(table, step, step_model(models, step))
            table, counted = labels.with_labels(
                table,
                pa.array(names, pa.string()),
                keep_existing=step.keep_existing,
                possible=set(step.labels),
                confidence_N=confidence_N,
            )
            return Applied(table, counted=counted)
        case KeepLabelsStep():
            verdicts, details = labels.label_verdicts(table, step)
            return Applied(table, verdicts, details)
        case ModelQualityStep():
            return Applied(table, model_scores.quality_verdicts(table, step, step_model(models, step)))


def _language_details(step: LanguageStep, found: Languages, verdicts: Verdicts) -> list[str]:
    """In words what was found of each row that goes, and what was expected of it."""
    details = [""] * len(found.probability_N)
    for i in np.flatnonzero(verdicts.broken_N).tolist():
        is_other = verdicts.rules[verdicts.broken_N[i] - 1] == "language"
        wanted = f"one of {', '.join(step.keep)}" if is_other else f"a probability of at least {step.min_probability:g}"
        details[i] = f"{found.codes[i].as_py()} with probability {found.probability_N[i]:.3f}, expected {wanted}"
    return details


def _mask(table: pa.Table, step: PersonalStep) -> Applied:
    """Personal data masked in everything that a row says."""
    from aifactory.ingest.personal import mask_personal

    counted: Counter[str] = Counter()
    changed = np.zeros(table.num_rows, bool)
    for name in ("prompt", "text", "messages", "rejected"):
        column = one_array(table[name])
        if not pc.any(pc.not_equal(column, "")).as_py():
            continue
        masked = mask_personal(column, step.kinds, names_model=step.names_model)
        counted.update(masked.counts)
        changed |= pc.not_equal(masked.texts, column).to_numpy(zero_copy_only=False)
        table = table.set_column(table.schema.get_field_index(name), name, masked.texts)
    return Applied(table, counted={"changed": int(changed.sum()), **counted})


def _options(step: RowStep) -> dict[str, Any]:
    return step.model_dump(exclude={"step"})


def _with_texts(table: pa.Table, texts: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index("text"), "text", texts)


def _verdicts(rule: str, broken_N: np.ndarray[Any, Any], score_N: np.ndarray[Any, Any]) -> Verdicts:
    return Verdicts((rule,), broken_N.astype(np.uint8), np.where(broken_N, score_N, 0.0))


_IS_LETTER = np.array([chr(i).isalpha() and i < 128 for i in range(256)], np.int64)
_IS_VISIBLE = np.array([not chr(i).isspace() for i in range(256)], np.int64)


def _letter_shares(texts: pa.Array) -> np.ndarray[Any, Any]:
    """Letters (`str.isalpha`) among the characters that are no white space, of each text that has any."""
    data_B, offsets_N1 = text_buffers(texts)
    letters, visible = (_sums(table[data_B], offsets_N1) for table in (_IS_LETTER, _IS_VISIBLE))
    shares: np.ndarray[Any, Any] = letters / np.maximum(visible, 1)
    for i in np.flatnonzero(~pc.string_is_ascii(texts).to_numpy(zero_copy_only=False)):
        shown = "".join(texts[int(i)].as_py().split())
        shares[i] = sum(map(str.isalpha, shown)) / max(len(shown), 1)
    return shares


def _sums(values_B: np.ndarray[Any, Any], offsets_N1: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    total = np.concatenate([[0], np.cumsum(values_B)])
    sums: np.ndarray[Any, Any] = (total[offsets_N1[1:]] - total[offsets_N1[:-1]]).astype(np.float64)
    return sums
