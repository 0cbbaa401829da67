"""Only what is new is read and made: a corpus of which one part in a hundred has changed costs that part."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from aifactory import Config, Factory
from aifactory.tokens.vocabulary import train_vocabulary

SOURCES = 100


def written(folder: Path, number: int, *, edition: int = 0) -> None:
    """One source of a few rows; another edition has one row more."""
    rng = random.Random(number)
    rows = [{"text": " ".join(f"word{rng.randrange(3000)}" for _ in range(40))} for _ in range(8)]
    rows += [{"text": f"row {i} of edition {i} of source {number}"} for i in range(1, edition + 1)]
    file = folder / f"{number:03d}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A hundred sources, and a tokenizer that does not depend on them."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name, data in train_vocabulary(["row of edition source word"], vocab_size=270).items():
        (tokenizer / name).write_bytes(data)
    for number in range(SOURCES):
        written(tmp_path, number)
    sources = [
        {"name": f"s{number:03d}", "kind": "jsonl", "path": str(tmp_path / f"{number:03d}.jsonl")}
        for number in range(SOURCES)
    ]
    values: dict[str, Any] = {
        "name": "grows",
        "ingest": {"sources": sources, "steps": [{"step": "unicode"}, {"step": "near_duplicates", "threshold": 0.8}]},
        "tokenize": {"tokenizer": str(tokenizer), "row_len": 64},
        "runtime": {"storage": str(tmp_path / "storage")},
    }
    return Config.model_validate(values)


def parts(factory: Factory) -> set[str]:
    return {str(file) for file in Path(factory.books.storage.path("parts")).glob("*/*/part.json")}


def test_of_a_hundred_sources_the_one_that_changed_is_read_and_made_anew(config: Config, tmp_path: Path) -> None:
    with Factory(config) as factory:
        factory.tokenize()
        first, size = parts(factory), factory._listing.bytes_read
        rows = factory.ingest().figures["rows_in"]
    time.sleep(0.05)  # so that the time of the file tells

    written(tmp_path, 42, edition=1)
    with Factory(config) as factory:
        factory.tokenize()
        new = parts(factory) - first
        assert factory.ingest().figures["rows_in"] == rows + 1
        assert factory._listing.bytes_read == (tmp_path / "042.jsonl").stat().st_size

    assert size > 90 * (tmp_path / "042.jsonl").stat().st_size
    assert len(first) == 3 * SOURCES, "read, put together, packed"
    assert len(new) == 3


def test_what_has_not_changed_is_not_even_opened(config: Config) -> None:
    with Factory(config) as factory:
        made = factory.tokenize().id
    with Factory(config) as factory:
        before = parts(factory)
        assert factory.tokenize().id == made
        assert factory._listing.bytes_read == 0
        assert parts(factory) == before
