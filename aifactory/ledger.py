"""The ledger of the rejected, as a person reads it: how many rows each rule took, and which."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from aifactory.errors import ConfigError, StateError
from aifactory.ingest.decisions import NEAR, NEAR_LEAK, NEAR_SEEN
from aifactory.ingest.duplicates import LEAK as COPY_OF_HOLDOUT
from aifactory.ingest.duplicates import SAME, SEEN
from aifactory.ingest.leaks import LEAK as PASSAGE_OF_HOLDOUT
from aifactory.records.artifacts import Corpus
from aifactory.records.books import Books
from aifactory.records.rows import read_ledger

_SHOWN_CHARS = 160
_KEPT_ELSEWHERE = "the row that each of them is like, which the ledger names, was kept"
_QUARANTINED = "nothing that an earlier model was judged on, or this one will be, comes back to train one"
FOR_GOOD = {
    "empty": "they have no text",
    SAME: _KEPT_ELSEWHERE,
    NEAR: f"{_KEPT_ELSEWHERE}; raise the threshold of the step near_duplicates, or leave it out",
    SEEN: "an ancestor has trained on them, or was judged on them",
    NEAR_SEEN: "an ancestor has trained on rows like them, or was judged on such",
    COPY_OF_HOLDOUT: _QUARANTINED,
    NEAR_LEAK: _QUARANTINED,
    PASSAGE_OF_HOLDOUT: _QUARANTINED,
}
"""Rules that reject whatever a person asks for, and why: rows are brought back by a step that looks at one row alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerReport:
    """What a corpus' ledger holds, and some of its rows."""

    corpus: str
    by_rule: Mapping[str, int]
    rows: Sequence[Mapping[str, Any]]
    """As LEDGER_SCHEMA has them: evenly spaced among those asked for, in their order."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as text."""
        lines = [f"Ledger of {self.corpus}: {sum(self.by_rule.values()):,} rows rejected."]
        lines += [
            f"  {count:>9,}  {rule}"
            for rule, count in sorted(self.by_rule.items(), key=lambda item: (-item[1], item[0]))
        ]
        for row in self.rows:
            text = " ".join(row["text"].split())
            lines += [
                f"{row['rule']}  {row['source']}:{row['origin']}:{row['position']}  {row['detail']}  (id {row['id']})",
                f"    {text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 1] + '…'}",
            ]
        return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What the next cycle will not reject again."""

    corpus: str
    rule: str
    rows: int

    def lines(self) -> list[str]:
        """What was done, as text."""
        return [
            f"{self.rows:,} rows that {self.rule} had rejected from {self.corpus} come back in the next cycle: aifactory run."
        ]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_rejected(books: Books, *, rule: str | None, corpus_id: str | None, limit: int) -> LedgerReport:
    """The ledger of a corpus, the newest one where none is named.

    Raises   StateError where there is no corpus yet; ConfigError where no row was rejected by the rule.
    """
    corpus = _corpus(books, corpus_id)
    by_rule: Counter[str] = Counter()
    for table in read_ledger(books.storage, corpus, columns=["rule"]):
        by_rule.update(table["rule"].to_pylist())
    if rule is not None:
        _require_rule(rule, by_rule, corpus)
    wanted = by_rule[rule] if rule is not None else by_rule.total()
    chosen = {i * wanted // min(limit, wanted) for i in range(min(limit, wanted))} if wanted else set()
    rows: list[Mapping[str, Any]] = []
    at = 0
    for table in read_ledger(books.storage, corpus) if chosen else ():
        for i, found in enumerate(table["rule"].to_pylist()):
            if rule is None or found == rule:
                if at in chosen:
                    rows += table.slice(i, 1).to_pylist()
                at += 1
    return LedgerReport(corpus=corpus.id, by_rule=dict(sorted(by_rule.items())), rows=rows)


def restore_rejected(books: Books, *, rule: str, corpus_id: str | None) -> Restored:
    """Bring back, in the next cycle, the rows that a rule has rejected; who asked goes to the audit.

    Raises   StateError, ConfigError as `read_rejected`; ConfigError too where the rows never became rows, and for a rule by
             which rows are rejected whatever a person asks for.
    """
    corpus = _corpus(books, corpus_id)
    found: Counter[str] = Counter()
    restorable = 0
    for table in read_ledger(books.storage, corpus, columns=["rule", "key"]):
        for each, key in zip(table["rule"].to_pylist(), table["key"].to_pylist(), strict=True):
            found[each] += 1
            restorable += each == rule and bool(key)
    _require_rule(rule, found, corpus)
    if rule in FOR_GOOD:
        raise ConfigError(
            f"expected a rule whose rows can be restored, found {rule!r}, by which {found[rule]} rows of {corpus.id} stay "
            f"rejected: {FOR_GOOD[rule]}."
        )
    if not restorable:
        raise ConfigError(
            f"expected rows of {rule!r} that can be restored, found {found[rule]} that could not be read as rows; mend them "
            "in their source."
        )
    detail = {"corpus": corpus.id, "rule": rule, "rows": restorable}
    with books.database.write(serialize=True) as connection:
        books.journal.write_within(connection, "restored", subject=corpus.id, detail=detail)
        books.journal.audit_within(connection, "restore", subject=corpus.id, detail=detail)
    return Restored(corpus=corpus.id, rule=rule, rows=restorable)


def _corpus(books: Books, corpus_id: str | None) -> Corpus:
    ids = books.journal.corpora()
    if not ids:
        raise StateError(
            f"expected a corpus of the factory {books.config.name}, found none; run: aifactory ingest CONFIG."
        )
    if corpus_id is not None and corpus_id not in ids:
        raise ConfigError(f"expected one of the corpora {', '.join(ids)}, found {corpus_id!r}.")
    return books.artifacts.get(Corpus, corpus_id or ids[-1])


def _require_rule(rule: str, by_rule: Mapping[str, int], corpus: Corpus) -> None:
    if by_rule.get(rule):
        return
    near = difflib.get_close_matches(rule, list(by_rule), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"rules that did: {', '.join(sorted(by_rule)) or 'none'}"
    raise ConfigError(f"expected a rule that rejected rows of {corpus.id}, found {rule!r}; {hint}")
