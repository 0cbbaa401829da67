"""The audit: who or what did what, as a chain of lines in which a changed one is found.

Each line of a factory holds its number, the hash of the line before it, and the hash of all that with its own content. It is
written in the transaction that does what it tells of, one writer at a time, so there is one chain whoever writes.

What can be found from the lines alone: one that was changed, removed, put in between, or stands elsewhere. Whoever may write to
the database can also rewrite the whole chain from a line on, or cut its end off: that is found by whoever kept a hash of
before (`expect`). Of an end that was cut off the promotions, which another table holds too, are missed without one.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aifactory.records.identity import canonical_json, hash_text
from aifactory.records.tables import audit, promotions

GENESIS = "0" * 64
"""What stands in the place of the hash of a line before the first."""
CHAIN_BEGUN = "chain_begun"
"""Action of the line that a migration wrote behind lines of before there was a chain."""
_HASHED = ("factory", "number", "at", "key_id", "action", "subject", "detail", "previous")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditLine:
    """Who or what did what."""

    number: int
    """Place in the factory's chain, from 1."""
    at: float
    """Seconds since 1970, UTC."""
    key_id: str
    action: str
    subject: str
    detail: Mapping[str, Any]
    previous: str
    """Hash of the line before it; zeros for the first."""
    hash: str
    """SHA-256 (64 hex digits) of the rest of the line, with the factory's name and the hash of the line before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFault:
    """Something that is not as it was written."""

    kind: Literal["changed", "replaced", "removed", "inserted", "moved"]
    number: int
    """Of the line; of the first one where several are removed."""
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditChain:
    """All lines of a factory as they stand now, and what is wrong with them."""

    lines: Sequence[AuditLine]
    faults: Sequence[AuditFault]
    begun_after: int
    """So many lines are older than the chain: they were chained by a migration, and tell nothing of what was changed before."""

    @property
    def head(self) -> str:
        """The hash of the last line: what proves, if it is kept elsewhere, that nothing before it was touched."""
        return self.lines[-1].hash if self.lines else GENESIS


def hash_line(line: Mapping[str, Any]) -> str:
    """The hash of a line of the table, over canonical JSON."""
    return hash_text(canonical_json({name: line[name] for name in _HASHED}))


def append_line(
    connection: Connection,
    *,
    factory: str,
    at: float,
    key_id: str,
    action: str,
    subject: str,
    detail: Mapping[str, Any],
) -> None:
    """Write the next line of the factory's chain. No other writer may write lines beside this transaction."""
    last = connection.execute(
        sa.select(audit.c.number, audit.c.hash)
        .where(audit.c.factory == factory)
        .order_by(audit.c.number.desc())
        .limit(1)
    ).one_or_none()
    number, previous = (0, GENESIS) if last is None else last
    line = {
        "factory": factory,
        "number": number + 1,
        "at": at,
        "key_id": key_id,
        "action": action,
        "subject": subject,
        "detail": canonical_json(dict(detail)),
        "previous": previous,
    }
    connection.execute(audit.insert().values(**line, hash=hash_line(line)))


def chain_old_lines(connection: Connection, *, at: float) -> None:
    """Number and chain the lines of before there was a chain, and say so in a line behind them; for the migration."""
    heads: dict[str, tuple[int, str]] = {}
    # By name: columns that a later migration adds are not there yet.
    old = sa.select(audit.c.seq, *(audit.c[name] for name in _HASHED)).order_by(audit.c.seq)
    for row in connection.execute(old).mappings().all():
        number, previous = heads.get(row["factory"], (0, GENESIS))
        line = dict(row) | {"number": number + 1, "previous": previous}
        heads[row["factory"]] = number + 1, hash_line(line)
        chained = {"number": number + 1, "previous": previous, "hash": heads[row["factory"]][1]}
        connection.execute(audit.update().where(audit.c.seq == row["seq"]).values(**chained))
    for factory, (number, _) in sorted(heads.items()):
        detail = {"lines": number}
        append_line(
            connection, factory=factory, at=at, key_id="migration", action=CHAIN_BEGUN, subject=factory, detail=detail
        )


def read_chain(connection: Connection, factory: str, *, expect: str | None = None) -> AuditChain:
    """The factory's chain, looked through from the first line to the last.

    expect   the hash of a line, kept from before, that must still be in it
    """
    # The promotions first: one that is written meanwhile has its line then, and not the other way round.
    query = sa.select(promotions).where(promotions.c.factory == factory).order_by(promotions.c.at, promotions.c.number)
    pointed = [dict(row) for row in connection.execute(query).mappings()]
    rows = connection.execute(sa.select(audit).where(audit.c.factory == factory).order_by(audit.c.seq)).mappings().all()
    stands, inserted = _in_chain([dict(row) for row in rows])
    faults = [*_foreign(inserted), *_changed(stands), *_broken(stands), *_moved(stands), *_untold(stands, pointed)]
    if expect is not None and expect not in {hash_line(row) for row in stands}:
        what = (
            f"no line has the hash {expect} any more: lines from there on were cut off, or the chain was written anew"
        )
        faults.append(AuditFault(kind="removed", number=len(stands) + 1, what=what))
    begun = next((row for row in stands if row["action"] == CHAIN_BEGUN), None)
    return AuditChain(
        lines=[_line(row) for row in stands],
        faults=sorted(faults, key=lambda fault: fault.number),
        begun_after=0 if begun is None else begun["number"] - 1,
    )


