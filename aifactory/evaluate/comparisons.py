"""Comparisons: what the scores of the examples say of a candidate, with intervals. Functions of a table alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute

from aifactory.config import Evaluate
from aifactory.evaluate.gate import BatchIntegrity, Comparison, OverBest
from aifactory.evaluate.statistics import Interval, ratio_interval


def compared(table: pa.Table, name: str, recipe: Evaluate) -> Comparison | None:
    """The candidate by itself and beside the champion, by the tasks of one set; None where it has none."""
    rows = table.filter(pa.compute.equal(table["set"], name)).to_pylist()
    if not rows:
        return None

    def interval(plus: str, minus: str | None = None, per: str = "bytes") -> Interval | None:
        if any(row[plus] is None or (minus is not None and row[minus] is None) for row in rows):
            return None
        return _ratio_of(
            rows, lambda row: row[plus] - (row[minus] if minus is not None else 0.0), lambda row: row[per], recipe
        )

    def share(plus: str, minus: str | None = None) -> Interval | None:
        """Of the references that are answered to the letter, or how much more of them than by another."""
        of = [row for row in rows if row[plus] is not None and (minus is None or row[minus] is not None)]
        return _ratio_of(of, lambda row: float(row[plus]) - float(row[minus] if minus else 0), lambda row: 1.0, recipe)

    candidate = interval("candidate")
    assert candidate is not None
    return Comparison(
        name=name,
        candidate=candidate,
        champion=interval("champion"),
        over_champion=interval("candidate", "champion"),
        over_unigram=interval("candidate", "unigram"),
        prompt_gain=interval("beginning_mispaired", "beginning", per="beginning_bytes"),
        exact=share("candidate_exact"),
        exact_over_champion=share("candidate_exact", "champion_exact"),
    )


def over_best(table: pa.Table, release: str, recipe: Evaluate) -> OverBest | None:
    """The candidate beside the best release so far, by the tasks of the holdout."""
    rows = table.filter(pa.compute.is_valid(table["best"])).to_pylist()
    over = _ratio_of(rows, lambda row: row["candidate"] - row["best"], lambda row: row["bytes"], recipe)
    told = [row for row in rows if row["best_exact"] is not None and row["candidate_exact"] is not None]
    exact = _ratio_of(
        told, lambda row: float(row["candidate_exact"]) - float(row["best_exact"]), lambda row: 1.0, recipe
    )
    return None if over is None else OverBest(release=release, over=over, exact=exact)


def integrity(table: pa.Table, batches: Mapping[str, str], recipe: Evaluate) -> tuple[BatchIntegrity, ...]:
    """Of each new batch whether its answers belong to their prompts, by the tasks of the target that come from it."""
    rows = table.filter(pa.compute.equal(table["set"], "target")).to_pylist()
    found = []
    for corpus, batch in batches.items():
        gain = _ratio_of(
            [row for row in rows if row["corpus"] == corpus],
            lambda row: row["beginning_mispaired"] - row["beginning"],
            lambda row: row["beginning_bytes"],
            recipe,
        )
        if gain is not None:
            found.append(BatchIntegrity(batch=batch, prompt_gain=gain))
    return tuple(found)


def bits_per_byte(table: pa.Table, name: str, column: str) -> float:
    """What one column says of all answers of a set together."""
    rows = table.filter(pa.compute.equal(table["set"], name))
    return float(pa.compute.sum(rows[column]).as_py() / pa.compute.sum(rows["bytes"]).as_py())


def _ratio_of(
    rows: Sequence[Mapping[str, Any]],
    top: Callable[[Mapping[str, Any]], float],
    bottom: Callable[[Mapping[str, Any]], float],
    recipe: Evaluate,
) -> Interval | None:
    if not rows:
        return None
    return ratio_interval(
        [top(row) for row in rows],
        [bottom(row) for row in rows],
        [row["cluster"] for row in rows],
        confidence=recipe.confidence,
        samples=recipe.bootstrap_samples,
    )
