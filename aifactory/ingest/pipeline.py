"""Ingest: sources -> Corpus.

Reads    the files of the sources, or the rows of a sealed feedback batch
Writes   corpus/<fp>/part-*.parquet       the rows that are kept (CORPUS_SCHEMA)
         corpus/<fp>/rejected-*.parquet   the ledger (LEDGER_SCHEMA)
Law      rows_in == rows_kept + rows_rejected. A part is a group of files that depends on the files alone, so that the
         bytes never depend on the number of workers.
Raises   EmptyCorpusError, ConfigError.

Two passes. The first reads, applies the rules and writes each group to a scratch folder. Which duplicates survive is
decided here over (content hash, side, place) alone; the second pass writes the parts without the others.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from aifactory.cluster.tasks import RunTasks
from aifactory.config import Ingest
from aifactory.errors import EmptyCorpusError
from aifactory.ingest.rules import broken_rule, normalize
from aifactory.ingest.sources import SourceFile, read_rows
from aifactory.records.rows import CORPUS_SCHEMA, LEDGER_SCHEMA, Rejected, Row, make_row
from aifactory.records.storage import Storage, StoredFile

CODE_VERSION = 1
_GROUP_BYTES = 4_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingested:
    """What was written and counted."""

    files: list[StoredFile]
    figures: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """What both passes need beside the group; pickled into every Ray task."""

    recipe: Ingest
    storage: Storage
    scratch: tuple[str, ...]
    target: tuple[str, ...]
    is_feedback: bool


def ingest_files(
    files: Sequence[SourceFile],
    *,
    recipe: Ingest,
    storage: Storage,
    target: tuple[str, ...],
    is_feedback: bool,
    seen: Mapping[str, str],
    run: RunTasks,
) -> Ingested:
    """Write the corpus of `files` to the directory `target`.

    `seen` maps the content hashes of the corpora that ancestors were trained or judged on to their sides: such a row
    is rejected, since what trained may not judge, and what judges may not train.
    """
    groups = list(_groups(files))
    task = _Task(
        recipe=recipe,
        storage=storage,
        scratch=("runs", "ingest-" + target[-1]),
        target=target,
        is_feedback=is_feedback,
    )
    storage.make_folder(*task.scratch)
    storage.make_folder(*target)
    places = run(_read_group, [(task, i, group) for i, group in enumerate(groups)])
    drops = _duplicates(places, seen)
    written = run(_write_group, [(task, i, drops.get(i, {})) for i in range(len(groups))])
    storage.delete(*task.scratch)

    rows_in = sum(len(place["hashes"]) + place["rejected"] for place in places)
    figures = {
        "rows_in": rows_in,
        "rows_kept": sum(w["kept"] for w in written),
        "rows_rejected": sum(w["rejected"] for w in written),
        "rows_erased": 0,
        "rows_holdout": sum(w["holdout"] for w in written),
        "bytes_kept": sum(w["bytes"] for w in written),
        "rejected_by_rule": dict(sorted(sum((Counter(w["rules"]) for w in written), Counter()).items())),
        "source_files": len(files),
    }
    assert rows_in == figures["rows_kept"] + figures["rows_rejected"], figures
    if figures["rows_kept"] == figures["rows_holdout"]:
        raise EmptyCorpusError(
            f"expected rows to train on, found {rows_in} rows of which {figures['rows_kept']} were kept, all of them in "
            f"the holdout; rejected by rule: {figures['rejected_by_rule']}. See the ledger in "
            f"{storage.path(*target)}, or add data."
        )
    return Ingested(files=[StoredFile(**file) for w in written for file in w["files"]], figures=figures)


# ── the two passes ────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_group(task: _Task, index: int, files: Sequence[SourceFile]) -> dict[str, Any]:
    kept: list[Row] = []
    ledger: list[Rejected] = []
    for file in files:
        for raw in read_rows(file):
            if isinstance(raw, Rejected):
                ledger.append(raw)
                continue
            row = make_row(
                source=file.source,
                # A column of a source may be called `completion` or `user` too; there it is no more than data.
                origin=(raw.origin if task.is_feedback else None) or file.origin,
                position=raw.position,
                prompt=raw.prompt,
                text=normalize(raw.text, task.recipe.normalize),
                keyed_by_file=file.kind in ("code", "text"),
                holdout_share=task.recipe.holdout_share,
                cluster=raw.cluster if task.is_feedback else None,
            )
            # Feedback is what a person wrote: rules for collected text would throw short answers away.
            broken = broken_rule(row.text, () if task.is_feedback else task.recipe.filters)
            if broken is None:
                kept.append(row)
            else:
                ledger.append(_reject(row, *broken))
    task.storage.write_bytes(_to_parquet([asdict(row) for row in kept], CORPUS_SCHEMA), *task.scratch, f"{index}.kept")
    task.storage.write_bytes(
        _to_parquet([line.to_ledger() for line in ledger], LEDGER_SCHEMA), *task.scratch, f"{index}.rejected"
    )
    return {
        "hashes": [row.content_hash for row in kept],
        "sides": [row.side for row in kept],
        "rejected": len(ledger),
    }


def _write_group(task: _Task, index: int, drops: Mapping[int, str]) -> dict[str, Any]:
    kept = _from_parquet(task, f"{index}.kept")
    ledger = _from_parquet(task, f"{index}.rejected").to_pylist()
    for i, rule in drops.items():
        (values,) = kept.slice(i, 1).to_pylist()
        ledger.append(_reject(Row(**values), rule, 1.0, "the same content is there already").to_ledger())
    table = kept.filter(pa.array([i not in drops for i in range(kept.num_rows)], pa.bool_()))
    files = [task.storage.write_bytes(_serialize(table), *task.target, f"part-{index:05d}.parquet")]
    if ledger:
        data = _to_parquet(ledger, LEDGER_SCHEMA)
        files.append(task.storage.write_bytes(data, *task.target, f"rejected-{index:05d}.parquet"))
    return {
        "files": [asdict(file) for file in files],
        "kept": table.num_rows,
        "rejected": len(ledger),
        "holdout": table["side"].to_pylist().count("holdout"),
        "bytes": pa.compute.sum(pa.compute.binary_length(table["text"])).as_py() or 0,
        "rules": Counter(str(line["rule"]) for line in ledger),
    }


def _duplicates(places: Sequence[Mapping[str, Any]], seen: Mapping[str, str]) -> dict[int, dict[int, str]]:
    """Which rows of which group are dropped, and by which rule.

    Of several rows with the same content one in the holdout stays before one that would train, then the first.
    """
    survivor: dict[str, tuple[bool, int, int]] = {}
    for group, place in enumerate(places):
        for i, (content, side) in enumerate(zip(place["hashes"], place["sides"], strict=True)):
            candidate = (side != "holdout", group, i)
            if content not in survivor or candidate < survivor[content]:
                survivor[content] = candidate
    drops: dict[int, dict[int, str]] = {}
    for group, place in enumerate(places):
        for i, (content, side) in enumerate(zip(place["hashes"], place["sides"], strict=True)):
            before = seen.get(content)
            if before is not None:
                leak = before == "holdout" and side == "train"
                rule = "holdout_leak" if leak else "seen_by_ancestor"
            elif survivor[content][1:] != (group, i):
                rule = "duplicate"
            else:
                continue
            drops.setdefault(group, {})[i] = rule
    return drops


def _groups(files: Sequence[SourceFile]) -> Iterator[list[SourceFile]]:
    """Files in order, in groups of about 4 MB; a group never depends on how many workers there are."""
    group: list[SourceFile] = []
    size = 0
    for file in files:
        if group and size + file.num_bytes > _GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(file)
        size += file.num_bytes
    if group:
        yield group


def _reject(row: Row, rule: str, score: float, detail: str) -> Rejected:
    return Rejected(
        id=row.id,
        source=row.source,
        origin=row.origin,
        position=row.position,
        rule=rule,
        score=score,
        detail=detail,
        prompt=row.prompt,
        text=row.text,
    )


def _to_parquet(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> bytes:
    return _serialize(pa.Table.from_pylist(list(rows), schema=schema))


def _serialize(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _from_parquet(task: _Task, name: str) -> pa.Table:
    data = task.storage.read_bytes(*task.scratch, name)
    assert data is not None, name
    return pq.read_table(io.BytesIO(data))
