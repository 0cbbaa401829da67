"""Labels: what each row is called, by rules, by a function of the user's or by a model, and how far two of them agree.

In       a block of rows, `label` as the source or a step before gave it; "" for none
Out      the block with labels, and what was counted: integers that add up over blocks and parts
Law      a row's label depends on that row alone (of a user's function its author promises it).
Raises   ConfigError for a function that is missing or returns what is no list of labels.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from aifactory.config import KeepLabelsStep, LabelByFunctionStep, LabelByRuleStep
from aifactory.config.functions import import_named
from aifactory.errors import ConfigError
from aifactory.ingest.columns import Verdicts

CONFIDENCE = "label_confidence"
"""Column that a block has beside those of a source once a model has labelled it: the probability of the row's label, or, where
it gave none, of the likeliest; 1 where the label is not the model's."""
_BATCH_ROWS = 1000
"""Rows of one call of a user's function."""
_SHOWN = ("text", "prompt", "messages", "source", "origin", "label")
"""Columns that it sees."""
_FOUND, _AGREE = "label:", "agree:"
"""How counts are named: "label:code", and "agree:" with the label that was there and the one that was found, as JSON."""


def labels_by_rule(table: pa.Table, step: LabelByRuleStep) -> pa.Array:
    """The label of the first rule whose pattern is found in each of N rows; columnar."""
    texts = table[step.on].combine_chunks()
    names = ["", step.default or "", *(rule.label for rule in step.rules)]
    found_N = np.ones(len(texts), np.int64)
    open_M = np.arange(len(texts))
    for number, rule in enumerate(step.rules, start=2):
        matched_M = pc.match_substring_regex(texts, rule.pattern).to_numpy(zero_copy_only=False)
        if not matched_M.any():
            continue
        found_N[open_M[matched_M]] = number
        open_M = open_M[~matched_M]
        texts = texts.filter(pa.array(~matched_M))
    return pa.array(names, pa.string()).take(pa.array(found_N))


def labels_by_function(table: pa.Table, step: LabelByFunctionStep) -> pa.Array:
    """What the user's function says of each of N rows."""
    function = load_function(step.function)
    found: list[str] = []
    shown = table.select(_SHOWN)
    for begin in range(0, table.num_rows, _BATCH_ROWS):
        rows = shown.slice(begin, _BATCH_ROWS).to_pylist()
        count = len(rows)
        try:
            labels = function(rows)
        except Exception as error:
            raise ConfigError(
                f"expected a list of labels from {step.function}, found {type(error).__name__}: {error}, for {count} rows "
                f"from {table['origin'][begin].as_py()!r} on; mend the function."
            ) from error
        found += _checked(labels, count, step.function)
    return pa.array(found, pa.string())


def label_verdicts(table: pa.Table, step: KeepLabelsStep) -> tuple[Verdicts, list[str]]:
    """Which rows go by their label, and in words the label of each row."""
    labels = table["label"].combine_chunks()
    broken = pc.is_in(labels, pa.array(step.drop, pa.string()))
    if step.keep:
        broken = pc.or_(broken, pc.invert(pc.is_in(labels, pa.array(step.keep, pa.string()))))
    broken_N = broken.to_numpy(zero_copy_only=False).astype(np.uint8)
    known = CONFIDENCE in table.column_names
    score_N = table[CONFIDENCE].to_numpy() if known else np.ones(table.num_rows)
    details = [
        f"the label {label!r}, probability {score:.3f}" if label else "no label"
        for label, score in zip(labels.to_pylist(), score_N.tolist(), strict=True)
    ]
    return Verdicts(("label",), broken_N, np.where(broken_N, score_N, 0.0)), details


def with_labels(
    table: pa.Table,
    found: pa.Array,
    *,
    keep_existing: bool,
    possible: Collection[str] | None = None,
    confidence_N: npt.NDArray[np.float64] | None = None,
) -> tuple[pa.Table, dict[str, int]]:
    """N rows with the labels that were found, and the counts.

    found      "" for no label
    possible   the labels that can be found; one that was there before and is none of them is counted without its name, so
               that counts stay few. None: any.
    """
    before = table["label"].combine_chunks()
    had = pc.not_equal(before, "")
    counted = _counted(before.filter(had), found.filter(had), possible)
    for item in pc.value_counts(found).to_pylist():
        counted[f"{_FOUND}{item['values']}" if item["values"] else "unlabelled"] = item["counts"]
    stays = had if keep_existing else pa.array(np.zeros(table.num_rows, bool))
    table = table.set_column(table.schema.get_field_index("label"), "label", pc.if_else(stays, before, found))
    if confidence_N is None and CONFIDENCE in table.column_names:
        confidence_N = np.ones(table.num_rows)
    if confidence_N is not None:
        column = pc.if_else(stays, 1.0, pa.array(confidence_N, pa.float64()))
        if CONFIDENCE in table.column_names:
            table = table.drop_columns([CONFIDENCE])
        table = table.append_column(CONFIDENCE, column)
    return table, counted


