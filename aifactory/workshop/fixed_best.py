"""The fixed best: of all releases that were in production the one that is best on a holdout, which no candidate may fall far behind.

The gate lets a candidate be worse than the release in production by a margin; a hundred releases could each take that once more. So
each is also compared with the best one so far, and the loss against that is bounded in all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from aifactory.errors import StorageError
from aifactory.records.artifacts import Corpus, Model, Scorecard
from aifactory.records.books import Books
from aifactory.records.journal import Cycle


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedBest:
    """The best release on a holdout."""

    release: str
    model: Model


def fixed_best(books: Books, cycle: Cycle, sources: Corpus) -> FixedBest | None:
    """The release that was in production before the cycle began whose bits per byte on the holdout of `sources` have the lowest upper
    end of their interval, the first of equals; None where there is none. What is promoted later changes nothing of it."""
    before = {entry["release"] for entry in books.registry.promotions() if float(entry["at"]) <= cycle.opened_at}
    found: tuple[float, int] | None = None
    best: FixedBest | None = None
    for release in books.registry.releases():
        if release.number not in before or books.artifacts.erased(release.model) is not None:
            continue
        try:
            card = books.artifacts.left_of(Scorecard, release.scorecard)
        except StorageError:
            continue  # nothing is left of it
        corpora = [each for each in card.record.inputs if each.startswith(f"{Corpus.kind}/")][:1]
        if books.journal.left_of(corpora) != [sources.id]:
            continue
        high = float(card.figures["holdout"]["candidate"]["high"])
        if math.isfinite(high) and (found is None or (high, release.number) < found):
            found = (high, release.number)
            best = FixedBest(release=release.name, model=books.artifacts.get(Model, release.model))
    return best
