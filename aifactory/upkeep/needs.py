"""What of the storage root somebody needs, and why.

    releases     each that may be served again: its model, its scorecard, and all that they were made from, for `verify` and `trace`
    corpora      all: what one of them holds out never trains, in no later cycle
    batches      all: a later cycle learns from what users said before
    scorecards   of every cycle: what it was decided by
    cycles       of one that runs: whatever a cycle could look for, so everything
Proofs, and what stands in the place of erased artifacts, are not even looked at here: they are never deleted.
"""

from __future__ import annotations

from collections.abc import Iterable

from aifactory.records.artifacts import Artifact, Corpus, FeedbackBatch, Model, Scorecard, TokenSet
from aifactory.records.books import Books

NOUNS: tuple[type[Artifact], ...] = (FeedbackBatch, Corpus, TokenSet, Model, Scorecard)
BY_KIND = {noun.kind: noun for noun in NOUNS}


def needed(books: Books) -> dict[str, str]:
    """By id of an artifact why it is needed."""
    why: dict[str, str] = {}
    for release in books.registry.releases():
        if release.withdrawn is None:
            _with_origins(books, [release.model, release.scorecard], f"of {release.name}", why)
    for cycle in books.journal.cycles():
        if cycle.state in ("running", "trial"):
            bound = [*cycle.bound.batches, *cycle.bound.holdouts, *cycle.bound.corpora, cycle.bound.parent or ""]
            bound += [model for _, model in cycle.bound.models]
            _with_origins(books, bound, f"the cycle {cycle.trigger} is bound to it", why)
    for corpus in books.journal.left_of(books.journal.corpora()):
        _with_origins(books, [corpus], "what it holds out must never train", why)
    for event in books.journal.events(event="evaluated"):
        why.setdefault(str(event.subject), f"the cycle {event.trigger} was decided by it")
    for name in books.storage.names(FeedbackBatch.kind):
        why.setdefault(f"{FeedbackBatch.kind}/{name}", "later cycles learn from it")
    return why


def _with_origins(books: Books, ids: Iterable[str], reason: str, why: dict[str, str]) -> None:
    """These artifacts, and all that they were made from; of those that were erased what is left."""
    waiting = [each for each in ids if each]
    seen: set[str] = set()
    while waiting:
        artifact_id = waiting.pop()
        kind, _, fingerprint = artifact_id.partition("/")
        if artifact_id in seen or kind not in BY_KIND:
            continue
        seen.add(artifact_id)
        why.setdefault(artifact_id, reason)
        artifact = books.artifacts.find(BY_KIND[kind], fingerprint)
        if artifact is not None:
            waiting += artifact.record.inputs
            continue
        erased = books.artifacts.erased(artifact_id)
        if erased is not None and erased.successor is not None:
            waiting.append(erased.successor)