# ── agreement ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _counted(before: pa.Array, found: pa.Array, possible: Collection[str] | None) -> dict[str, int]:
    """Pairs of labels, the one that was there first, by how often they met."""
    pairs = pa.table({"before": before, "found": found}).group_by(["before", "found"]).aggregate([([], "count_all")])
    counted: dict[str, int] = {}
    for pair in pairs.to_pylist():
        known = possible is None or pair["before"] in possible
        name = _AGREE + json.dumps([pair["before"] if known else None, pair["found"]], ensure_ascii=False)
        counted[name] = counted.get(name, 0) + pair["count_all"]
    return counted


def summed(counted: Mapping[str, int]) -> dict[str, Any]:
    """The figures of a step from what was counted over all parts: as they are, but for labels.

    labels      by label how many rows were given it
    agreement   only where rows had a label before: `rows` (of those, all that were given one), `same`, `accuracy`, `kappa`
                (chance-corrected: (p_o - p_e) / (1 - p_e); Cohen 1960, "A coefficient of agreement for nominal scales";
                none where p_e is 1), and `unlabelled` (those that were given none)
    """
    figures: dict[str, Any] = {n: count for n, count in counted.items() if not n.startswith((_FOUND, _AGREE))}
    labels = {name.removeprefix(_FOUND): count for name, count in counted.items() if name.startswith(_FOUND)}
    pairs = {
        tuple(json.loads(name.removeprefix(_AGREE))): count
        for name, count in counted.items()
        if name.startswith(_AGREE)
    }
    if labels:
        figures["labels"] = labels
    if pairs:
        figures["agreement"] = _agreement(pairs)
    return figures


def _agreement(pairs: Mapping[tuple[Any, ...], int]) -> dict[str, Any]:
    """`pairs` counts (label before, label found); None stands for labels that can't be found, "" for none found."""
    both = {pair: count for pair, count in pairs.items() if pair[1]}
    rows = sum(both.values())
    same = sum(count for (before, found), count in both.items() if before == found)
    by_chance = 0
    for label in {found for _, found in both}:
        had, got = (sum(count for pair, count in both.items() if pair[side] == label) for side in (0, 1))
        by_chance += had * got
    # In integers up to the last division: no order of summation shows.
    left = rows * rows - by_chance
    return {
        "rows": rows,
        "same": same,
        "accuracy": same / rows if rows else None,
        "kappa": (rows * same - by_chance) / left if left else None,
        "unlabelled": sum(count for pair, count in pairs.items() if not pair[1]),
    }


# ── functions of the user's ───────────────────────────────────────────────────────────────────────────────────────────


def load_function(name: str) -> Callable[[list[dict[str, Any]]], Sequence[str | None]]:
    """The function that `package.module:name` stands for; the working directory is looked at too.

    Raises   ConfigError.
    """
    module_name, _, attribute = name.partition(":")
    expected = f"expected the labelling function {name}"
    try:
        module = import_named(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        advice = (
            "put it into the job's working directory or install it on every machine."
            if f"{module_name}.".startswith(f"{missing}.")
            else f"{module_name} imports it: install it on every machine."
        )
        raise ConfigError(f"{expected}, found no module {missing!r}; {advice}") from error
    except Exception as error:
        raise ConfigError(f"{expected}, found that importing {module_name} fails: {error!r}; mend it.") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        found = "nothing of this name" if function is None else f"a {type(function).__name__}"
        raise ConfigError(f"{expected}, found {found} in {module_name} ({module.__file__}); name a function.")
    loaded: Callable[[list[dict[str, Any]]], Sequence[str | None]] = function
    return loaded


@lru_cache(maxsize=64)
def source_digest(name: str) -> str | None:
    """SHA-256 of the source file of a function's module; None where it has no file.

    It bears identity beside the name and the version that the user gives: whoever edits the function and forgets the version
    would otherwise get the labels of the old one. What the module imports is not seen: for that there is the version.
    """
    load_function(name)
    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    try:
        return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError:
        return None


def _checked(labels: Any, count: int, name: str) -> list[str]:
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        raise ConfigError(f"expected a list of {count} labels from {name}, found a {type(labels).__name__}; mend it.")
    if len(labels) != count:
        raise ConfigError(f"expected {count} labels from {name}, one for each row, found {len(labels)}; mend it.")
    for at, label in enumerate(labels):
        if label is not None and not isinstance(label, str):
            raise ConfigError(
                f"expected a str or None for each row from {name}, found {label!r} ({type(label).__name__}) for row {at} of "
                f"{count}; mend it."
            )
    return [label or "" for label in labels]
