"""Ingest: sources -> Corpus.

Reads    the pieces of the sources: files, parts of files, rows of a database, a sealed feedback batch
Writes   corpus/<fp>/train-*.parquet, holdout-*.parquet   the rows that are kept (CORPUS_SCHEMA), by side
         corpus/<fp>/rejected-*.parquet                   the ledger (LEDGER_SCHEMA)
         corpus/<fp>/index-*.arrow                        ids, contents and sketches of the kept rows (see `index`)
         corpus/<fp>/README.md                            the dataset card
         corpus/<fp>/report.html                          the same for a person who has a minute, with pictures
Law      rows_in == rows_kept + rows_rejected + rows_erased: what somebody asked to forget comes in and goes no further,
         neither as a row nor in the ledger. A piece depends on the data alone, so that the bytes never depend on the
         number of workers.
Raises   EmptyCorpusError, ConfigError.

Two passes over the pieces. The first reads, takes the steps and publishes each piece as a part. Which rows are
duplicates, and which would leak a holdout, is decided over all of them by their index alone; the second pass puts the
corpus together, without those rows. Both passes look
for their parts first, so a run that was killed, and a run over data of which little is new, only makes what is not there.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from aifactory.cluster.tasks import RunTasks
from aifactory.config import DecontaminateStep, HoldoutStratum, Ingest, NearDuplicatesStep, PersonalStep, RowStep
from aifactory.errors import EmptyCorpusError
from aifactory.ingest.card import dataset_card
from aifactory.ingest.decisions import Earlier, decide_drops
from aifactory.ingest.duplicates import Drops
from aifactory.ingest.feedback_rows import Trusting, trust_drops
from aifactory.ingest.index import INDEX_FILE, Index, index_bytes, index_of, read_index, signature_recipe
from aifactory.ingest.labels import summed
from aifactory.ingest.listing import Piece
from aifactory.ingest.model_scores import StepModel
from aifactory.ingest.readers import read_piece
from aifactory.ingest.steps import Broken, Figures, apply_steps, reject_empty, step_recipes
from aifactory.records.erasures import Kind, Tombstones
from aifactory.records.identity import fingerprint, hash_text
from aifactory.records.parts import Part, PartStore, made
from aifactory.records.rows import (
    CORPUS_SCHEMA,
    LEDGER_SCHEMA,
    assign_ids,
    assign_keys,
    from_ipc,
    to_ipc,
    to_parquet,
)
from aifactory.records.storage import Content, Storage, StoredFile

CODE_VERSION = 6
_SIDES = ("train", "holdout")
_EXAMPLES = 3
_EXAMPLE_CHARS = 400
_SHOWN_STRATA = 200
_LOOKED_AT_CHARS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingested:
    """What was written and counted."""

    files: list[StoredFile]
    figures: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What makes a corpus, beside the pieces; pickled into every task."""

    steps: tuple[RowStep, ...]
    """What is done to each row."""
    models: Mapping[str, StepModel]
    """The models that steps ask, by the names that the configuration gives them."""
    recipes: Sequence[Mapping[str, Any]]
    """What of the steps bears identity."""
    near_duplicates: NearDuplicatesStep | None
    decontaminate: DecontaminateStep | None
    quarantine: float | None
    """How like one that is held out a row that trains may not be; None where rows have no sketches to tell it by."""
    holdout_share: float
    holdout_strata: Sequence[HoldoutStratum]
    restored: Mapping[str, frozenset[str]]
    """By rule the keys of rows that a person has brought back."""
    storage: Storage
    tombstones: Tombstones | None = None
    """What was erased and may not come back."""

    @classmethod
    def of(
        cls,
        recipe: Ingest,
        storage: Storage,
        *,
        restored: Mapping[str, frozenset[str]] | None = None,
        models: Mapping[str, StepModel] | None = None,
        tombstones: Tombstones | None = None,
    ) -> Work:
        """The work that a configuration asks for. Raises ConfigError for a function that is not there."""
        return cls(
            steps=recipe.row_steps,
            models=models or {},
            recipes=step_recipes(recipe.row_steps, models or {}),
            near_duplicates=recipe.near_duplicates,
            decontaminate=recipe.decontaminate,
            quarantine=recipe.quarantine,
            holdout_share=recipe.holdout_share,
            holdout_strata=recipe.holdout_strata,
            restored=restored or {},
            storage=storage,
            tombstones=tombstones,
        )

    def erased_of(self, sources: Iterable[str]) -> dict[str, str]:
        """What of erasures bears the identity of what is made of these sources: nothing where nothing was erased from them."""
        digest = "" if self.tombstones is None else self.tombstones.digest(sources)
        return {"erased": digest} if digest else {}

    def identity(self, piece: Piece) -> str:
        """The fingerprint of what is made of one piece."""
        recipe = {
            "steps": self.recipes,
            "signature": None if self.near_duplicates is None else signature_recipe(self.near_duplicates),
            "sketched": self.quarantine is not None,
            "holdout_share": self.holdout_share,
            "holdout_strata": [stratum.model_dump(mode="json") for stratum in self.holdout_strata],
            "restored": {rule: sorted(keys) for rule, keys in sorted(self.restored.items())},
            "source": piece.source,
            "keyed_by_file": piece.keyed_by_file,
            **self.erased_of([piece.source]),
        }
        return fingerprint(stage="ingest-part", code_version=CODE_VERSION, recipe=recipe, inputs=[piece.digest])


