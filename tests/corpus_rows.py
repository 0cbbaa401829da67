"""Rows of a corpus, made as the stage `ingest` makes them, for tests of the stages after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from aifactory.ingest.columns import RAW_SCHEMA
from aifactory.records.rows import assign_ids, assign_keys, to_parquet
from aifactory.records.storage import Storage, StoredFile


def corpus_table(
    rows: Sequence[Mapping[str, Any]], *, source: str, keyed_by_file: bool, holdout_share: float
) -> pa.Table:
    """A table of CORPUS_SCHEMA from what RAW_SCHEMA knows of each row; what is not said is ""."""
    values = [{"weight": 1.0, "position": 0} | dict(row) for row in rows]
    columns = {field.name: pa.array([row.get(field.name, "") for row in values], field.type) for field in RAW_SCHEMA}
    keyed = assign_keys(
        pa.table(columns, schema=RAW_SCHEMA), source=source, keyed_by_file=keyed_by_file, holdout_share=holdout_share
    )
    return assign_ids(keyed)


def as_rows(table: pa.Table) -> list[Any]:
    """Each row with its columns as attributes."""
    return [SimpleNamespace(**values) for values in table.to_pylist()]


def write_parts(storage: Storage, table: pa.Table, *target: str, parts: int = 2) -> list[StoredFile]:
    """The files of a corpus with these rows, in so many parts of each side."""
    files = []
    for part in range(parts):
        some = table.take(pa.array(range(part, table.num_rows, parts), pa.int64()))
        for side in ("train", "holdout"):
            rows = some.filter(pa.array([each == side for each in some["side"].to_pylist()], pa.bool_()))
            files.append(storage.write_bytes(to_parquet(rows), *target, f"{side}-{part:05d}.parquet"))
    return files
