"""Held-out rows, packed: what a run is validated on while it trains.

Reads    rows on the side `holdout` of the corpora that a run trains on, and the tokenizer of its first token set
Writes   <target>/shard-00000.arrow
Depends  on the corpora, the tokenizer and the number of rows alone: those of the lowest hash of their ids are taken.
Raises   EmptyCorpusError.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from aifactory.errors import EmptyCorpusError
from aifactory.records.artifacts import Corpus
from aifactory.records.identity import share_of
from aifactory.records.rows import read_corpus
from aifactory.records.storage import Storage
from aifactory.text.documents import encode_documents
from aifactory.text.encoder import open_encoder
from aifactory.text.shards import PackedRows, shard_bytes
from aifactory.text.tokenizer import load_tokenizer
from aifactory.tokens.preferences import LIKELIHOOD

NAME = "shard-00000.arrow"
_COLUMNS = ("id", "prompt", "text", "messages")
_OF_PREFERENCES = ("rejected", "label")
_DOCUMENTS_A_ROW = 8
"""So many documents are drawn for each packed row: short ones are then enough to fill it, more often than not."""


def pack_held_out(
    corpora: Sequence[Corpus],
    *,
    tokenizer_folder: Path,
    chat_fallback: str,
    row_len: int,
    rows: int,
    storage: Storage,
    target: tuple[str, ...],
    objective: str = LIKELIHOOD,
) -> str:
    """Write at most so many packed `rows` of held-out documents, as `objective` has them, to the directory `target`; return the
    name of the file."""
    from aifactory.tokens.packing import pack_documents, pack_preferences
    from aifactory.tokens.preferences import encode_preferences

    if storage.size(*target, NAME) is not None:
        return NAME
    wanted = _COLUMNS if objective == LIKELIHOOD else (*_COLUMNS, *_OF_PREFERENCES)
    chosen = _lowest(corpora, wanted, rows * _DOCUMENTS_A_ROW, storage)
    if not chosen:
        raise EmptyCorpusError(
            f"expected held-out rows in {', '.join(corpus.id for corpus in corpora)} to validate on, found none; raise "
            "ingest.holdout_share, or leave train.early_stopping and runtime.validate_every_steps out."
        )
    tokenizer = load_tokenizer(tokenizer_folder)
    columns = {name: pa.array([row[name] or "" for row in chosen], pa.string()) for name in wanted}
    encoder = open_encoder(tokenizer)
    if objective == LIKELIHOOD:
        documents = encode_documents(
            tokenizer,
            encoder,
            prompts=columns["prompt"],
            texts=columns["text"],
            messages=columns["messages"],
            fallback=chat_fallback,
        )
        packed = pack_documents(columns["id"], documents, row_len=row_len, pad_id=tokenizer.eos_id)
    else:
        preferences = encode_preferences(
            tokenizer, encoder, columns, objective=objective, row_len=row_len, fallback=chat_fallback
        )
        packed = pack_preferences(columns["id"], preferences, row_len=row_len, pad_id=tokenizer.eos_id)
    # Rows are filled longest document first, so the first ones would be the long documents: evenly spaced, they are not.
    count = len(packed.ids_NT)
    taken = [i * count // rows for i in range(rows)] if count > rows else list(range(count))
    some = PackedRows(ids_NT=packed.ids_NT[taken], documents=packed.documents.take(pa.array(taken)))
    storage.write_bytes(shard_bytes(some), *target, NAME)
    return NAME


def _lowest(corpora: Sequence[Corpus], columns: Sequence[str], number: int, storage: Storage) -> list[dict[str, Any]]:
    """The held-out rows with the lowest hashes, in their order."""
    chosen: list[tuple[float, str, dict[str, Any]]] = []  # a heap; the highest hash, negated, comes first
    for corpus in corpora:
        for _, table in read_corpus(storage, corpus, columns=[*columns, "side"], side="holdout"):
            held_out = table.filter(pc.equal(table["side"], "holdout"))
            for i, name in enumerate(held_out["id"].to_pylist()):
                key = -share_of(name, salt="validation")
                if len(chosen) == number and key <= chosen[0][0]:
                    continue
                row = held_out.slice(i, 1).to_pylist()[0]
                heapq.heappush(chosen, (key, name, {column: row.get(column) for column in columns}))
                if len(chosen) > number:
                    heapq.heappop(chosen)
    return [row for _, _, row in sorted(chosen, key=lambda entry: (-entry[0], entry[1]))]
