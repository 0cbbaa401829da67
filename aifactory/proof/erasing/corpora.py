"""Corpora: rows on both sides, the ledger, the index and the page, written anew without what is meant."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aifactory.ingest.card import dataset_card
from aifactory.ingest.index import index_bytes, read_index
from aifactory.ingest.pipeline import counted_again
from aifactory.proof.erasing.eraser import Place
from aifactory.records.artifacts import Corpus
from aifactory.records.identity import fingerprint, hash_parts
from aifactory.records.rows import CORPUS_SCHEMA, LEDGER_SCHEMA, to_parquet
from aifactory.records.storage import StoredFile

_NAMED = ("id", "key", "user", "source", "label", "origin", "completion", "text")
_SIDES = ("train", "holdout", "rejected")


class CorpusRows(Place):
    """Rows of all corpora; those that are meant are found first, and erased later."""

    def find(self) -> list[dict[str, str]]:
        """The rows of all corpora that are meant; how many of each side and file is remembered."""
        rows: list[dict[str, str]] = []
        self._hits: dict[str, dict[str, int]] = {}
        for corpus in self.eraser.every(Corpus):
            for file in corpus.record.files:
                if not file.name.endswith(".parquet"):
                    continue
                table = _named_columns(self.eraser.read(corpus, file.name))
                if self.search.where.conditions.keys() & {"user", "label"} - set(table.column_names):
                    self.found.silent.add(corpus.id)
                meant = self.search.mask(table)
                if not meant.any():
                    continue
                self._hits.setdefault(corpus.id, {})[file.name] = int(meant.sum())
                for row in table.filter(pa.array(meant)).to_pylist():
                    self.eraser.quote(row.pop("text"))
                    rows.append(row)
                    self.found.sources.add(row["source"])
        self.search.row_ids.update(row["id"] for row in rows)
        return rows

    def erase(self) -> None:
        for corpus_id, hits in list(self._hits.items()):
            corpus = self.books.artifacts.get(Corpus, corpus_id)
            rows = {side: sum(count for name, count in hits.items() if name.startswith(f"{side}-")) for side in _SIDES}
            self.found.trained[corpus_id] = rows["train"]
            for side, count in rows.items():
                if count:
                    self.found.add(
                        {"train": "corpora", "holdout": "holdouts", "rejected": "ledgers"}[side], corpus_id, count
                    )
            if self.erasure is not None:
                self.eraser.replace(corpus, self._without(corpus, sum(hits.values())), rows)

    def _without(self, corpus: Corpus, erased: int) -> Corpus | None:
        """The corpus without what is meant; None where nothing is left of it."""
        record, keyed = corpus.record, self.search.keyed
        assert keyed is not None
        numbers = sorted({name.partition("-")[2].partition(".")[0] for name in _parts_of(corpus)})
        hashes: list[str] = []
        masks: dict[str, npt.NDArray[np.bool_]] = {}
        for name in _parts_of(corpus):
            table = _named_columns(self.eraser.read(corpus, name))
            masks[name] = self.search.mask(table)
            ids = table["id"].filter(pa.array(masks[name])).to_pylist()
            hashes += [keyed.of("row", each) for each in ids]
        recipe = {
            **record.recipe,
            "erased_from": record.fingerprint,
            "erased": hash_parts(*sorted(hashes)),
        }
        identity = fingerprint(
            stage=Corpus.kind, code_version=record.code_version, recipe=recipe, inputs=[record.fingerprint]
        )
        known = self.books.artifacts.find(Corpus, identity)
        if known is not None:
            return known
        kept: list[StoredFile] = []
        target = self.books.artifacts.folder(Corpus.kind, identity)

        def parts() -> Iterator[tuple[pa.Table, pa.Table, pa.Table]]:
            for number in numbers:
                sides = {}
                for side in _SIDES:
                    name = f"{side}-{number}.parquet"
                    schema = LEDGER_SCHEMA if side == "rejected" else CORPUS_SCHEMA
                    table = self.eraser.read(corpus, name) if name in masks else schema.empty_table()
                    sides[side] = table
                    if name in masks and masks[name].any():
                        sides[side] = table = table.filter(pa.array(~masks[name]))
                        if table.num_rows:
                            kept.append(self.storage.write_bytes(to_parquet(table), *target, name))
                    elif name in masks:
                        kept.append(self.eraser.taken(corpus, name, target))
                index = f"index-{number}.arrow"
                if index in {file.name for file in record.files}:
                    kept.append(self._index_without(corpus, index, masks, number, target))
                yield sides["train"], sides["holdout"], sides["rejected"]

        figures = counted_again(record.figures, parts(), erased=erased, gone=self.search.is_gone)
        if not figures["rows_kept"] and not figures["rows_rejected"]:
            self.storage.delete(*target)
            return None
        from aifactory.ingest.corpus_page import REPORT_FILE, corpus_report

        name = self.books.config.name
        kept.append(self.storage.write_bytes(dataset_card(name, figures).encode(), *target, "README.md"))
        kept.append(self.storage.write_bytes(corpus_report(name, figures), *target, REPORT_FILE))
        inputs = [corpus.id, *self.books.journal.left_of(each for each in record.inputs if each.startswith("batch/"))]
        return self.eraser.published(Corpus, record, identity, recipe, inputs, kept, figures)

    def _index_without(
        self,
        corpus: Corpus,
        name: str,
        masks: dict[str, npt.NDArray[np.bool_]],
        number: str,
        target: tuple[str, str],
    ) -> StoredFile:
        sides = [masks.get(f"{side}-{number}.parquet", np.zeros(0, bool)) for side in ("train", "holdout")]
        gone = np.concatenate(sides)
        if not gone.any():
            return self.eraser.taken(corpus, name, target)
        data = self.storage.read_bytes(*self.books.artifacts.folder(corpus.kind, corpus.fingerprint), name)
        assert data is not None, name
        return self.storage.write_bytes(index_bytes(read_index(data).take(~gone)), *target, name)


def _named_columns(table: pa.Table) -> pa.Table:
    """The columns by which rows are found; what a table of another version lacks is left out."""
    return table.select([name for name in _NAMED if name in table.column_names])


def _parts_of(corpus: Corpus) -> list[str]:
    """The files with rows, by name."""
    return sorted(
        file.name
        for file in corpus.record.files
        if file.name.endswith(".parquet") and file.name.startswith(tuple(f"{side}-" for side in _SIDES))
    )
