"""Folders of source files, and corpora of them made in this process."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from aifactory.cluster.tasks import run_here
from aifactory.config import Ingest
from aifactory.ingest.decisions import Earlier
from aifactory.ingest.index import joined, read_index
from aifactory.ingest.listing import list_pieces
from aifactory.ingest.model_scores import StepModel
from aifactory.ingest.pipeline import Ingested, Work, ingest_pieces
from aifactory.records.storage import Storage


class Made:
    """A corpus: what the stage returned, and the rows that it wrote."""

    def __init__(self, ingested: Ingested, storage: Storage, target: tuple[str, ...]) -> None:
        self.figures = ingested.figures
        self.storage = storage
        self.bytes = {file.name: storage.read_bytes(*target, file.name) for file in ingested.files}
        self.folder = Path(storage.path(*target))
        self.kept = self._rows("train-") + self._rows("holdout-")
        self.ledger = self._rows("rejected-")
        self.index = joined([read_index(data) for name, data in self.bytes.items() if name.startswith("index-")])
        self.names = storage.names(*target)

    def _rows(self, prefix: str) -> list[dict[str, Any]]:
        return [
            row
            for name, data in sorted(self.bytes.items())
            if name.startswith(prefix)
            for row in pq.read_table(io.BytesIO(data)).to_pylist()
        ]

    @property
    def rules(self) -> dict[str, str]:
        """The rule by origin."""
        return {line["origin"]: line["rule"] for line in self.ledger}

    def texts(self, side: str) -> set[str]:
        return {row["text"] for row in self.kept if row["side"] == side}


@pytest.fixture
def write_files(tmp_path: Path) -> Callable[[Mapping[str, bytes | str]], Path]:
    """Writes files below a folder and returns it."""

    def write(contents: Mapping[str, bytes | str], folder: str = "source") -> Path:
        root = tmp_path / folder
        for name, data in contents.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data.encode() if isinstance(data, str) else data)
        return root

    return write


@pytest.fixture
def ingest(tmp_path: Path) -> Callable[..., Made]:
    """Ingests one source, in this process."""

    def run_stage(
        root: Path,
        kind: str = "text",
        *,
        columns: dict[str, str] | None = None,
        recipe: Mapping[str, Any] | None = None,
        earlier: Earlier | None = None,
        restored: Mapping[str, frozenset[str]] | None = None,
        models: Mapping[str, StepModel] | None = None,
        run: Any = run_here,
        storage: str = "storage",
        name: str = "docs",
        target: tuple[str, ...] = ("corpus", "0123456789abcdef"),
    ) -> Made:
        section = {"name": name, "kind": kind, "path": str(root)} | ({"columns": columns} if columns else {})
        asked = Ingest.model_validate({"sources": [section], "holdout_share": 0.25, **(recipe or {})})
        place = Storage(str(tmp_path / storage))
        place.delete(*target)
        ingested = ingest_pieces(
            list_pieces(asked.sources).pieces,
            Work.of(asked, place, restored=restored, models=models),
            name="tests",
            earlier=earlier or Earlier(),
            target=target,
            run=run,
        )
        return Made(ingested, place, target)

    return run_stage
