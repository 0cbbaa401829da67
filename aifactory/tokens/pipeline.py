"""Tokenize: Corpus -> TokenSet.

Reads    the parts of a corpus; rows on the side `train` alone
Writes   tokens/<fp>/tokenizer/*          the tokenizer, trained here or taken over
         tokens/<fp>/shard-*.arrow        packed rows, one shard for each part of the corpus
         tokens/<fp>/trace-*.arrow        beside each shard its index from text back to rows (see `spans`)
Depends  on the recipe and the corpus; never on the number of workers, nor on which library finds the tokens.
Raises   EmptyCorpusError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aifactory.cluster.tasks import RunTasks
from aifactory.config import Tokenize
from aifactory.errors import EmptyCorpusError, StorageError
from aifactory.observe.events import log_event
from aifactory.records.artifacts import Corpus, TokenSet, digest_of
from aifactory.records.identity import fingerprint
from aifactory.records.parts import PartStore, made
from aifactory.records.rows import part_names
from aifactory.records.storage import Storage, StoredFile
from aifactory.text.documents import encode_documents
from aifactory.text.encoder import Encoder, open_encoder
from aifactory.text.shards import shard_bytes
from aifactory.text.tokenizer import TextTokenizer, load_tokenizer
from aifactory.tokens.preferences import LIKELIHOOD

CODE_VERSION = 3
TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
_GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it are spread evenly over [0, 1): short parts, too, then give their share of the rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenized:
    """What was written and counted."""

    files: list[StoredFile]
    figures: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What every part needs beside its name; pickled into every task."""

    corpus: Corpus
    storage: Storage
    target: tuple[str, ...]
    row_len: int
    chat_fallback: str
    objective: str
    tokenizer: tuple[StoredFile, ...]

    def recipe(self) -> dict[str, Any]:
        """What a shard depends on beside its rows and the tokenizer."""
        told = {"row_len": self.row_len, "chat_fallback": self.chat_fallback}
        return told if self.objective == LIKELIHOOD else told | {"objective": self.objective}


def tokenize_corpus(
    corpus: Corpus,
    *,
    recipe: Tokenize,
    tokenizer_folder: Path | None,
    storage: Storage,
    target: tuple[str, ...],
    run: RunTasks,
    chat_fallback: str,
    objective: str = LIKELIHOOD,
) -> Tokenized:
    """Write the token set of `corpus` to the directory `target`.

    With a `tokenizer_folder` its tokenizer is taken over, else one is trained on rows that train, about as many
    bytes of text as the recipe says. `chat_fallback` names the template of chats for a tokenizer that has none (`aifactory.text.chat`); the server
    must use the same. `objective` is what is learnt from the rows (`train.objective`): it says what a document is. Both count
    in the identity of the token set, as the recipe does.
    """
    parts = part_names(corpus, side="train")
    if tokenizer_folder is None:
        contents = _train(corpus, parts, recipe.vocab_size, recipe.sample_bytes, storage, run)
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
    work = _Work(
        corpus=corpus,
        storage=storage,
        target=target,
        row_len=recipe.row_len,
        chat_fallback=chat_fallback,
        objective=objective,
        tokenizer=tuple(files),
    )
    sha256 = {file.name: file.sha256 for file in corpus.record.files}
    tokenizer_digest = digest_of(files)
    store = PartStore(storage)
    made_parts = made(
        store,
        run,
        _write_shard,
        [
            (
                fingerprint(
                    stage="shard",
                    code_version=CODE_VERSION,
                    recipe=work.recipe(),
                    inputs=[sha256[part], tokenizer_digest],
                ),
                (work, part),
            )
            for part in parts
        ],
    )
    shards = [part.figures for part in made_parts]
    figures: dict[str, Any] = {
        key: sum(shard[key] for shard in shards)
        for key in ("documents", "rows_refused", "packed_rows", "tokens", "loss_tokens", "text_bytes")
    }
    if slow := next((shard["slow_because"] for shard in shards if shard["slow_because"]), ""):
        log_event("encoded_slowly", library="tokenizers", reason=slow)
    if refused := next((shard["refused_because"] for shard in shards if shard["refused_because"]), ""):
        log_event("refused", rows=figures["rows_refused"], reason=refused)
    if not figures["packed_rows"]:
        why = f" {refused}" if refused else ""
        raise EmptyCorpusError(
            f"expected rows to train on in {corpus.id}, found none; add data or lower holdout_share.{why}"
        )
    figures |= {
        "row_len": recipe.row_len,
        "padding_share": 1 - figures["tokens"] / (figures["packed_rows"] * recipe.row_len),
        "tokenizer_digest": shards[0]["tokenizer_digest"],
        "vocab_size": shards[0]["vocab_size"],
    }
    by_source: dict[str, list[str]] = {}
    for number, shard in enumerate(shards):
        if shard["packed_rows"]:
            by_source.setdefault(shard["source"], []).append(f"shard-{number:05d}.arrow")
    figures["shards_of"] = by_source
    figures["packed_rows_of"] = {
        source: sum(shard["packed_rows"] for shard in shards if shard["source"] == source) for source in by_source
    }
    files += store.take(
        [
            (part, name, (*target, f"{name.partition('.')[0]}-{number:05d}.arrow"))
            for number, part in enumerate(made_parts)
            for name in sorted(part.files)
        ]
    )
    return Tokenized(files=files, figures=figures)


def shard_names(files: Sequence[StoredFile]) -> list[str]:
    """The shards among the files of a token set, in order."""
    return sorted(file.name for file in files if file.name.startswith("shard-"))


def sources_of(tokens: TokenSet, shards: Sequence[str]) -> list[str]:
    """The sources whose rows lie in these shards."""
    return sorted(source for source, names in tokens.figures["shards_of"].items() if set(names) & set(shards))


