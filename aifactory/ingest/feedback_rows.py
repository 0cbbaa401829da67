"""Rows of feedback that are not believed: they are read from the parts of a corpus, judged by `trust`, and dropped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aifactory.config import FeedbackTrust
from aifactory.ingest.duplicates import Drops
from aifactory.ingest.trust import Said, judge_feedback
from aifactory.records.artifacts import Corpus
from aifactory.records.parts import Part, PartStore
from aifactory.records.rows import from_ipc, read_corpus
from aifactory.records.storage import Storage

_COLUMNS = ["id", "source", "origin", "prompt", "messages", "text", "label", "user"]
_SIDES = ("train", "holdout")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trusting:
    """How feedback among the rows of a corpus is judged."""

    policy: FeedbackTrust
    sources: frozenset[str]
    """Names of the sources whose rows are feedback."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """By completion the key by which the feedback on it came, where there was one."""

    def to_json(self) -> dict[str, Any]:
        """What bears identity."""
        return self.policy.model_dump(mode="json")


def trust_drops(
    parts: Sequence[Part], trusting: Trusting, *, corpora: Iterable[Corpus], storage: Storage
) -> tuple[Drops, dict[str, Any]]:
    """What is not believed, with places among the rows of all parts, and what was found.

    corpora   earlier ones: feedback that they kept votes too
    """
    store = PartStore(storage)
    rows: list[Said] = []
    places: list[int] = []
    start = 0
    for part in parts:
        for side in _SIDES:
            if f"{side}.arrow" in part.files:
                table = from_ipc(store.map(part, f"{side}.arrow"))
                for at, said in _said(table.select(_COLUMNS), trusting):
                    places.append(start + at)
                    rows.append(said)
                start += table.num_rows
    earlier = [
        said
        for corpus in corpora
        if trusting.sources & set(corpus.figures["sources"])
        for _, table in read_corpus(storage, corpus, columns=_COLUMNS)
        for _, said in _said(table, trusting)
    ]
    found = judge_feedback(rows, earlier, trusting.policy)
    dropped = sorted(found.rules)
    rules, scores, details = ([found.rules[at][i] for at in dropped] for i in range(3))
    return (
        Drops(
            places_D=np.array([places[at] for at in dropped], np.int64),
            rules=[str(rule) for rule in rules],
            scores_D=np.array(scores, np.float64),
            details=[str(detail) for detail in details],
        ),
        found.figures,
    )


def _said(table: pa.Table, trusting: Trusting) -> Iterator[tuple[int, Said]]:
    """The rows of feedback of a table, with their places in it."""
    is_feedback = pc.is_in(table["source"], pa.array(sorted(trusting.sources), pa.string()))
    places = np.flatnonzero(is_feedback.to_numpy())
    for at, row in zip(places.tolist(), table.take(pa.array(places)).to_pylist(), strict=True):
        yield (
            at,
            Said(
                id=row["id"],
                question=_question(row),
                answer=row["text"],
                user=row["user"],
                key=trusting.keys.get(row["origin"], ""),
                votes=row["label"] != "false",  # an answer that is labelled so is what the user says to be wrong
            ),
        )


def _question(row: Mapping[str, Any]) -> str:
    """What was asked; of a chat the last turn of whoever asked."""
    if not row["messages"]:
        return str(row["prompt"])
    turns = [turn for turn in json.loads(row["messages"]) if turn.get("role") == "user"]
    return str(turns[-1]["content"]) if turns else ""
