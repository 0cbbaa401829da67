"""`aifactory forget --check`: is a proof as it was written, and is what it says still true?

It needs the storage root and the state database of the factory, with the secret of the keyed hashes in it. The proof says which
one. Whoever trusts neither compares the head of the audit with one that was kept elsewhere (`aifactory audit --expect HEAD`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aifactory.errors import ConfigError
from aifactory.proof.erasing import Eraser, go_through
from aifactory.proof.forget import PROOFS, VERSION
from aifactory.proof.where import Where
from aifactory.records.artifacts import ERASED_NAME, Artifact, Corpus, FeedbackBatch, Model, Scorecard, digest_of
from aifactory.records.books import Books
from aifactory.records.identity import canonical_json, hash_text
from aifactory.records.lineage import LineageNode

_ID = re.compile(r"forget-[0-9a-f]{16}")
_NOBODY = Where({"id": "-"})
"""No row has this id: what is looked for lies under tombstones."""
_NOUNS: Mapping[str, type[Artifact]] = {noun.kind: noun for noun in (FeedbackBatch, Corpus, Scorecard)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofCheck:
    """What came of it."""

    proof: str
    checked: Sequence[str]
    """What was looked at and found as the proof says."""
    faults: Sequence[str]
    """What is not as the proof says."""

    @property
    def holds(self) -> bool:
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"holds": self.holds}

    def lines(self) -> list[str]:
        """The report as text."""
        verdict = "holds" if self.holds else "does not hold"
        return [
            f"{self.proof} {verdict}.",
            *(f"  as it says  {each}" for each in self.checked),
            *(f"  NOT so      {each}" for each in self.faults),
        ]


def check_proof(books: Books, name: str) -> ProofCheck:
    """A proof by its file or its id, compared with the books, the storage and itself.

    Raises   ConfigError if there is no such proof, or it is none.
    """
    told = _read(books, name)
    check = _Check(books, told)
    for passed, text in check.all():
        (check.passed if passed else check.faults).append(text)
    return ProofCheck(proof=str(told["id"]), checked=check.passed, faults=check.faults)


def _read(books: Books, name: str) -> dict[str, Any]:
    data = books.storage.read_bytes(PROOFS, f"{name}.json") if _ID.fullmatch(name) else None
    path = Path(name).expanduser()
    if data is None and path.is_file():
        data = path.read_bytes()
    if data is None:
        raise ConfigError(f"expected the file or the id of a proof of aifactory forget, found none at {name!r}.")
    try:
        told = json.loads(data)
    except ValueError as error:
        raise ConfigError(f"expected a proof of aifactory forget at {name!r}, found no JSON: {error}.") from error
    if not isinstance(told, dict) or told.get("proof") != "aifactory forget" or told.get("version") != VERSION:
        raise ConfigError(
            f"expected a proof of aifactory forget, version {VERSION}, at {name!r}, found something else."
        )
    return told


class _Check:
    def __init__(self, books: Books, told: Mapping[str, Any]) -> None:
        self.books = books
        self.told = told
        self.id = str(told.get("id"))
        self.passed: list[str] = []
        self.faults: list[str] = []

    def all(self) -> Iterator[tuple[bool, str]]:
        """Whether each thing is as the proof says, and what that is."""
        document = {name: value for name, value in self.told.items() if name != "digest"}
        digest = hash_text(canonical_json(document))
        yield (
            digest == self.told.get("digest"),
            f"its digest is {digest[:16]}, it says {str(self.told.get('digest'))[:16]}",
        )
        yield from self._audited(digest)
        if self.faults:
            return  # what a changed proof says of the rest proves nothing
        yield from self._tombstones()
        yield from self._artifacts()
        yield from self._releases()
        yield from self._nothing_left()

    def _audited(self, digest: str) -> Iterator[tuple[bool, str]]:
        chain = self.books.journal.audited()
        yield not chain.faults, f"the chain of the audit stands, {len(chain.lines):,} lines, head {chain.head[:16]}"
        lines = [line for line in chain.lines if line.action == "forgotten" and line.subject == self.id]
        is_there = any(line.detail.get("digest") == digest for line in lines)
        yield is_there, f"a line of the audit holds this digest of {self.id}"

    def _tombstones(self) -> Iterator[tuple[bool, str]]:
        keyed = self.books.erasures.keyed()
        same = keyed is not None and keyed.id == self.told["key"]["id"]
        yield same, f"the database holds the secret {self.told['key']['id']} of its hashes"
        kinds = (("row", "rows"), ("key", "keys"), ("completion", "completions"))
        for kind, name in kinds:
            missing = set(self.told[name]) - self.books.erasures.buried(kind)  # type: ignore[arg-type]
            yield (
                not missing,
                f"tombstones of {len(self.told[name]):,} {name} keep them from coming back; {len(missing):,} are missing",
            )

    def _artifacts(self) -> Iterator[tuple[bool, str]]:
        gone = 0
        for name, said in self.told["artifacts"].items():
            kind, _, prefix = name.partition("/")
            erased = self.books.artifacts.erased(name)
            there = self.books.storage.names(kind, prefix, hidden=True)
            if erased is None or erased.digest != said["digest"] or there != [ERASED_NAME]:
                yield False, f"{name} is gone but for its note; found {', '.join(there) or 'no note'}"
                continue
            gone += 1
            if said["successor"] is not None and self.books.artifacts.erased(said["successor"]) is None:
                yield self._stands(said["successor"], said["successor_digest"])
        yield True, f"{gone:,} artifacts are gone"

    def _stands(self, name: str, digest: str) -> tuple[bool, str]:
        kind, _, prefix = name.partition("/")
        artifact = self.books.artifacts.find(_NOUNS[kind], prefix)
        if artifact is None:
            return False, f"{name}, what is left, is there"
        for file in artifact.record.files:
            data = self.books.storage.read_bytes(kind, prefix, *file.name.split("/"))
            if data is None or hashlib.sha256(data).hexdigest() != file.sha256:
                return False, f"{name}, what is left, has the file {file.name} that its record names"
        stands = artifact.digest == digest == digest_of(artifact.record.files)
        return stands, f"{name}, what is left, has the digest {digest[:16]}"

    def _releases(self) -> Iterator[tuple[bool, str]]:
        known = {release.name: release for release in self.books.registry.releases()}
        for name in self.told["releases"]:
            withdrawn = known[name].withdrawn if name in known else None
            yield withdrawn is not None, f"{name} is withdrawn"
        for model in self.told["models"]:
            weights = self.books.artifacts.find(Model, model.partition("/")[2])
            yield weights is None, f"the weights of {model} are deleted"
        production = self.books.registry.production()
        if production is None:
            return
        is_other = production.name not in self.told["releases"]
        yield is_other, f"{production.name} is in production, which is none of those that saw the rows"
        tree = self.books.lineage.tree(production.model)
        learnt = [] if tree is None else [node.id for node in _line(tree) if node.is_erased]
        yield (
            not learnt,
            f"{production.name} comes from no model and no tokens that were erased"
            + "".join(f"; found {each}" for each in learnt),
        )

    def _nothing_left(self) -> Iterator[tuple[bool, str]]:
        eraser = Eraser(self.books, _NOBODY, None)
        eraser.search_for(self.id)
        found = go_through(eraser)
        again = eraser.said_again()
        rows = {place: sum(things.values()) for place, things in found.places.items()}
        left = [f"{count:,} in {place}" for place, count in rows.items() if count]
        left += [f"{len(again):,} completions"] if again else []
        yield not left, "none of the rows is in any place" + (f"; found {', '.join(left)}" if left else "")


def _line(model: LineageNode) -> Iterator[LineageNode]:
    """A model and the models and tokens that it comes from."""
    yield model
    for parent in model.parents:
        if parent.kind == Model.kind:
            yield from _line(parent)
        elif parent.kind == "tokens":
            yield parent
