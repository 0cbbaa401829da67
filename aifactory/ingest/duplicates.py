"""Duplicates: which rows of a corpus have the same content as another one, in it or in an earlier corpus.

Of several rows with the same content one in the holdout stays before one that would train, then the first. So the survivors
depend on the rows and their order alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aifactory.ingest.index import Index, held_out, joined
from aifactory.records.rows import hex_of

SAME, SEEN, LEAK = "duplicate", "seen_by_ancestor", "holdout_leak"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drops:
    """Rows that a decision over all of them takes out, in the order of their places."""

    places_D: npt.NDArray[np.int64]
    """Where they stand among all rows."""
    rules: Sequence[str]
    scores_D: npt.NDArray[np.float64]
    details: Sequence[str]
    """In words what was found."""


def likeness(ids_D2: npt.NDArray[np.uint64]) -> list[str]:
    """The details of rows that are like those with these ids."""
    return [f"like {row}" for row in hex_of(ids_D2).to_pylist()]


def exact_drops(rows: Index, ancestors: Index, holdouts: Index) -> Drops:
    """The rows with a content that another row has.

    ancestors   what the parent and its parents were trained or judged on: none of it comes again
    holdouts    what any earlier cycle has held out: none of it trains
    """
    count = len(rows)
    places = np.arange(count)
    # Rows held out come first among those with one content, then those that come first.
    order = np.lexsort((places, ~rows.is_holdout_N))
    like = np.empty(count, np.int64)
    like[order] = order[_first_of(rows.contents_N2[order])]
    rules = np.where(like == places, "", SAME).astype(object)
    like_N2 = rows.ids_N2[like] if count else rows.ids_N2
    kept_apart = joined([held_out(ancestors), holdouts])
    for earlier, concerned_N, rule in (
        (ancestors, np.ones(count, bool), SEEN),
        (kept_apart, ~rows.is_holdout_N, LEAK),
    ):
        found = _found_in(earlier.contents_N2, rows.contents_N2)
        hit = (found >= 0) & concerned_N
        rules[hit] = rule
        like_N2[hit] = earlier.ids_N2[found[hit]]
    dropped = np.flatnonzero(rules != "")
    return Drops(
        places_D=dropped,
        rules=rules[dropped].tolist(),
        scores_D=np.ones(len(dropped)),
        details=likeness(like_N2[dropped]),
    )


def _first_of(contents_N2: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """For each row the first one with its content."""
    count = len(contents_N2)
    order = np.lexsort((np.arange(count), contents_N2[:, 1], contents_N2[:, 0]))
    ordered = contents_N2[order]
    starts = np.ones(count, bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(count, np.int64)
    first[order] = order[np.maximum.accumulate(np.where(starts, np.arange(count), 0))] if count else order
    return first


def _found_in(earlier_M2: npt.NDArray[np.uint64], contents_N2: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """For each of N contents a row of the earlier ones that has it, or -1."""
    first = _first_of(np.concatenate([earlier_M2, contents_N2]))[len(earlier_M2) :]
    return np.where(first < len(earlier_M2), first, -1)
