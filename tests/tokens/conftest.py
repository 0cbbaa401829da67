"""Corpora of random documents, and token sets of them made in this process."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aifactory.cluster.tasks import run_here
from aifactory.config import Tokenize
from aifactory.records.artifacts import ArtifactStore, Corpus, Record, digest_of
from aifactory.records.rows import CORPUS_SCHEMA, Row, make_row
from aifactory.records.storage import Storage
from aifactory.text.shards import TokenRows
from aifactory.text.tokenizer import load_tokenizer
from aifactory.tokens.pipeline import shard_names, tokenize_corpus

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "日本語",
    "größe",
    "naïve",
    "😀👩‍👩‍👧",
    "\n",
    "\t",
    "def f(x):",
    "<|endoftext|>",
    "\r\n",
    "0x1F",
]


def random_document(rng: random.Random, longest: int) -> str:
    return "".join(rng.choice(WORDS) + rng.choice([" ", "", "  "]) for _ in range(rng.randrange(1, longest)))


class Tokens:
    """A token set: what the stage returned, and its rows."""

    def __init__(self, tokenized: Any, storage: Storage, target: tuple[str, ...]) -> None:
        self.figures = tokenized.figures
        self.bytes = {file.name: storage.read_bytes(*target, *file.name.split("/")) for file in tokenized.files}
        self.folder = Path(storage.path(*target))
        self.tokenizer = load_tokenizer(self.folder / "tokenizer")
        self.rows = TokenRows(self.folder, shard_names(tokenized.files))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@pytest.fixture
def make_corpus(storage: Storage) -> Callable[..., tuple[Corpus, list[Row]]]:
    """A corpus of random documents, or of given (prompt, text) pairs, in three parts."""

    def make(seed: int = 0, number: int = 60, longest: int = 60, pairs: Sequence[tuple[str, str]] | None = None) -> Any:
        rng = random.Random(seed)
        if pairs is None:
            pairs = [
                ("" if i % 3 else f"question {i} {rng.choice(WORDS)}", f"{i}:" + random_document(rng, longest))
                for i in range(number)
            ]
        rows = [
            make_row(
                source="docs", origin=f"{i}", position=i, prompt=p, text=t, keyed_by_file=False, holdout_share=0.25
            )
            for i, (p, t) in enumerate(pairs)
        ]
        fingerprint = f"{seed:016x}" + "0" * 48
        files = []
        for part in range(3):
            sink = io.BytesIO()
            pq.write_table(pa.Table.from_pylist([asdict(r) for r in rows[part::3]], schema=CORPUS_SCHEMA), sink)
            files.append(storage.write_bytes(sink.getvalue(), "corpus", fingerprint[:16], f"part-{part:05d}.parquet"))
        record = Record(
            kind="corpus",
            fingerprint=fingerprint,
            digest=digest_of(files),
            code_version=1,
            recipe={},
            inputs=[],
            files=files,
            figures={},
        )
        return ArtifactStore(storage).publish(Corpus, record), rows

    return make


@pytest.fixture
def tokenize(storage: Storage) -> Callable[..., Tokens]:
    def run_stage(
        corpus: Corpus, *, name: str = "a", row_len: int = 64, folder: Path | None = None, run: Any = run_here
    ) -> Tokens:
        target = ("tokens", name)
        recipe = Tokenize(vocab_size=300, row_len=row_len)
        tokenized = tokenize_corpus(
            corpus, recipe=recipe, tokenizer_folder=folder, storage=storage, target=target, run=run
        )
        return Tokens(tokenized, storage, target)

    return run_stage
