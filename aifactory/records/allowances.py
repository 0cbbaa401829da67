"""Allowances: what keys and teams have used of their limits, in the database, where all replicas count together.

Rates       a request counts in the second in which it is let in; what is let in in any 60 seconds is at most the limit. The
            oldest second counts as a whole, so a limit may be reached a second late and is never passed.
Tokens      a request reserves its prompt and the most that its answers may have; at its end what it did not use is given back,
            to the second in which it was let in.
Open        one that is open is a row that its replica renews; those of a replica that is lost count no more after `HOLD_S`.
Budgets     what was spent in the window, what open requests have reserved, and what this one would, is at most the budget.
            Joules are entered by replicas afterwards, and can't be reserved.

Requests of one replica that come together are decided in one transaction, in the order in which they came: many requests a
second cost few transactions, and nothing is handed out in advance that could be left over or be given twice. Transactions that
decide about the same key or team come one after another (`SELECT ... FOR UPDATE` on its limits; SQLite has one writer).
The second is the database's where it is PostgreSQL: clocks of machines differ.
Raises   StateError.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from aifactory.records.journal import ANONYMOUS, Journal
from aifactory.records.limits import RATE_S, Limits, Subject, Window, limits_of
from aifactory.records.tables import api_keys, limits, open_requests, request_rates, spending

HOLD_S = 20.0
"""How long an open request counts after its replica was last heard of, seconds."""
_SWEPT_S = 3_600.0
"""Rows that count no more are deleted after so long, when nobody can still be at them."""

# Statements are made once: making one takes longer than running it.
_subjects_asked: sa.BindParameter[Any] = sa.bindparam("subjects", expanding=True)
_ids_asked: sa.BindParameter[Any] = sa.bindparam("ids", expanding=True)
_names_asked: sa.BindParameter[Any] = sa.bindparam("names", expanding=True)
_factory: sa.BindParameter[Any] = sa.bindparam("factory_")
_SPENT_NAMES = ("requests", "prompt_tokens", "answer_tokens", "money", "joules")


def _of_subjects(table: sa.Table) -> sa.ColumnElement[bool]:
    return sa.and_(table.c.factory == _factory, sa.tuple_(table.c.kind, table.c.name).in_(_subjects_asked))


def _open_by(column: sa.ColumnElement[Any]) -> sa.Select[Any]:
    sums = (sa.func.sum(open_requests.c[name]) for name in ("rated", "tokens", "money"))
    mine = (open_requests.c.factory == _factory, column.in_(_names_asked), open_requests.c.until > sa.bindparam("now"))
    return sa.select(column, *sums).where(*mine).group_by(column)


_SPENT = (
    sa.select(spending.c.kind, spending.c.name, *(sa.func.sum(spending.c[name]).label(name) for name in _SPENT_NAMES))
    .where(spending.c.factory == _factory, spending.c.day >= sa.bindparam("since"))
    .group_by(spending.c.kind, spending.c.name)
)
_SPENT_BY = _SPENT.where(sa.tuple_(spending.c.kind, spending.c.name).in_(_subjects_asked))
_LIMITS_OF = sa.select(limits).where(_of_subjects(limits)).order_by(limits.c.kind, limits.c.name)
_LIMITS = _LIMITS_OF.with_for_update()
_RATES = sa.select(request_rates).where(_of_subjects(request_rates), request_rates.c.slot >= sa.bindparam("first"))
_OPEN_BY = {"key": _open_by(open_requests.c.key_id), "team": _open_by(open_requests.c.team)}
_OPENED = sa.select(open_requests).where(open_requests.c.factory == _factory, open_requests.c.id.in_(_ids_asked))
_CLOSE = open_requests.delete().where(open_requests.c.factory == _factory, open_requests.c.id.in_(_ids_asked))
_TAKE_UP = (
    open_requests.update()
    .where(open_requests.c.factory == _factory, open_requests.c.id.in_(_ids_asked))
    .values(holder=sa.bindparam("holder_"), until=sa.bindparam("until_"))
)
_RENEW = (
    open_requests.update()
    .where(open_requests.c.factory == _factory, open_requests.c.holder == sa.bindparam("holder_"))
    .values(until=sa.bindparam("until_"))
)
_GIVE_BACK = (
    request_rates.update()
    .where(
        request_rates.c.factory == _factory,
        request_rates.c.kind == sa.bindparam("kind_"),
        request_rates.c.name == sa.bindparam("name_"),
        request_rates.c.slot == sa.bindparam("slot_"),
    )
    .values(tokens=request_rates.c.tokens - sa.bindparam("back"))
)
_OPEN = open_requests.insert()


def _adding(table: sa.Table, names: Sequence[str], dialect: Any) -> Any:
    """Puts rows in, or adds these numbers of theirs to those that are there."""
    statement = dialect.insert(table)
    added = {name: table.c[name] + statement.excluded[name] for name in names}
    keys = [column.name for column in table.primary_key]
    return statement.on_conflict_do_update(index_elements=keys, set_=added)


_ADD_RATES, _ADD_SPENT = (
    {dialect: _adding(table, names, dialect) for dialect in (sqlite, postgresql)}
    for table, names in ((request_rates, ("requests", "tokens")), (spending, _SPENT_NAMES))
)
_NOW = sa.text("SELECT extract(epoch FROM clock_timestamp())")
_NOT_AT_ONCE = sa.text("SET LOCAL synchronous_commit TO OFF")

Meter = Literal[
    "requests_per_minute", "tokens_per_minute", "concurrent", "budget_tokens", "budget_money", "budget_joules"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request that wants to be let in."""

    id: str
    """Whoever asks again with the same one, because a replica was lost with it, is let in and counted once."""
    key_id: str
    team: str | None
    tokens: int = 0
    """The most that it may use."""
    money: float = 0.0
    """What those cost."""
    is_rated: bool = True
    """Whether it counts in rates and among open ones; work in the background spends from budgets alone."""
    is_brief: bool = False
    """Whether it is over at once: it is then never among the open ones."""

    @property
    def subjects(self) -> tuple[Subject, ...]:
        return _subjects(self.key_id, self.team)


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What a request has used, at its end."""

    id: str
    key_id: str
    team: str | None
    prompt_tokens: int = 0
    answer_tokens: int = 0
    money: float = 0.0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.answer_tokens

    @property
    def subjects(self) -> tuple[Subject, ...]:
        return _subjects(self.key_id, self.team)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a request is not let in."""

    subject: Subject
    meter: Meter
    limit: float
    asked: float
    """What this one would take."""
    left: float
    """What there is of it."""
    window: Window | None = None
    """Of a budget."""
    retry_after_s: int | None = None
    """When there is room again, if nobody else takes it; None: not by waiting, or not before the window ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What a key or a team has used."""

    requests: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    money: float = 0.0
    joules: float = 0.0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.answer_tokens