def _line(row: Mapping[str, Any]) -> AuditLine:
    values = {name: row[name] for name in AuditLine.__dataclass_fields__ if name != "detail"}
    try:
        detail = json.loads(row["detail"])
    except ValueError:  # a changed line need not be JSON
        detail = row["detail"]
    return AuditLine(**values, detail=detail if isinstance(detail, dict) else {"": detail})


# ── what is wrong ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _in_chain(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines in the order in which each names the one before it, and those that stand beside the chain.

    Where two lines name the same one before them, the one that more lines follow is the chain's. Where none has the hash
    that a line names, something is gone: the chain goes on with the piece that begins there.
    """
    after: dict[str, list[int]] = defaultdict(list)
    for at, row in enumerate(rows):
        after[row["previous"]].append(at)
    hashes = {row["hash"] for row in rows}
    beginnings = [at for at, row in enumerate(rows) if row["previous"] not in hashes]
    pieces = sorted((_longest(rows, after, at) for at in beginnings), key=len, reverse=True)
    taken: set[int] = set()
    kept: list[list[int]] = []
    for piece in pieces:
        numbers = {rows[at]["number"] for at in piece}
        if min(numbers) >= 1 and not numbers & taken:
            kept.append(piece)
            taken |= numbers
    stands = [at for piece in sorted(kept, key=lambda piece: rows[piece[0]]["number"]) for at in piece]
    beside = sorted(set(range(len(rows))) - set(stands))
    return [rows[at] for at in stands], [rows[at] for at in beside]


def _longest(rows: Sequence[Mapping[str, Any]], after: Mapping[str, list[int]], begin: int) -> list[int]:
    """The longest way from a line over lines that name the one before; the earliest written where two are as long."""
    order, seen = [begin], {begin}
    for at in order:
        found = [each for each in after.get(rows[at]["hash"], ()) if each not in seen]
        seen.update(found)
        order += found  # is walked too, since the list is still being read
    best: dict[int, tuple[int, int | None]] = {}
    for at in reversed(order):
        ways = [(-best[each][0], each) for each in after.get(rows[at]["hash"], ()) if each in best]
        length, following = min(ways, default=(0, None))
        best[at] = 1 - length, following
    way: list[int] = []
    following_at: int | None = begin
    while following_at is not None:
        way.append(following_at)
        following_at = best[following_at][1]
    return way


def _foreign(inserted: Iterable[Mapping[str, Any]]) -> Iterable[AuditFault]:
    for row in inserted:
        what = f"{row['action']} {row['subject']}, hash {row['hash'] or '(none)'}, stands in a place of the chain that is another's"
        yield AuditFault(kind="inserted", number=row["number"], what=what)


def _changed(stands: Sequence[Mapping[str, Any]]) -> Iterable[AuditFault]:
    for row in stands:
        if (found := hash_line(row)) != row["hash"]:
            what = f"what it says now hashes to {found}; when it was written that was {row['hash']}"
            yield AuditFault(kind="changed", number=row["number"], what=what)


def _broken(stands: Sequence[Mapping[str, Any]]) -> Iterable[AuditFault]:
    """Where a line was written after another one than that which stands before it."""
    number, head, is_changed = 0, GENESIS, False
    for row in stands:
        changed = hash_line(row) != row["hash"]
        if row["previous"] != head:
            gone = range(number + 1, row["number"])
            if gone:
                which = f"lines {gone[0]} to {gone[-1]} are" if len(gone) > 1 else f"line {gone[0]} is"
                what = f"{which} gone; the hash was {row['previous']}, which line {row['number']} names"
                yield AuditFault(kind="removed", number=gone[0], what=what)
            elif not changed and not is_changed:  # or that has been said already
                what = (
                    f"line {row['number']} was written after a line with the hash {row['previous']}; this one has {head}: it "
                    "was written anew, and those before it may have been"
                )
                yield AuditFault(kind="replaced", number=number, what=what)
        number, head, is_changed = row["number"], row["hash"], changed


def _moved(stands: Sequence[Mapping[str, Any]]) -> Iterable[AuditFault]:
    for before, row in itertools.pairwise(stands):
        if row["seq"] < before["seq"]:
            what = f"it stands before line {before['number']} in the table, after which it was written"
            yield AuditFault(kind="moved", number=row["number"], what=what)


def _untold(stands: Sequence[Mapping[str, Any]], pointed: Sequence[Mapping[str, Any]]) -> Iterable[AuditFault]:
    """The last promotions and rollbacks without a line, each of which was written together with one: an end that was cut off."""
    told = [(row["action"], row["subject"]) for row in stands]
    at, last_told = 0, -1
    for i, promotion in enumerate(pointed):
        wanted = promotion["action"], f"{promotion['factory']}-r{promotion['release']}"
        if wanted in told[at:]:
            at, last_told = told.index(wanted, at) + 1, i
    for number, promotion in enumerate(pointed[last_told + 1 :], start=stands[-1]["number"] + 1 if stands else 1):
        what = (
            f"no line at the end tells of the {promotion['action']} of {promotion['factory']}-r{promotion['release']} on the "
            f"channel {promotion['channel']}, which is its promotion number {promotion['number']}"
        )
        yield AuditFault(kind="removed", number=number, what=what)