def ingest_pieces(
    pieces: Sequence[Piece],
    work: Work,
    *,
    name: str,
    earlier: Earlier,
    target: tuple[str, ...],
    run: RunTasks,
    trusting: Trusting | None = None,
) -> Ingested:
    """Write the corpus of `pieces` to the directory `target`.

    earlier   what earlier corpora hold: none of what an ancestor was trained or judged on comes again, and nothing trains
              that any of them has held out
    trusting  how feedback among the rows is judged
    """
    store = PartStore(work.storage)
    parts = made(store, run, _read_part, [(work.identity(piece), (work, piece)) for piece in pieces])
    indexes = [read_index(store.read(part, INDEX_FILE)) for part in parts]
    distrusted, trust = None, None
    if trusting is not None:
        distrusted, trust = trust_drops(parts, trusting, corpora=earlier.corpora, storage=work.storage)
    drops = decide_drops(
        parts,
        indexes,
        earlier,
        near=work.near_duplicates,
        decontaminate=work.decontaminate,
        quarantine=work.quarantine,
        storage=work.storage,
        run=run,
        distrusted=distrusted,
    )
    whole = made(
        store,
        run,
        _write_part,
        [(_rest_identity(part, dropped), (work, part, dropped)) for part, dropped in zip(parts, drops, strict=True)],
    )
    files = store.take(
        [
            (part, file, (*target, f"{file.partition('.')[0]}-{number:05d}.{file.partition('.')[2]}"))
            for number, part in enumerate(whole)
            for file in sorted(part.files)
        ]
    )
    figures = _sum_up(pieces, work, parts, whole) | ({} if trust is None else {"trust": trust})
    if figures["rows_kept"] == figures["rows_holdout"]:
        raise EmptyCorpusError(
            f"expected rows to train on, found {figures['rows_in']} rows of which {figures['rows_kept']} were kept, all of "
            f"them in the holdout; rejected by rule: {figures['rejected_by_rule']}. See the ledger in "
            f"{work.storage.path(*target)}, or add data."
        )
    # The plotting library is loaded where there is something to draw, and nowhere else.
    from aifactory.ingest.corpus_page import REPORT_FILE, corpus_report

    files.append(work.storage.write_bytes(dataset_card(name, figures).encode(), *target, "README.md"))
    files.append(work.storage.write_bytes(corpus_report(name, figures), *target, REPORT_FILE))
    return Ingested(files=files, figures=figures)


# ── the two passes ────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_part(identity: str, work: Work, piece: Piece) -> None:
    """Read one piece, take the steps, publish what is left and the ledger of the rest."""
    kept: list[pa.Table] = []
    ledger: list[pa.Table] = []
    figures = Figures()
    rows_in = rows_erased = 0
    for block in read_piece(piece):
        rows_in += block.rows.num_rows + len(block.malformed)
        if block.malformed:
            lines = pa.Table.from_pylist([line.to_ledger() for line in block.malformed], LEDGER_SCHEMA)
            ledger.append(_not_erased(lines, "row", "id", piece.source, work))
            rows_erased += len(block.malformed) - ledger[-1].num_rows
        rows = assign_keys(
            block.rows,
            source=piece.source,
            keyed_by_file=piece.keyed_by_file,
            holdout_share=_holdout_shares(block.rows, piece.source, work),
        )
        rows_read = rows.num_rows
        rows = _not_erased(rows, "key", "key", piece.source, work)
        rows_erased += rows_read - rows.num_rows
        rows, empty = reject_empty(rows)
        rows, broken = apply_steps(rows, work.steps, figures, restored=work.restored, models=work.models)
        ledger += [_ledger_of(some) for some in (empty, *broken) if some.rules]
        kept.append(assign_ids(rows))
    rows = pa.concat_tables(kept) if kept else CORPUS_SCHEMA.empty_table()
    rejected = pa.concat_tables(ledger) if ledger else LEDGER_SCHEMA.empty_table()
    sides = [_only(rows, pc.equal(rows["side"], side)) for side in _SIDES]
    counted = {"rows_in": rows_in, "rows_erased": rows_erased, "steps": [dict(step) for step in figures.steps]}
    _publish(work, identity, sides, rejected, None, counted)


