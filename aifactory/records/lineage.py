"""Lineage: what was made from what, across artifacts, releases and answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aifactory.records.artifacts import Artifact
from aifactory.records.journal import Journal
from aifactory.records.tables import artifacts, lineage


@dataclass(frozen=True, slots=True, kw_only=True)
class LineageNode:
    """One thing and what it was made from."""

    id: str
    kind: str
    digest: str | None
    uri: str | None
    parents: tuple[LineageNode, ...]
    is_erased: bool = False
    """Somebody asked to forget what it held."""

    def to_json(self, shown: set[str] | None = None) -> Mapping[str, Any]:
        """The tree as plain JSON. What is met again has `parents: null`: a tree of n cycles would have 2^n branches."""
        shown = set() if shown is None else shown
        met = self.id in shown
        shown.add(self.id)
        return {
            "id": self.id,
            "kind": self.kind,
            "digest": self.digest,
            "uri": self.uri,
            **({"is_erased": True} if self.is_erased else {}),
            "parents": None if met else [parent.to_json(shown) for parent in self.parents],
        }

    def lines(self, depth: int = 0) -> list[str]:
        """The tree as indented text; what is met again says so and is not unfolded again."""
        lines: list[str] = []
        shown: set[str] = set()
        waiting = [(self, depth)]
        while waiting:
            node, depth = waiting.pop()
            digest = f"  sha256 {node.digest[:12]}" if node.digest else ""
            digest += "  (erased)" if node.is_erased else ""
            met = node.id in shown and bool(node.parents)
            lines.append("  " * depth + node.id + digest + ("  (above)" if met else ""))
            if not met:
                waiting.extend((parent, depth + 1) for parent in reversed(node.parents))
            shown.add(node.id)
        return lines


class Lineage:
    """The index of one factory's artifacts. The records in the storage root are the truth; this makes them findable."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.database = journal.database
        self.factory = journal.factory

    def add(self, artifact: Artifact) -> bool:
        """Index an artifact; False if it was there already."""
        with self.database.write(serialize=True) as connection:
            known = connection.scalar(
                sa.select(artifacts.c.id).where(artifacts.c.factory == self.factory, artifacts.c.id == artifact.id)
            )
            if known is not None:
                return False
            connection.execute(
                artifacts.insert().values(
                    factory=self.factory,
                    id=artifact.id,
                    kind=artifact.kind,
                    fingerprint=artifact.fingerprint,
                    digest=artifact.digest,
                    uri=artifact.uri,
                    created_at=artifact.record.created_at,
                )
            )
            for parent in dict.fromkeys(artifact.record.inputs):
                connection.execute(lineage.insert().values(factory=self.factory, child=artifact.id, parent=parent))
            return True

    def children(self, *ids: str, kind: str) -> list[str]:
        """What of a kind was made from these artifacts."""
        with self.database.read() as connection:
            query = sa.select(lineage.c.child).where(lineage.c.factory == self.factory, lineage.c.parent.in_(ids))
            return sorted(each for each in connection.scalars(query) if each.startswith(f"{kind}/"))

    def tree(self, artifact_id: str) -> LineageNode | None:
        """The artifact and, through its inputs, all that it was made from; None if it is not known.

        An input that is not indexed is shown too, without digest.
        """
        erased = frozenset(self.journal.erased())
        with self.database.read() as connection:
            node = self._node(connection, artifact_id, {}, erased)
        return None if node.digest is None else node

    def _node(
        self, connection: Connection, artifact_id: str, built: dict[str, LineageNode], erased: frozenset[str]
    ) -> LineageNode:
        if artifact_id not in built:
            row = (
                connection.execute(
                    sa.select(artifacts).where(artifacts.c.factory == self.factory, artifacts.c.id == artifact_id)
                )
                .mappings()
                .one_or_none()
            )
            parents = list(
                connection.scalars(
                    sa.select(lineage.c.parent)
                    .where(lineage.c.factory == self.factory, lineage.c.child == artifact_id)
                    .order_by(lineage.c.parent)
                )
            )
            built[artifact_id] = LineageNode(
                id=artifact_id,
                kind=artifact_id.partition("/")[0] if row is None else row["kind"],
                digest=None if row is None else row["digest"],
                uri=None if row is None else row["uri"],
                parents=tuple(self._node(connection, parent, built, erased) for parent in parents),
                is_erased=artifact_id in erased,
            )
        return built[artifact_id]
