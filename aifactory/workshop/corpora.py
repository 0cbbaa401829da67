"""Corpora: what identifies the clean rows of sources or of feedback, and what ingest is handed to make them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeGuard

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aifactory.config import Columns, FeedbackSource, Ingest, ParquetSource, Source
from aifactory.errors import StorageError
from aifactory.ingest.databases import keys_of_log
from aifactory.ingest.decisions import Earlier
from aifactory.ingest.feedback_rows import Trusting
from aifactory.ingest.index import Index, held_out, joined, read_index, sign, signature_recipe, sketch
from aifactory.ingest.listing import Piece, list_pieces
from aifactory.ingest.pipeline import CODE_VERSION, Work, ingest_pieces
from aifactory.ingest.steps import step_recipes
from aifactory.records.artifacts import Corpus, FeedbackBatch
from aifactory.records.erasures import Tombstones
from aifactory.records.journal import Cycle
from aifactory.records.rows import index_names, read_ledger, read_part
from aifactory.records.storage import Storage
from aifactory.workshop.bench import Bench, Folder, Identity, Made
from aifactory.workshop.step_models import StepModels

FEEDBACK = "feedback"


class Corpora:
    """Makes the corpora of one factory."""

    def __init__(self, bench: Bench, *, buried: Callable[[], Tombstones | None] | None = None) -> None:
        """`buried`: what may not come back from any source, where the books of the bench do not say it."""
        self._bench = bench
        self._buried = buried or bench.books.erasures.tombstones
        self.step_models = StepModels(bench.books)

    def of_sources(self, cycle: Cycle, pieces: Sequence[Piece]) -> Corpus:
        """The corpus of the configuration's sources."""
        recipe = self._bench.config.ingest
        return self._ingest(cycle, pieces, recipe, [cycle.bound.sources_digest], ancestors=[], batch=None)

    def of_batch(self, cycle: Cycle, batch: FeedbackBatch, ancestors: Sequence[Corpus]) -> Corpus:
        """The corpus of one feedback batch: no row of it that an ancestor has trained or was judged on.

        Feedback is what a person wrote: rules for collected text would throw short answers away.
        """
        config = self._bench.config
        recipe = config.ingest.model_copy(
            update={
                "holdout_share": config.improve.holdout_share,
                "holdout_strata": (),
                "steps": tuple(step for step in config.ingest.steps if step.FOR_FEEDBACK),
            }
        )
        answers = {
            "likelihood": {"text": "text"},
            "dpo": {"chosen": "text", "rejected": "rejected"},
            "kto": {"text": "text", "label": "label"},
        }[config.train.objective]
        told = {"prompt": "prompt", "user": "user", "origin": "completion"}
        columns = Columns.model_validate(answers | told)
        source = ParquetSource(
            name=FEEDBACK,
            kind="parquet",
            path=str(self._bench.books.artifacts.fetch(batch)),
            include=("*.parquet",),
            columns=columns,
        )
        pieces = list_pieces([source]).pieces
        return self._ingest(cycle, pieces, recipe, [batch.fingerprint], ancestors=ancestors, batch=batch)

    def _ingest(
        self,
        cycle: Cycle,
        pieces: Sequence[Piece],
        recipe: Ingest,
        contents: Sequence[str],
        *,
        ancestors: Sequence[Corpus],
        batch: FeedbackBatch | None,
    ) -> Corpus:
        books, storage = self._bench.books, self._bench.books.storage
        models, releases = self.step_models.bound(cycle, recipe.models)
        plain = {
            "steps": step_recipes(recipe.steps, models),
            "holdout_share": recipe.holdout_share,
            "quarantine": recipe.quarantine,
            "holdout_strata": [stratum.model_dump(mode="json") for stratum in recipe.holdout_strata],
        }
        restored: Sequence[tuple[str, str]] = ()
        tombstones: Tombstones | None = None
        if batch is None:
            plain["sources"] = [source.recipe() for source in recipe.sources]
            plain["restored"] = [list(each) for each in cycle.bound.restored]
            restored = cycle.bound.restored
            tombstones = self.tombstones()
            if tombstones is not None and (digest := tombstones.digest(source.name for source in recipe.sources)):
                plain["erased"] = digest
        trusting = self._trusting(recipe, batch)
        if trusting is not None:
            plain["trust"] = trusting.to_json()
        elsewhere = [
            books.artifacts.get(Corpus, corpus_id)
            for corpus_id in cycle.bound.holdouts
            if corpus_id not in {corpus.id for corpus in ancestors}
        ]

        def write(target: Folder) -> Made:
            earlier = Earlier(
                ancestors=joined([_index_of(storage, corpus, recipe) for corpus in ancestors]),
                holdouts=joined([held_out(_index_of(storage, corpus, recipe)) for corpus in elsewhere]),
                corpora=[*ancestors, *elsewhere],
            )
            ingested = ingest_pieces(
                pieces,
                Work.of(recipe, storage, restored=self._restored(restored), models=models, tombstones=tombstones),
                name=self._bench.config.name,
                earlier=earlier,
                target=target,
                run=self._bench.run_for(sum(piece.num_bytes for piece in pieces)),
                trusting=None if trusting is None else replace(trusting, keys=self._keys(pieces, batch)),
            )
            return Made(files=ingested.files, figures=ingested.figures)

        identity = Identity(
            noun=Corpus,
            code_version=CODE_VERSION,
            recipe=plain,
            contents=contents,
            inputs=[*ancestors, *elsewhere, *([batch] if batch is not None else []), *releases],
        )
        return self._bench.make(cycle, identity, write, event="ingested", num_cpus=self._bench.data_cpus)

    def _trusting(self, recipe: Ingest, batch: FeedbackBatch | None) -> Trusting | None:
        """How feedback is judged, where there is any."""
        policy = self._bench.config.improve.trust
        if policy is None:
            return None
        if batch is not None:
            return Trusting(policy=policy, sources=frozenset({FEEDBACK}))
        logs = {source.name for source in recipe.sources if _is_said(source)}
        return Trusting(policy=policy, sources=frozenset(logs)) if logs else None

    def _keys(self, pieces: Sequence[Piece], batch: FeedbackBatch | None) -> dict[str, str]:
        """By completion the key by which the feedback on it came, where there was one."""
        keys: dict[str, str] = {}
        if batch is None:
            for name, source in {piece.source: piece.section for piece in pieces}.items():
                if _is_said(source):
                    stops = [str(span.stop) for piece in pieces if piece.source == name for span in piece.spans]
                    keys |= keys_of_log(source, stops)
            return keys
        for file in batch.record.files:
            data = self._bench.books.storage.read_bytes(batch.kind, batch.fingerprint[:16], file.name)
            if data is None:
                raise StorageError(f"expected {batch.uri}/{file.name}, found no such file; start over in another root.")
            table = pq.read_table(pa.BufferReader(data))
            if "key" in table.column_names:
                pairs = zip(table["completion"].to_pylist(), table["key"].to_pylist(), strict=True)
                keys |= {completion: key for completion, key in pairs if key}
        return keys

    def tombstones(self) -> Tombstones | None:
        """What was erased and may not come back from the sources. The factory's own log has lost it already, and what
        somebody else said in the same words is not his who asked."""
        found = self._buried()
        if found is None:
            return None
        logs = {s.name for s in self._bench.config.ingest.sources if isinstance(s, FeedbackSource)}
        left = {source: hashes for source, hashes in found.by_source.items() if source not in logs}
        return Tombstones(found.keyed, left) if left else None

    def _restored(self, asked_for: Sequence[tuple[str, str]]) -> dict[str, frozenset[str]]:
        """By rule the keys of the rows that a person has brought back from the ledgers."""
        books = self._bench.books
        keys: dict[str, set[str]] = {}
        for corpus_id, rule in asked_for:
            corpus = books.artifacts.left_of(Corpus, corpus_id)
            for table in read_ledger(books.storage, corpus, columns=["rule", "key"]):
                found = table.filter(pc.equal(table["rule"], rule))["key"].to_pylist()
                keys.setdefault(rule, set()).update(filter(None, found))
        return {rule: frozenset(found) for rule, found in keys.items()}


def _is_said(source: Source) -> TypeGuard[FeedbackSource]:
    """Whether a source is what users said of answers."""
    return isinstance(source, FeedbackSource) and source.of != "completions"


def _index_of(storage: Storage, corpus: Corpus, recipe: Ingest) -> Index:
    """The index of all rows of a corpus, with what rows of this recipe are compared by."""
    near, quarantine = recipe.near_duplicates, recipe.quarantine
    signed = None if near is None else signature_recipe(near)
    indexes = []
    for name in index_names(corpus):
        data = storage.read_bytes(corpus.kind, corpus.fingerprint[:16], name)
        if data is None:
            raise StorageError(f"expected {corpus.uri}/{name}, found no such file; ingest again from another root.")
        index = read_index(data)
        if near is None:
            index = replace(index, signatures_NP=None)
        elif corpus.figures["signature"] != signed:
            index = replace(index, signatures_NP=sign(read_part(storage, corpus, name), near))
        if quarantine is None:
            index = replace(index, sketches=None)
        elif index.sketches is None:
            index = replace(index, sketches=sketch(read_part(storage, corpus, name)))
        indexes.append(index)
    return joined(indexes)
