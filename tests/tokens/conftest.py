"""Corpora of random documents, and token sets of them made in this process."""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aifactory.cluster.tasks import run_here
from aifactory.config import Tokenize
from aifactory.records.artifacts import ArtifactStore, Corpus, Record, digest_of
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


@dataclass(frozen=True)
class Row:
    """What tokenize reads of a row of a corpus."""

    id: str
    side: str
    prompt: str
    text: str
    messages: str = ""
    source: str = "docs"


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
    """A corpus of random documents, or of given (prompt, text) or (messages, text) pairs, in three parts of each side.

    mixed   the parts of each side hold the rows of both.
    """

    def make(
        seed: int = 0,
        number: int = 60,
        longest: int = 60,
        pairs: Sequence[tuple[Any, str]] | None = None,
        columns: Sequence[str] = ("id", "side", "source", "prompt", "text", "messages"),
        mixed: bool = False,
    ) -> Any:
        rng = random.Random(seed)
        if pairs is None:
            pairs = [
                ("" if i % 3 else f"question {i} {rng.choice(WORDS)}", f"{i}:" + random_document(rng, longest))
                for i in range(number)
            ]
        rows = []
        for asked, text in pairs:
            messages = "" if isinstance(asked, str) else json.dumps(asked)
            prompt = asked if isinstance(asked, str) else ""
            name = hashlib.sha256(f"{prompt} {messages} {text}".encode()).hexdigest()[:32]
            side = "holdout" if int(name[:8], 16) < 2**30 else "train"
            rows.append(Row(id=name, side=side, prompt=prompt, text=text, messages=messages))
        fingerprint = f"{seed:016x}" + "0" * 48
        files = []
        for part in range(3):
            for side in ("train", "holdout"):
                some = [row for row in rows[part::3] if row.side == side or mixed]
                table = pa.table(
                    {name: pa.array([getattr(row, name) for row in some], pa.string()) for name in columns}
                )
                sink = io.BytesIO()
                pq.write_table(table, sink)
                name = f"{side}-{part:05d}.parquet"
                files.append(storage.write_bytes(sink.getvalue(), "corpus", fingerprint[:16], name))
        record = Record(
            kind="corpus",
            fingerprint=fingerprint,
            digest=digest_of(files),
            code_version=1,
            recipe={},
            inputs=[],
            files=files,
            figures={"bytes_kept": sum(len(row.text.encode()) for row in rows)},
        )
        return ArtifactStore(storage).publish(Corpus, record), rows

    return make


@pytest.fixture
def tokenize(storage: Storage) -> Callable[..., Tokens]:
    def run_stage(
        corpus: Corpus,
        *,
        name: str = "a",
        row_len: int = 64,
        folder: Path | None = None,
        run: Any = run_here,
        chat_fallback: str = "plain",
        sample_bytes: int = 1_000_000,
    ) -> Tokens:
        target = ("tokens", name)
        storage.delete("parts")  # made anew, not found again
        tokenized = tokenize_corpus(
            corpus,
            recipe=Tokenize(vocab_size=300, row_len=row_len, sample_bytes=sample_bytes),
            tokenizer_folder=folder,
            storage=storage,
            target=target,
            run=run,
            chat_fallback=chat_fallback,
        )
        return Tokens(tokenized, storage, target)

    return run_stage
