"""What is made of rows, but for corpora: sealed feedback, scores by row, packed tokens."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aifactory.proof.erasing.eraser import Place
from aifactory.proof.erasing.search import FEEDBACK, each_meant
from aifactory.proof.where import Where
from aifactory.records.artifacts import FeedbackBatch, Scorecard, TokenSet
from aifactory.records.identity import fingerprint


class Learnt(Place):
    """Batches and scorecards, written anew; token sets, deleted."""

    def erase_batches(self) -> None:
        where = dict(self.search.where.conditions)
        is_of_log = where.pop("source", FEEDBACK) == FEEDBACK and not where.keys() - {"user"}
        for batch in self.eraser.every(FeedbackBatch):
            gone = 0
            columns: set[str] = set()
            for file in batch.record.files:
                table = self.eraser.read(batch, file.name)
                columns |= set(table.column_names)
                meant = each_meant(table, "completion", self.search.is_said)
                if is_of_log and where:
                    meant |= Where(where).mask(table)
                gone += int(meant.sum())
            if not gone:
                continue
            self.found.add("batches", batch.id, gone)
            if self.erasure is None:
                continue
            objective = "dpo" if "rejected" in columns else "kto" if "label" in columns else "likelihood"
            number = int(batch.figures["number"])
            successor: FeedbackBatch | None = None
            if number in self.books.feedback.sealed():
                successor = self.books.feedback.publish(number, self.books.artifacts, objective=objective)
                assert successor.id != batch.id, "the log holds nothing any more of what is erased from its batch"
            self.eraser.replace(batch, successor, {"train": gone})

    def erase_scorecards(self) -> None:
        for card in self.eraser.every(Scorecard):
            name = "examples.parquet"
            if name not in {file.name for file in card.record.files}:
                continue
            table = self.eraser.read(card, name)
            gone = np.array([self.search.is_gone(each) for each in table["row"].to_pylist()], bool)
            if not gone.any():
                continue
            self.found.add("scorecards", card.id, int(gone.sum()))
            if self.erasure is None:
                continue
            record = card.record
            recipe = {**record.recipe, "erased_from": record.fingerprint, "erased": self.erasure.id}
            identity = fingerprint(
                stage=card.kind, code_version=record.code_version, recipe=recipe, inputs=[record.fingerprint]
            )
            target = self.books.artifacts.folder(card.kind, identity)
            sink = io.BytesIO()
            pq.write_table(table.filter(pa.array(~gone)), sink, compression="zstd")
            kept = [self.storage.write_bytes(sink.getvalue(), *target, name)]
            kept += [self.eraser.taken(card, file.name, target) for file in record.files if file.name != name]
            inputs = [card.id, *self.books.journal.left_of(each for each in record.inputs if each.startswith("model/"))]
            successor = self.eraser.published(Scorecard, record, identity, recipe, inputs, kept, record.figures)
            self.eraser.replace(card, successor, {"holdout": int(gone.sum())})

    def erase_token_sets(self) -> None:
        """Those that hold such rows, whose tokenizer was trained on them, or that use such a tokenizer."""
        every = list(self.eraser.every(TokenSet))
        if self.erasure is not None:
            noted = self.books.erasures.get(self.erasure.id)
            assert noted is not None
            self.found.tokenizers.update(noted.found.get("tokenizers", {}))
        held = {tokens.id: self._rows_of(tokens) for tokens in every}
        for tokens in every:
            if "vocab_size" in tokens.record.recipe and (held[tokens.id] or self._has_trained(tokens)):
                self.found.tokenizers[tokens.figures["tokenizer_digest"]] = tokens.id
        if self.erasure is not None and self.found.tokenizers:
            with self.books.database.write(serialize=True) as connection:
                for digest, token_id in self.found.tokenizers.items():
                    self.books.erasures.note(connection, self.erasure.id, "tokenizers", digest, value=token_id)
        for tokens in every:
            if (
                held[tokens.id]
                or self._has_trained(tokens)
                or tokens.figures["tokenizer_digest"] in self.found.tokenizers
            ):
                self.found.tokens.add(tokens.id)
                self.found.add("token sets", tokens.id, held[tokens.id])
                if self.erasure is not None:
                    self.eraser.replace(tokens, None, {"train": held[tokens.id]})

    def _rows_of(self, tokens: TokenSet) -> int:
        count = 0
        for file in tokens.record.files:
            if file.name.startswith("shard-"):
                data = self.storage.read_bytes(*self.books.artifacts.folder(tokens.kind, tokens.fingerprint), file.name)
                count += self.search.in_shard(data or b"")
        return count

    def _has_trained(self, tokens: TokenSet) -> bool:
        """Whether a row of its corpus is meant that stood on the side that trains."""
        corpus = tokens.record.inputs[0]
        erased = self.books.artifacts.erased(corpus)
        if erased is not None and self.erasure is not None and erased.erasure == self.erasure.id:
            return bool(erased.rows.get("train"))
        return bool(self.found.trained.get(corpus))
