"""Folders of source files, and corpora of them made in this process."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from aifactory.cluster.tasks import run_here
from aifactory.config import Columns, Ingest, Source
from aifactory.ingest.pipeline import Ingested, ingest_files
from aifactory.ingest.sources import list_files
from aifactory.records.storage import Storage


class Made:
    """A corpus: what the stage returned, and the rows that it wrote."""

    def __init__(self, ingested: Ingested, storage: Storage, target: tuple[str, ...]) -> None:
        self.figures = ingested.figures
        self.bytes = {file.name: storage.read_bytes(*target, file.name) for file in ingested.files}
        self.kept = self._rows("part-")
        self.ledger = self._rows("rejected-")
        self.left_over = [*storage.names("runs"), *storage.names(*target)]

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
        columns: Columns | None = None,
        recipe: Mapping[str, Any] | None = None,
        is_feedback: bool = False,
        seen: Mapping[str, str] | None = None,
        run: Any = run_here,
        fingerprint: str = "0123456789abcdef",
    ) -> Made:
        source = Source(name="docs", kind=kind, path=str(root), columns=columns or Columns())
        storage = Storage(str(tmp_path / "storage"))
        target = ("corpus", fingerprint)
        ingested = ingest_files(
            list_files([source]),
            recipe=Ingest(sources=(source,), **{"holdout_share": 0.25, **(recipe or {})}),
            storage=storage,
            target=target,
            is_feedback=is_feedback,
            seen=seen or {},
            run=run,
        )
        return Made(ingested, storage, target)

    return run_stage
