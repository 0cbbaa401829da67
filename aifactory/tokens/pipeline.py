"""Tokenize: Corpus -> TokenSet.

Reads    the parts of a corpus; rows on the side `train` alone
Writes   tokens/<fp>/tokenizer/*          the tokenizer, trained here or taken over
         tokens/<fp>/shard-*.arrow        packed rows, one shard for each part of the corpus
Depends  on the recipe and the corpus; never on the number of workers.
Raises   EmptyCorpusError.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from aifactory.cluster.tasks import RunTasks
from aifactory.config import Tokenize
from aifactory.errors import EmptyCorpusError
from aifactory.records.artifacts import Corpus
from aifactory.records.rows import part_names, read_corpus
from aifactory.records.storage import Storage, StoredFile
from aifactory.text.documents import document_tokens_batch
from aifactory.text.shards import shard_bytes
from aifactory.text.tokenizer import load_tokenizer
from aifactory.tokens.packing import Document, pack
from aifactory.tokens.vocabulary import train_vocabulary

CODE_VERSION = 1
TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenized:
    """What was written and counted."""

    files: list[StoredFile]
    figures: dict[str, Any]


def tokenize_corpus(
    corpus: Corpus,
    *,
    recipe: Tokenize,
    tokenizer_folder: Path | None,
    storage: Storage,
    target: tuple[str, ...],
    run: RunTasks,
) -> Tokenized:
    """Write the token set of `corpus` to the directory `target`.

    With a `tokenizer_folder` its tokenizer is taken over, else one is trained on the rows that train.
    """
    if tokenizer_folder is None:
        (contents,) = run(_train, [(corpus, recipe.vocab_size, storage)])
    else:
        load_tokenizer(tokenizer_folder)  # refuses it here, where the error can name the folder
        contents = read_tokenizer(tokenizer_folder)
    files = [
        StoredFile(
            name=f"{TOKENIZER_FOLDER}/{name}",
            num_bytes=len(data),
            sha256=storage.write_bytes(data, *target, TOKENIZER_FOLDER, name).sha256,
        )
        for name, data in sorted(contents.items())
    ]
    names = [file.name for file in files]
    parts = part_names(corpus)
    shards = run(_write_shard, [(corpus, i, part, recipe, storage, target, names) for i, part in enumerate(parts)])
    figures: dict[str, Any] = {
        key: sum(shard[key] for shard in shards)
        for key in ("documents", "packed_rows", "tokens", "loss_tokens", "text_bytes")
    }
    if not figures["packed_rows"]:
        raise EmptyCorpusError(
            f"expected rows to train on in {corpus.id}, found none; add data or lower holdout_share."
        )
    figures |= {
        "row_len": recipe.row_len,
        "padding_share": 1 - figures["tokens"] / (figures["packed_rows"] * recipe.row_len),
        "tokenizer_digest": shards[0]["tokenizer_digest"],
        "vocab_size": shards[0]["vocab_size"],
    }
    files += [StoredFile(**shard["file"]) for shard in shards if shard["file"]]
    return Tokenized(files=files, figures=figures)


def shard_names(files: Sequence[StoredFile]) -> list[str]:
    """The shards among the files of a token set, in order."""
    return sorted(file.name for file in files if file.name.startswith("shard-"))


def read_tokenizer(folder: Path) -> dict[str, bytes]:
    """The files of a tokenizer folder by name."""
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()}


def _train(corpus: Corpus, vocab_size: int, storage: Storage) -> dict[str, bytes]:
    texts = (
        text
        for _, table in read_corpus(storage, corpus, columns=["side", "text"])
        for side, text in zip(table["side"].to_pylist(), table["text"].to_pylist(), strict=True)
        if side == "train"
    )
    return train_vocabulary(texts, vocab_size=vocab_size)


def _write_shard(
    corpus: Corpus,
    index: int,
    part: str,
    recipe: Tokenize,
    storage: Storage,
    target: tuple[str, ...],
    tokenizer_files: Sequence[str],
) -> dict[str, Any]:
    tokenizer = load_tokenizer(storage.fetch(list(tokenizer_files), *target) / TOKENIZER_FOLDER)
    data = storage.read_bytes(corpus.kind, corpus.fingerprint[:16], part)
    assert data is not None, part
    table = pq.read_table(io.BytesIO(data), columns=["id", "side", "prompt", "text"])
    rows = [row for row in table.to_pylist() if row["side"] == "train"]
    encoded = document_tokens_batch(
        tokenizer, prompts=[row["prompt"] for row in rows], texts=[row["text"] for row in rows]
    )
    documents = [
        Document(row=row["id"], ids=ids, loss_mask=mask) for row, (ids, mask) in zip(rows, encoded, strict=True)
    ]
    counted: dict[str, Any] = {
        "documents": len(documents),
        "packed_rows": 0,
        "tokens": sum(len(document.ids) for document in documents),
        "loss_tokens": 0,
        "text_bytes": sum(len(row["text"].encode()) for row in rows),
        "tokenizer_digest": tokenizer.digest(),
        "vocab_size": tokenizer.vocab_size,
        "file": None,
    }
    if documents:
        packed = pack(documents, row_len=recipe.row_len, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.eos_id)
        counted["packed_rows"] = len(packed.ids_NT)
        counted["loss_tokens"] = int(packed.loss_mask_NT.sum())
        counted["file"] = asdict(storage.write_bytes(shard_bytes(packed), *target, f"shard-{index:05d}.arrow"))
    return counted
