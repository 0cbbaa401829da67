"""Decisions over all rows at once: which of them are feedback that is not believed, duplicates, or would leak a holdout.

What is not believed first. Exact duplicates next; of the rows that survive, those that nearly equal another one, or at least one that is held
out; of those, the ones that train and hold passages of a holdout. Each sees only rows that are still there, so a row is dropped for one that stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from aifactory.cluster.tasks import RunTasks
from aifactory.config import DecontaminateStep, NearDuplicatesStep
from aifactory.ingest.duplicates import Drops, exact_drops, likeness
from aifactory.ingest.index import EMPTY, Index, held_out, joined
from aifactory.ingest.leaks import leaked_drops
from aifactory.records.artifacts import Corpus
from aifactory.records.parts import Part
from aifactory.records.storage import Storage

if TYPE_CHECKING:
    from aifactory.ingest.near_duplicates import Settled
    from aifactory.ingest.sketches import Sketches


NEAR, NEAR_SEEN, NEAR_LEAK = "near_duplicate", "near_seen_by_ancestor", "near_holdout_leak"


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """What earlier corpora hold."""

    ancestors: Index = EMPTY
    """What the parent and its parents were trained or judged on: none of it comes again."""
    holdouts: Index = EMPTY
    """What earlier cycles have held out: none of it trains."""
    corpora: Sequence[Corpus] = ()
    """The corpora of both, for what can't be seen in an index."""


def decide_drops(
    parts: Sequence[Part],
    indexes: Sequence[Index],
    earlier: Earlier,
    *,
    near: NearDuplicatesStep | None,
    decontaminate: DecontaminateStep | None,
    quarantine: float | None,
    storage: Storage,
    run: RunTasks,
    distrusted: Drops | None = None,
) -> list[Drops]:
    """What each part loses.

    quarantine   how like one that is held out a row that trains may not be, by their sketches
    distrusted   rows that are gone already, with places among all rows
    """
    # Sketches are as large as all else together, and are looked at part by part.
    rows = joined([replace(index, sketches=None) for index in indexes])
    drops = exact_drops(rows, earlier.ancestors, earlier.holdouts)
    if distrusted is not None and len(distrusted.places_D):
        stays = np.ones(len(rows), bool)
        stays[distrusted.places_D] = False
        others = exact_drops(rows.take(stays), earlier.ancestors, earlier.holdouts)
        drops = _merged(distrusted, replace(others, places_D=np.flatnonzero(stays)[others.places_D]))
    if near is not None and len(rows):
        drops = _merged(drops, _near_drops(rows, drops, earlier.ancestors, earlier.holdouts, near))
    if quarantine is not None and len(rows):
        drops = _merged(drops, _quarantined_drops(rows, indexes, drops, earlier, quarantine))
    if decontaminate is not None and len(rows):
        stays = np.ones(len(rows), bool)
        stays[drops.places_D] = False
        masks = np.split(stays, np.cumsum([len(index) for index in indexes])[:-1])
        leaks = leaked_drops(
            parts, indexes, masks, holdouts=earlier.corpora, step=decontaminate, storage=storage, run=run
        )
        drops = _merged(drops, leaks)
    return _split(drops, indexes)


def _near_drops(rows: Index, exact: Drops, ancestors: Index, holdouts: Index, near: NearDuplicatesStep) -> Drops:
    """Of the rows that are no exact duplicates those that nearly equal another row."""
    stays = np.ones(len(rows), bool)
    stays[exact.places_D] = False
    places = np.flatnonzero(stays)
    rules = np.full(len(rows), "", object)
    scores = np.zeros(len(rows))
    like_N2 = np.zeros((len(rows), 2), np.uint64)

    # What was held out elsewhere concerns the rows that would train, and is no reason to hold out less here.
    training = places[~rows.is_holdout_N[places]]
    settled = _settled(holdouts, rows, training, near)
    _note(
        settled.holdout_N, settled.holdout_similarity_N, NEAR_LEAK, holdouts, rows, training, (rules, scores, like_N2)
    )
    places = places[rules[places] == ""]

    settled = _settled(ancestors, rows, places, near)
    is_earlier = settled.survivor_N < len(ancestors)
    earlier, here = (np.where(is_earlier == wanted, settled.survivor_N, -1) for wanted in (True, False))
    found = (rules, scores, like_N2)
    _note(here, settled.similarity_N, NEAR, ancestors, rows, places, found)
    _note(earlier, settled.similarity_N, NEAR_SEEN, ancestors, rows, places, found)
    _note(settled.holdout_N, settled.holdout_similarity_N, NEAR_LEAK, ancestors, rows, places, found)
    dropped = np.flatnonzero(rules != "")
    return Drops(
        places_D=dropped, rules=rules[dropped].tolist(), scores_D=scores[dropped], details=likeness(like_N2[dropped])
    )


