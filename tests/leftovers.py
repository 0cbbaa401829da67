"""What is left of what somebody said, anywhere below a folder: in files, in tables, in tokens, in the database."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aifactory import Factory
from aifactory.text.shards import TokenRows
from aifactory.text.tokenizer import load_tokenizer


def texts_of(factory: Factory, user: str) -> list[str]:
    """What a user said to the factory, and was asked about."""
    said = factory.books.feedback.corrections()
    return [text for c in said if c.user == user for text in (c.correction, c.prompt)]


def needles(factory: Factory, user: str) -> list[str]:
    """Pieces of what a user said that nobody else did: whoever holds one holds a row."""
    said = factory.books.feedback.corrections()
    others = " | ".join(text for c in said if c.user != user for text in (c.correction, c.prompt))
    pieces = [text[at : at + 90] for text in texts_of(factory, user) for at in range(0, len(text) - 90, 15)]
    found = [piece for piece in pieces if piece not in others]
    assert len(found) > len(texts_of(factory, user))
    return found


def decoded(root: Path) -> Iterable[tuple[str, str]]:
    """Everything below a folder as text: files as they are, tables and tokens as what they say."""
    for path in sorted(root.rglob("*")):
        if not path.is_file():
            continue
        data = path.read_bytes()
        yield str(path), data.decode("utf-8", "replace")
        if path.suffix == ".parquet":
            yield (
                f"{path} (rows)",
                json.dumps(pq.read_table(io.BytesIO(data)).to_pylist(), default=str, ensure_ascii=False),
            )
        elif path.suffix == ".arrow":
            table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
            if "documents" in table.column_names:
                yield f"{path} (tokens)", "\n".join(spoken(root, path))
            else:
                yield (
                    f"{path} (rows)",
                    "\n".join(str(value) for column in table.columns for value in column.to_pylist()),
                )


def spoken(root: Path, shard: Path) -> Iterable[str]:
    """The documents of a shard in words, by every tokenizer that there is."""
    for folder in sorted({file.parent for file in root.rglob("tokenizer.json")}):
        tokenizer = load_tokenizer(folder)
        for _, ids in TokenRows(shard.parent, [shard.name]).whole_documents():
            if int(np.max(ids)) < tokenizer.vocab_size:
                yield tokenizer.decode([int(each) for each in ids])


def left_of(root: Path, wanted: Iterable[str]) -> list[tuple[str, str]]:
    return [
        (where, text)
        for where, said in decoded(root)
        for text in wanted
        if text in said or json.dumps(text)[1:-1] in said
    ]