@dataclass(slots=True)
class _Standing:
    """How a key or a team stands against its limits, within one transaction."""

    limits: Limits
    slots: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Requests and tokens by second, of those that count."""
    requests: int = 0
    tokens: int = 0
    num_open: int = 0
    reserved_tokens: int = 0
    reserved_money: float = 0.0
    spent: Spent = field(default_factory=Spent)

    def refusal(self, subject: Subject, ask: Ask, now: float) -> Refusal | None:
        limited = self.limits

        def refused(meter: Meter, limit: float, asked: float, left: float, **more: Any) -> Refusal:
            return Refusal(subject=subject, meter=meter, limit=limit, asked=asked, left=max(0, left), **more)

        if ask.is_rated and limited.tokens_per_minute is not None and ask.tokens > limited.tokens_per_minute:
            return refused("tokens_per_minute", limited.tokens_per_minute, ask.tokens, limited.tokens_per_minute)
        window = limited.budget_window
        for meter, budget, asked, used in (
            ("budget_tokens", limited.budget_tokens, ask.tokens, self.spent.tokens + self.reserved_tokens),
            ("budget_money", limited.budget_money, ask.money, self.spent.money + self.reserved_money),
            ("budget_joules", limited.budget_joules, 0.0, self.spent.joules),
        ):
            # What is empty lets nothing more in, not even what costs nothing.
            if budget is not None and (used + asked > budget or used >= budget):
                return refused(meter, budget, asked, budget - used, window=window)  # type: ignore[arg-type]
        if not ask.is_rated:
            return None
        if limited.concurrent is not None and not ask.is_brief and self.num_open >= limited.concurrent:
            return refused("concurrent", limited.concurrent, 1, 0, retry_after_s=1)
        for meter, limit, asked, used, place in (
            ("requests_per_minute", limited.requests_per_minute, 1, self.requests, 0),
            ("tokens_per_minute", limited.tokens_per_minute, ask.tokens, self.tokens, 1),
        ):
            if limit is not None and used + asked > limit:
                wait = self._wait(used + asked - limit, place, now)
                return refused(meter, limit, asked, limit - used, retry_after_s=wait)  # type: ignore[arg-type]
        return None

    def _wait(self, too_many: int, place: int, now: float) -> int:
        """Seconds until so many have left the window."""
        for slot in sorted(self.slots):
            too_many -= self.slots[slot][place]
            if too_many <= 0:
                return max(1, math.ceil(slot + 1 + RATE_S - now))
        return RATE_S + 1

    def take(self, ask: Ask, slot: int) -> None:
        if ask.is_rated:
            requests, tokens = self.slots.get(slot, (0, 0))
            self.slots[slot] = requests + 1, tokens + ask.tokens
            self.requests += 1
            self.tokens += ask.tokens
            self.num_open += not ask.is_brief
        if not ask.is_brief:
            self.reserved_tokens += ask.tokens
            self.reserved_money += ask.money


class Allowances:
    """What the keys and teams of one factory may still use."""

    def __init__(self, journal: Journal, *, clock: Callable[[], float] | None = None) -> None:
        """`clock` in the place of the database's."""
        self.journal = journal
        self.database = journal.database
        self.factory = journal.factory
        self._clock = clock

    def turn(
        self, asks: Sequence[Ask], uses: Sequence[Use] = (), *, holder: str, renew: bool = False
    ) -> list[Refusal | None]:
        """One transaction: requests that have ended, then those that ask, in their order; of each of these why it is not let in.

        renew    those that this holder has open are still open
        """
        found: list[Refusal | None] = []
        with self.database.write() as connection:
            if not self.database.is_sqlite:
                # A database that crashes right after it may forget who was let in, with the requests themselves.
                connection.execute(_NOT_AT_ONCE)
            now = self._now(connection)
            asked = {each for ask in asks for each in ask.subjects}
            standings = self._lock(connection, asked.union(*(use.subjects for use in uses)))
            self._end(connection, uses, standings, now)
            if renew:
                values = {"factory_": self.factory, "holder_": holder, "until_": now + HOLD_S}
                connection.execute(_RENEW, values)
            if asks:
                self._look(connection, standings, now)
                found = self._decide(connection, asks, standings, holder, now)
        return found

    def sweep(self) -> None:
        """Delete what counts no more."""
        with self.database.write() as connection:
            now = self._now(connection)
            for table, old in (
                (request_rates, request_rates.c.slot < int(now - _SWEPT_S)),
                (open_requests, open_requests.c.until < now - _SWEPT_S),
            ):
                connection.execute(table.delete().where(table.c.factory == self.factory, old))

    def add_joules(self, joules: Mapping[str, float]) -> None:
        """Energy that went into answers, by the id of the key that asked for them; of those without one only where limits hold
        for them."""
        if ANONYMOUS in joules:
            with self.database.read() as connection:
                asked = self._asking([Subject("key", ANONYMOUS)])
                if connection.execute(_LIMITS_OF, asked).one_or_none() is None:
                    joules = {key_id: value for key_id, value in joules.items() if key_id != ANONYMOUS}
        if not joules:
            return
        with self.database.write() as connection:
            mine = (api_keys.c.factory == self.factory, api_keys.c.id.in_([*joules]))
            teams = dict(connection.execute(sa.select(api_keys.c.id, api_keys.c.team).where(*mine)).tuples().all())
            found: dict[Subject, Spent] = {}
            for key_id, value in joules.items():
                for subject in _subjects(key_id, teams.get(key_id)):
                    found[subject] = Spent(joules=found.get(subject, Spent()).joules + value)
            self._spend(connection, found, _day(self._now(connection)))

    def spent(self, window: Window, *subjects: Subject) -> dict[Subject, Spent]:
        """What these, or all, have used in the window that it is now."""
        with self.database.read() as connection:
            return self._spent(connection, window, self._now(connection), subjects)

    # ── how ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _now(self, connection: Connection) -> float:
        if self._clock is not None or self.database.is_sqlite:
            return (self._clock or self.journal.clock)()
        return float(connection.scalar(_NOW) or 0.0)

    def _lock(self, connection: Connection, subjects: Iterable[Subject]) -> dict[Subject, _Standing]:
        """Those for whom limits hold; nobody else decides about them until this transaction ends."""
        rows = connection.execute(_LIMITS, self._asking(subjects)).mappings()
        return {Subject(row["kind"], row["name"]): _Standing(limits_of(row)) for row in rows}

    def _end(
        self, connection: Connection, uses: Sequence[Use], standings: Mapping[Subject, _Standing], now: float
    ) -> None:
        if not uses:
            return
        ended = {"factory_": self.factory, "ids": [use.id for use in uses]}
        opened = {row.id: row for row in connection.execute(_OPENED, ended)}
        if opened:
            connection.execute(_CLOSE, ended)
        back: dict[tuple[Subject, int], int] = defaultdict(int)
        found: dict[Subject, Spent] = {}
        for use in uses:
            row = opened.get(use.id)
            for subject in use.subjects:
                if row is not None and row.rated and row.slot >= _first_slot(now) and subject in standings:
                    back[subject, row.slot] += row.tokens - use.tokens
                had = found.get(subject, Spent())
                found[subject] = Spent(
                    requests=had.requests + 1,
                    prompt_tokens=had.prompt_tokens + use.prompt_tokens,
                    answer_tokens=had.answer_tokens + use.answer_tokens,
                    money=had.money + use.money,
                )
        given = [
            {"factory_": self.factory, "kind_": subject.kind, "name_": subject.name, "slot_": slot, "back": tokens}
            for (subject, slot), tokens in sorted(back.items())
        ]
        if given:
            connection.execute(_GIVE_BACK, given)
        self._spend(connection, found, _day(now))

    def _look(self, connection: Connection, standings: Mapping[Subject, _Standing], now: float) -> None:
        """How those with limits stand."""
        if not standings:
            return
        for row in connection.execute(_RATES, self._asking(standings) | {"first": _first_slot(now)}):
            standing = standings[Subject(row.kind, row.name)]
            standing.slots[row.slot] = row.requests, row.tokens
            standing.requests += row.requests
            standing.tokens += row.tokens
        for kind, query in _OPEN_BY.items():
            names = [subject.name for subject in standings if subject.kind == kind]
            asked = {"factory_": self.factory, "names": names, "now": now}
            for name, num_open, tokens, money in connection.execute(query, asked).tuples() if names else ():
                standing = standings[Subject(kind, name)]  # type: ignore[arg-type]
                standing.num_open, standing.reserved_tokens, standing.reserved_money = int(num_open), int(tokens), money
        windows = {s.limits.budget_window for s in standings.values() if s.limits.has_budget}
        for window in windows:
            have = [s for s, it in standings.items() if it.limits.has_budget and it.limits.budget_window == window]
            for subject, spent in self._spent(connection, window, now, have).items():
                standings[subject].spent = spent

    def _decide(
        self,
        connection: Connection,
        asks: Sequence[Ask],
        standings: Mapping[Subject, _Standing],
        holder: str,
        now: float,
    ) -> list[Refusal | None]:
        slot = int(now)
        ids = [ask.id for ask in asks]
        again = {row.id for row in connection.execute(_OPENED, {"factory_": self.factory, "ids": ids})}
        found: list[Refusal | None] = []
        opened, rates = [], dict[Subject, list[int]]()
        for ask in asks:
            concerned = [(subject, standings[subject]) for subject in ask.subjects if subject in standings]
            if ask.id in again:
                found.append(None)
                continue
            refusals = (standing.refusal(subject, ask, now) for subject, standing in concerned)
            refusal = next((each for each in refusals if each is not None), None)
            found.append(refusal)
            if refusal is not None or not concerned:
                continue
            for subject, standing in concerned:
                standing.take(ask, slot)
                if ask.is_rated:
                    rate = rates.setdefault(subject, [0, 0])
                    rate[0] += 1
                    rate[1] += ask.tokens
            if not ask.is_brief:
                again.add(ask.id)
                opened.append(
                    {
                        "factory": self.factory,
                        "id": ask.id,
                        "key_id": ask.key_id,
                        "team": ask.team,
                        "holder": holder,
                        "until": now + HOLD_S,
                        "slot": slot,
                        "rated": int(ask.is_rated),
                        "tokens": ask.tokens,
                        "money": ask.money,
                    }
                )
        taken_up = [each for each in ids if each in again and each not in {row["id"] for row in opened}]
        if taken_up:
            values = {"factory_": self.factory, "ids": taken_up, "holder_": holder, "until_": now + HOLD_S}
            connection.execute(_TAKE_UP, values)
        if opened:
            connection.execute(_OPEN, opened)
        rows = [
            {**_named(self.factory, subject), "slot": slot, "requests": requests, "tokens": tokens}
            for subject, (requests, tokens) in sorted(rates.items())
        ]
        self._add(connection, _ADD_RATES, rows)
        return found

    def _spend(self, connection: Connection, found: Mapping[Subject, Spent], day: str) -> None:
        rows = [
            {**_named(self.factory, subject), "day": day, **{name: getattr(spent, name) for name in _SPENT_NAMES}}
            for subject, spent in sorted(found.items(), key=lambda each: each[0])
        ]
        self._add(connection, _ADD_SPENT, rows)

    def _add(self, connection: Connection, adding: Mapping[Any, Any], rows: list[dict[str, Any]]) -> None:
        """In the order of the rows, which is everybody's: so nobody waits in a ring."""
        if rows:
            connection.execute(adding[sqlite if self.database.is_sqlite else postgresql], rows)

    def _asking(self, subjects: Iterable[Subject]) -> dict[str, Any]:
        return {"factory_": self.factory, "subjects": [tuple(each) for each in subjects]}

    def _spent(
        self, connection: Connection, window: Window, now: float, subjects: Sequence[Subject]
    ) -> dict[Subject, Spent]:
        today = _day(now)
        since = {"day": today, "month": today[:8] + "01", "total": ""}[window]
        asked = self._asking(subjects) if subjects else {"factory_": self.factory}
        rows = connection.execute(_SPENT_BY if subjects else _SPENT, asked | {"since": since}).mappings()
        return {
            Subject(row["kind"], row["name"]): Spent(
                **{name: int(row[name]) for name in _SPENT_NAMES[:3]},
                money=float(row["money"]),
                joules=float(row["joules"]),
            )
            for row in rows
        }


def _subjects(key_id: str, team: str | None) -> tuple[Subject, ...]:
    return (Subject("key", key_id), *(() if team is None else (Subject("team", team),)))


def _named(factory: str, subject: Subject) -> dict[str, str]:
    return {"factory": factory, "kind": subject.kind, "name": subject.name}


def _first_slot(now: float) -> int:
    """The oldest second of which a part is in the last 60 seconds."""
    return math.floor(now) - RATE_S


def _day(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d")