def _only(rows: pa.Table, wanted: pa.ChunkedArray) -> pa.Table:
    """The rows of a mask, without a copy where those are all."""
    return rows if pc.all(wanted).as_py() else rows.filter(wanted)


def _not_erased(rows: pa.Table, kind: Kind, column: str, source: str, work: Work) -> pa.Table:
    """The rows that nobody asked to forget; the others are not even told of in the ledger."""
    if work.tombstones is None or source not in work.tombstones.by_source:
        return rows
    return rows.filter(pa.array(work.tombstones.keep(kind, source, rows[column].to_pylist()), pa.bool_()))


def _holdout_shares(rows: pa.Table, source: str, work: Work) -> npt.NDArray[np.float64]:
    """The share of the stratum of each row."""
    shares = np.full(rows.num_rows, work.holdout_share)
    for stratum in reversed(work.holdout_strata):
        if stratum.source in (None, source):
            fits = np.ones(rows.num_rows, bool)
            if stratum.label is not None:
                fits = pc.equal(rows["label"], stratum.label).to_numpy()
            shares[fits] = stratum.share
    return shares


def _write_part(identity: str, work: Work, part: Part, drops: Drops) -> None:
    """A part without the rows that were dropped; they go to the ledger."""
    store = PartStore(work.storage)
    index = read_index(store.map(part, INDEX_FILE))
    tables = [
        from_ipc(store.map(part, f"{side}.arrow")) if f"{side}.arrow" in part.files else CORPUS_SCHEMA.empty_table()
        for side in _SIDES
    ]
    stays = np.ones(len(index), bool)
    stays[drops.places_D] = False
    gone = pa.concat_tables(tables).filter(pa.array(~stays))
    dropped = _ledger_of(Broken(gone, list(drops.rules), drops.scores_D.tolist(), list(drops.details)))
    known = [from_ipc(store.map(part, "rejected.arrow"))] if "rejected.arrow" in part.files else []
    border = tables[0].num_rows
    kept = [_staying(tables[0], stays[:border]), _staying(tables[1], stays[border:])]
    rejected = pa.concat_tables([*known, dropped])
    _publish(work, identity, kept, rejected, index.take(stays).to_keep(), _counted(kept, rejected, work.steps))


def _staying(rows: pa.Table, stays: npt.NDArray[np.bool_]) -> pa.Table:
    """The rows of a mask, each column in one piece: where pages end in a Parquet file depends on that.

    Where few rows go, what lies between them is copied as it lies, and each byte once.
    """
    turns = np.flatnonzero(np.diff(np.concatenate([[False], stays, [False]])))
    if 8 * len(turns) > len(stays):
        return rows.filter(pa.array(stays)).combine_chunks()
    runs = [rows.slice(start, stop - start) for start, stop in turns.reshape(-1, 2).tolist()]
    return pa.concat_tables(runs).combine_chunks() if runs else rows.slice(0, 0)


def _publish(
    work: Work,
    identity: str,
    sides: Sequence[pa.Table],
    rejected: pa.Table,
    index: Index | None,
    figures: Mapping[str, Any],
) -> None:
    """Publish a part: the rows of each side, the ledger, the index, which the second pass has from the first."""
    is_last = index is not None
    to_bytes, ending = (to_parquet, "parquet") if is_last else (to_ipc, "arrow")
    named = zip((*_SIDES, "rejected"), (*sides, rejected), strict=True)
    files: dict[str, Content] = {f"{name}.{ending}": to_bytes(rows) for name, rows in named if rows.num_rows}
    if index is None:
        rows = pa.concat_tables(sides)
        index = index_of(rows, near=work.near_duplicates, has_sketches=work.quarantine is not None)
    files[INDEX_FILE] = index_bytes(index)
    PartStore(work.storage).publish(identity, files, figures, to_be_taken=is_last, hashed=is_last)