def part_of(shard: str, corpus: Corpus) -> str:
    """The part of the corpus whose rows are in a shard: the number of a shard is that of its part among those that train."""
    return part_names(corpus, side="train")[int(shard.removeprefix("shard-").removesuffix(".arrow"))]


def read_tokenizer(folder: Path) -> dict[str, bytes]:
    """The files of a tokenizer folder by name."""
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()}


# ── the vocabulary ────────────────────────────────────────────────────────────────────────────────────────────────────


def _train(
    corpus: Corpus, parts: Sequence[str], vocab_size: int, sample_bytes: int, storage: Storage, run: RunTasks
) -> dict[str, bytes]:
    """The files of a tokenizer that is trained on the rows that train."""
    from aifactory.tokens.vocabulary import add_counts, learn_vocabulary

    share = min(1.0, sample_bytes / max(1, corpus.record.figures["bytes_kept"]))
    # Where few rows of each part would do, more rows of fewer parts are taken, so that fewer are read.
    stride = max(1, min(int(1 / share) // 16, len(parts) // 64))
    sampled = parts[::stride]
    items = [(corpus, part, min(1.0, share * stride), i * _GOLDEN % 1, storage) for i, part in enumerate(sampled)]
    counts = run(_count_sample, items)
    if not counts:
        raise EmptyCorpusError(
            f"expected rows to train on in {corpus.id}, found none; add data or lower holdout_share."
        )
    return learn_vocabulary(add_counts(counts), vocab_size=vocab_size)


def _count_sample(corpus: Corpus, part: str, share: float, phase: float, storage: Storage) -> pa.Table:
    """The words of a share of the rows of one part, evenly spaced; `phase` in [0, 1) moves them on."""
    from aifactory.tokens.vocabulary import count_words

    texts = _column(_read_part(corpus, part, storage, ("text",)), "text")
    marks = np.floor(np.arange(len(texts) + 1) * share + phase)
    return count_words(texts.filter(pa.array(marks[1:] > marks[:-1])) if share < 1 else texts)


# ── the shards ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _write_shard(identity: str, work: _Work, part: str) -> None:
    """Publish the packed rows of one part of the corpus."""
    from aifactory.tokens.packing import pack_documents, pack_preferences
    from aifactory.tokens.preferences import encode_preferences
    from aifactory.tokens.runs import index_bytes

    folder = work.storage.fetch([file.name for file in work.tokenizer], *work.target) / TOKENIZER_FOLDER
    tokenizer, encoder = _open(folder, tuple(file.sha256 for file in work.tokenizer))
    wanted = ["id", "source", "prompt", "text", "messages"]
    if work.objective != LIKELIHOOD:
        wanted += ["rejected", "label"]
    table = _read_part(work.corpus, part, work.storage, wanted)
    columns = {name: _column(table, name) for name in wanted if name in table.column_names}
    if work.objective == LIKELIHOOD:
        documents = encode_documents(
            tokenizer,
            encoder,
            prompts=columns["prompt"],
            texts=columns["text"],
            messages=columns.get("messages"),
            fallback=work.chat_fallback,
        )
        refused = documents.refused
        packed = pack_documents(columns["id"], documents, row_len=work.row_len, pad_id=tokenizer.eos_id)
    else:
        preferences = encode_preferences(
            tokenizer,
            encoder,
            columns,
            objective=work.objective,
            row_len=work.row_len,
            fallback=work.chat_fallback,
        )
        refused = preferences.refused
        packed = pack_preferences(columns["id"], preferences, row_len=work.row_len, pad_id=tokenizer.eos_id)
    counted: dict[str, Any] = {
        "source": table["source"][0].as_py() if table.num_rows else "",  # a part holds rows of one alone
        "documents": table.num_rows - len(refused),
        "rows_refused": len(refused),
        "refused_because": next(iter(refused.values()), ""),
        "slow_because": encoder.reason,
        "packed_rows": len(packed.ids_NT),
        "tokens": pc.sum(packed.documents.values.field("length")).as_py() or 0,
        "loss_tokens": packed.count_loss_tokens(),
        "text_bytes": pc.sum(pc.binary_length(columns["text"])).as_py() or 0,
        "tokenizer_digest": tokenizer.digest(),
        "vocab_size": tokenizer.vocab_size,
    }
    files = {}
    if counted["documents"]:
        files["shard.arrow"] = shard_bytes(packed)
        files["trace.arrow"] = index_bytes(packed)
    PartStore(work.storage).publish(identity, files, counted, to_be_taken=True)


@lru_cache(maxsize=2)
def _open(folder: Path, digests: tuple[str, ...]) -> tuple[TextTokenizer, Encoder]:
    """The tokenizer in a folder, once in a process; `digests` tell what lies in it."""
    tokenizer = load_tokenizer(folder)
    return tokenizer, open_encoder(tokenizer)


def _read_part(corpus: Corpus, part: str, storage: Storage, columns: Sequence[str]) -> pa.Table:
    """The rows that train of one part; a column that it doesn't have is left out."""
    data = storage.read_bytes(corpus.kind, corpus.fingerprint[:16], part)
    if data is None:
        raise StorageError(f"expected {corpus.uri}/{part}, found no such file; move the corpus away and ingest again.")
    file = pq.ParquetFile(pa.BufferReader(data))
    table = file.read(columns=[name for name in (*columns, "side") if name in file.schema_arrow.names])
    trains = pc.equal(table["side"], "train")
    return table if pc.all(trains).as_py() else table.filter(trains)


def _column(table: pa.Table, name: str) -> pa.Array:
    chunks = table[name].chunks
    return chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks or [pa.array([], table[name].type)])
