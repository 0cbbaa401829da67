"""What an erasure means, and what of it was found where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aifactory.proof.where import Where
from aifactory.records.erasures import KeyedHash

FEEDBACK = "feedback"
"""The source of rows that users said to the factory itself."""


@dataclass(slots=True)
class Search:
    """What is meant: by the conditions, by names found in this process, and by the tombstones of this erasure."""

    where: Where
    keyed: KeyedHash | None = None
    rows: frozenset[str] = frozenset()
    """Tombstones of rows."""
    said: frozenset[str] = frozenset()
    """Tombstones of completions."""
    row_ids: set[str] = field(default_factory=set)
    completion_ids: set[str] = field(default_factory=set)

    def is_gone(self, row_id: str) -> bool:
        """Whether the row of this id is meant."""
        return row_id in self.row_ids or (
            bool(self.rows) and self.keyed is not None and self.keyed.of("row", row_id) in self.rows
        )

    def is_said(self, completion_id: str) -> bool:
        """Whether the completion of this id is meant."""
        return completion_id in self.completion_ids or (
            bool(self.said) and self.keyed is not None and self.keyed.of("completion", completion_id) in self.said
        )

    def in_shard(self, shard: bytes) -> int:
        """How many rows that are meant lie in a shard of tokens."""
        if not shard:
            return 0
        batch = pa.ipc.open_file(pa.BufferReader(shard)).get_batch(0)
        names = batch.column("documents").values.field("row").dictionary_encode().dictionary.to_pylist()
        return sum(self.is_gone(name) for name in names)

    def mask(self, rows: pa.Table) -> npt.NDArray[np.bool_]:
        """Which of N rows of a corpus or a ledger are meant."""
        gone = each_meant(rows, "id", self.is_gone)
        return self.where.mask(rows) | gone | each_meant(rows, "origin", self.is_said)


def each_meant(rows: pa.Table, column: str, is_meant: Callable[[str], bool]) -> npt.NDArray[np.bool_]:
    """For each of N rows whether what a column says is meant; where there is none, no row is."""
    if column not in rows.column_names or not rows.num_rows:
        return np.zeros(rows.num_rows, bool)
    values = rows[column].combine_chunks().dictionary_encode()
    found = np.array([is_meant(value or "") for value in values.dictionary.to_pylist()], bool)
    meant: npt.NDArray[np.bool_] = found[values.indices.to_numpy()]
    return meant


@dataclass(slots=True)
class Found:
    """What was found, by place and thing; of a run that erases what it has erased itself."""

    places: dict[str, dict[str, int]] = field(default_factory=dict)
    waits: list[str] = field(default_factory=list)
    """What can't be erased now, and why."""
    trained: dict[str, int] = field(default_factory=dict)
    """By corpus how many of its rows trained."""
    tokens: set[str] = field(default_factory=set)
    """Token sets that hold such rows, or whose tokenizer was trained on them."""
    tokenizers: dict[str, str] = field(default_factory=dict)
    """By digest of a tokenizer that was trained on them the token set with which it was."""
    sources: set[str] = field(default_factory=set)
    silent: set[str] = field(default_factory=set)
    """Corpora whose ledger does not say what the conditions ask for: an older version wrote it."""

    def add(self, place: str, thing: str, rows: int) -> None:
        of_place = self.places.setdefault(place, {})
        of_place[thing] = of_place.get(thing, 0) + rows

    @property
    def num_things(self) -> int:
        return sum(map(len, self.places.values()))