def _counted(sides: Sequence[pa.Table], rejected: pa.Table, steps: Sequence[RowStep]) -> dict[str, Any]:
    """What a part holds; adds up over parts."""
    rows = pa.concat_tables(sides)
    sizes = pc.binary_length(rows["text"]).to_numpy().astype(np.int64)
    lengths = Counter((1 << np.maximum(np.log2(np.maximum(sizes, 1)).astype(np.int64), 0)).tolist())
    return {
        "rows_kept": rows.num_rows,
        "rows_holdout": sides[1].num_rows,
        "rows_rejected": rejected.num_rows,
        "bytes_kept": int(sizes.sum()),
        "rejected_by_rule": _counts(rejected["rule"]),
        "lengths": {str(least): count for least, count in sorted(lengths.items())},
        "kept_by_source": _counts(rows["source"]),
        "rejected_by_source": _counts(rejected["source"]),
        "strata": _strata(sides),
        "languages": _counts(rows["language"]),
        "labels": _counts(rows["label"]),
        "examples": _examples(rejected, steps),
    }


def _strata(sides: Sequence[pa.Table]) -> dict[str, int]:
    """How many rows of each source and label are on each side, by these three as JSON."""
    counted: dict[str, int] = {}
    for side, rows in zip(_SIDES, sides, strict=True):
        groups = rows.group_by(["source", "label"]).aggregate([([], "count_all")]).to_pylist()
        counted |= {json.dumps([each["source"], each["label"], side]): each["count_all"] for each in groups}
    return counted


def _counts(values: pa.ChunkedArray) -> dict[str, int]:
    """How often each value is there, but ""."""
    return {item["values"]: item["counts"] for item in pc.value_counts(values).to_pylist() if item["values"]}


def _examples(rejected: pa.Table, steps: Sequence[RowStep]) -> dict[str, list[dict[str, Any]]]:
    """The first rows that each rule took.

    They are shown more widely than the ledger is, so where personal data is masked it is masked in them too, also in a row
    that was rejected before its turn came.
    """
    examples: dict[str, list[dict[str, Any]]] = {}
    names = ("id", "source", "origin", "position", "score", "detail", "text")
    for rule in sorted(_counts(rejected["rule"])):
        first = rejected.filter(pc.equal(rejected["rule"], rule)).slice(0, _EXAMPLES).select(names)
        # What is masked may end beyond what is shown, and makes a text shorter.
        texts = pc.utf8_slice_codeunits(first["text"], 0, _LOOKED_AT_CHARS).combine_chunks()
        for step in steps:
            if isinstance(step, PersonalStep):
                from aifactory.ingest.personal import mask_personal

                texts = mask_personal(texts, step.kinds, names_model=step.names_model).texts
        shown = [text[:_EXAMPLE_CHARS] for text in texts.to_pylist()]
        examples[rule] = [{**row, "text": text} for row, text in zip(first.to_pylist(), shown, strict=True)]
    return examples


def _rest_identity(part: Part, drops: Drops) -> str:
    """The fingerprint of a part without the rows that are dropped."""
    lost = {
        "places": hashlib.sha256(drops.places_D.tobytes()).hexdigest(),
        "scores": hashlib.sha256(drops.scores_D.tobytes()).hexdigest(),
        "rules": list(drops.rules),
        "details": hash_text("\n".join(drops.details)),
    }
    return fingerprint(stage="ingest-rest", code_version=CODE_VERSION, recipe=lost, inputs=[part.fingerprint])


def _ledger_of(broken: Broken) -> pa.Table:
    rows = assign_ids(broken.rows) if "id" not in broken.rows.column_names else broken.rows
    said = {"rule": broken.rules, "score": broken.scores, "detail": broken.details}
    columns = [
        pa.array(said[name], LEDGER_SCHEMA.field(name).type) if name in said else rows[name]
        for name in LEDGER_SCHEMA.names
    ]
    return pa.table(columns, schema=LEDGER_SCHEMA)