def _quarantined_drops(rows: Index, indexes: Sequence[Index], gone: Drops, earlier: Earlier, least: float) -> Drops:
    """Of the rows that are still there and would train those that are nearly held out, here or in an earlier corpus."""
    from aifactory.ingest.sketches import Sketches

    stays = np.ones(len(rows), bool)
    stays[gone.places_D] = False
    masks = np.split(stays, np.cumsum([len(index) for index in indexes])[:-1])
    held = [held_out(earlier.ancestors), earlier.holdouts]
    held += [index.take(mask & index.is_holdout_N) for index, mask in zip(indexes, masks, strict=True)]
    known = Sketches.joined([_sketched(index) for index in held if len(index)])
    ids_H2 = np.concatenate([index.ids_N2 for index in held])
    places, scores, likes = [], [], []
    start = 0
    for index, mask in zip(indexes, masks, strict=True):
        trains = mask & ~index.is_holdout_N
        training = np.flatnonzero(trains)
        like_N, similarity_N = _sketched(index).take(trains).most_like(known)
        near = similarity_N >= least
        places.append(start + training[near])
        scores.append(similarity_N[near])
        likes.append(ids_H2[like_N[near]])
        start += len(index)
    found = np.concatenate(places)
    return Drops(
        places_D=found,
        rules=[NEAR_LEAK] * len(found),
        scores_D=np.concatenate(scores),
        details=likeness(np.concatenate(likes)),
    )


def _sketched(index: Index) -> Sketches:
    assert index.sketches is not None, (
        "a corpus whose rows are in quarantine has sketches, and so has what it is compared with"
    )
    return index.sketches


def _settled(earlier: Index, rows: Index, places: npt.NDArray[np.int64], near: NearDuplicatesStep) -> Settled:
    """What becomes of the rows at `places`, beside the earlier ones, which come first."""
    from aifactory.ingest.near_duplicates import Standing, near_duplicates

    assert rows.signatures_NP is not None, "a corpus whose near-duplicates are looked for has signatures"
    blocks = [rows.signatures_NP[places]]
    if len(earlier):
        assert earlier.signatures_NP is not None, "so have the corpora that it is compared with"
        blocks.insert(0, earlier.signatures_NP)
    standing = Standing(
        priority_N=np.arange(len(earlier) + len(places)),
        is_holdout_N=np.concatenate([earlier.is_holdout_N, rows.is_holdout_N[places]]),
        is_earlier_N=np.arange(len(earlier) + len(places)) < len(earlier),
    )
    return near_duplicates(
        blocks,
        standing,
        num_bands=near.num_bands,
        rows_per_band=near.rows_per_band,
        threshold=near.threshold,
    )


def _note(
    like_M: npt.NDArray[np.int64],
    similarity_M: npt.NDArray[np.float64],
    rule: str,
    earlier: Index,
    rows: Index,
    places: npt.NDArray[np.int64],
    found: tuple[npt.NDArray[np.object_], npt.NDArray[np.float64], npt.NDArray[np.uint64]],
) -> None:
    """Write the rule down for the rows at `places` that are like another, of those numbered earlier rows first."""
    rules, scores, like_N2 = found
    mine = like_M[len(earlier) :]
    hit = np.flatnonzero(mine >= 0)
    ids = np.concatenate([earlier.ids_N2, rows.ids_N2[places]])
    rules[places[hit]] = rule
    scores[places[hit]] = similarity_M[len(earlier) :][hit]
    like_N2[places[hit]] = ids[mine[hit]]


def _merged(one: Drops, other: Drops) -> Drops:
    """The drops of both, which have no place in common, in the order of places."""
    places = np.concatenate([one.places_D, other.places_D])
    order = np.argsort(places, kind="stable")
    rules, details = [*one.rules, *other.rules], [*one.details, *other.details]
    return Drops(
        places_D=places[order],
        rules=[rules[i] for i in order],
        scores_D=np.concatenate([one.scores_D, other.scores_D])[order],
        details=[details[i] for i in order],
    )


def _split(drops: Drops, indexes: Sequence[Index]) -> list[Drops]:
    """The same drops part by part, with places in the part."""
    ends = np.cumsum([len(index) for index in indexes])
    starts = ends - [len(index) for index in indexes]
    bounds = np.searchsorted(drops.places_D, np.concatenate([[0], ends]))
    return [
        Drops(
            places_D=drops.places_D[low:high] - start,
            rules=drops.rules[low:high],
            scores_D=drops.scores_D[low:high],
            details=drops.details[low:high],
        )
        for low, high, start in zip(bounds[:-1], bounds[1:], starts, strict=True)
    ]