def _sum_up(pieces: Sequence[Piece], work: Work, parts: Sequence[Part], whole: Sequence[Part]) -> dict[str, Any]:
    """The figures of the corpus."""
    kept, rejected = (_added(part.figures[f"{side}_by_source"] for part in whole) for side in ("kept", "rejected"))
    figures: dict[str, Any] = {
        "rows_in": sum(part.figures["rows_in"] for part in parts),
        **{
            name: sum(part.figures[name] for part in whole)
            for name in ("rows_kept", "rows_rejected", "rows_holdout", "bytes_kept")
        },
        "rows_erased": sum(part.figures["rows_erased"] for part in parts),
        **{name: _added(part.figures[name] for part in whole) for name in ("rejected_by_rule", "languages", "labels")},
        "lengths": dict(
            sorted(_added(part.figures["lengths"] for part in whole).items(), key=lambda item: int(item[0]))
        ),
        "sources": {
            source: {"kept": kept.get(source, 0), "rejected": rejected.get(source, 0)}
            for source in sorted({piece.source for piece in pieces})
        },
        "strata": _strata_of(_added(part.figures["strata"] for part in whole)),
        "examples": _first_examples(part.figures["examples"] for part in whole),
        "steps": [
            {
                "step": step.step,
                **summed(_added(part.figures["steps"][at] for part in parts if at < len(part.figures["steps"]))),
            }
            for at, step in enumerate(work.steps)
        ],
        "corpus_steps": [step.step for step in (work.near_duplicates, work.decontaminate) if step is not None],
        "signature": None if work.near_duplicates is None else signature_recipe(work.near_duplicates),
        "quarantine": work.quarantine,
        "pieces": len(pieces),
        "source_files": sum(piece.num_files for piece in pieces),
    }
    assert figures["rows_in"] == sum(figures[f"rows_{what}"] for what in ("kept", "rejected", "erased")), figures
    return figures


def counted_again(
    figures: Mapping[str, Any],
    parts: Iterable[tuple[pa.Table, pa.Table, pa.Table]],
    *,
    erased: int,
    gone: Callable[[str], bool],
) -> dict[str, Any]:
    """The figures of a corpus from which rows were erased.

    parts    what is left, part by part: rows that train, rows that are held out, the ledger
    erased   how many rows are gone that were there
    gone     whether the row of this id is
    """
    whole = [_counted((train, holdout), rejected, ()) for train, holdout, rejected in parts]
    kept, rejected = (_added(part[f"{side}_by_source"] for part in whole) for side in ("kept", "rejected"))
    examples = {
        rule: left
        for rule, rows in figures["examples"].items()
        if (left := [row for row in rows if not gone(row["id"])])
    }
    return {
        **figures,
        **{
            name: sum(part[name] for part in whole)
            for name in ("rows_kept", "rows_rejected", "rows_holdout", "bytes_kept")
        },
        "rows_erased": figures["rows_erased"] + erased,
        **{name: _added(part[name] for part in whole) for name in ("rejected_by_rule", "languages", "labels")},
        "lengths": dict(sorted(_added(part["lengths"] for part in whole).items(), key=lambda item: int(item[0]))),
        "sources": {
            source: {"kept": kept.get(source, 0), "rejected": rejected.get(source, 0)} for source in figures["sources"]
        },
        "strata": _strata_of(_added(part["strata"] for part in whole)),
        "examples": examples,
        # What was found quotes rows; some of them may be among those that are gone.
        **({"trust": {**figures["trust"], "attacks": []}} if "trust" in figures else {}),
    }


def _strata_of(counted: Mapping[str, int]) -> list[dict[str, Any]]:
    """The sides of each source and label, those of most rows first."""
    strata: dict[tuple[str, str], dict[str, int]] = {}
    for told, count in counted.items():
        source, label, side = json.loads(told)
        strata.setdefault((source, label), dict.fromkeys(_SIDES, 0))[side] = count
    largest = sorted(strata.items(), key=lambda item: (-sum(item[1].values()), item[0]))[:_SHOWN_STRATA]
    return [{"source": source, "label": label, **sides} for (source, label), sides in largest]


def _first_examples(found: Iterable[Mapping[str, list[Any]]]) -> dict[str, list[Any]]:
    examples: dict[str, list[Any]] = {}
    for part in found:
        for rule, rows in part.items():
            examples[rule] = [*examples.get(rule, []), *rows][:_EXAMPLES]
    return dict(sorted(examples.items()))


def _added(counted: Iterable[Mapping[str, int]]) -> dict[str, int]:
    return dict(sorted(sum((Counter(each) for each in counted), Counter()).items()))
