"""The log: completions, what was said of them, and what is derived from both; and the journal, where it quotes them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from aifactory.proof.erasing.eraser import Place
from aifactory.proof.erasing.search import FEEDBACK
from aifactory.records.journal import ERASED
from aifactory.records.tables import batches, choices, completions, cycles, feedback, journal, scores, shadow_answers

_AT_ONCE = 400


class Log(Place):
    """Rows of the database."""

    def meant(self) -> tuple[list[str], list[int]]:
        """Completions, and feedback, that the conditions mean."""
        conditions = dict(self.search.where.conditions)
        if conditions.pop("source", FEEDBACK) != FEEDBACK or conditions.keys() & {"key", "label"}:
            return [], []
        mine = completions.c.factory == self.books.journal.factory
        asked = sa.select(completions.c.id).where(mine)
        told = (
            sa.select(feedback.c.seq)
            .join(
                completions,
                sa.and_(completions.c.factory == feedback.c.factory, completions.c.id == feedback.c.completion),
            )
            .where(feedback.c.factory == self.books.journal.factory)
        )
        if "user" in conditions:
            user = conditions["user"]
            on_it = sa.select(feedback.c.seq).where(
                feedback.c.factory == completions.c.factory, feedback.c.completion == completions.c.id
            )
            # What nobody has put his name to is his who alone said something of it.
            his = sa.and_(
                completions.c.user.is_(None),
                on_it.where(feedback.c.user == user).exists(),
                ~on_it.where(feedback.c.user.is_distinct_from(user)).exists(),
            )
            asked = asked.where(sa.or_(completions.c.user == user, his))
            told = told.where(sa.func.coalesce(feedback.c.user, completions.c.user) == user)
        if "id" in conditions:
            name = conditions["id"]
            named = sa.or_(completions.c.id == name, completions.c.id.startswith(f"{name}-", autoescape=True))
            asked, told = asked.where(named), told.where(named)
        with self.books.database.read() as connection:
            return list(connection.scalars(asked)), list(connection.scalars(told))

    def said_in(self, rows: Sequence[dict[str, str]]) -> tuple[list[str], list[int]] | None:
        """Of rows that were said to the factory the completions that they were made of, where the conditions name a row.

        A user who corrected somebody else's answer takes the correction along, not the other's question.
        """
        fields = set(self.search.where.fields)
        user = self.search.where.conditions.get("user", "")
        if not fields & {"id", "key", "label"} and not user.startswith("nobody-"):
            return None
        origins = sorted({row["origin"] for row in rows if row["source"] == FEEDBACK and row["origin"]})
        found: list[str] = []
        with self.books.database.read() as connection:
            for some in _chunks(origins):
                query = sa.select(completions.c.id).where(completions.c.factory == self.books.journal.factory)
                found += connection.scalars(query.where(completions.c.id.in_(some)))
        return (found, []) if found else None

    def erase(self, meant: tuple[Sequence[str], Sequence[int]]) -> None:
        """Delete completions with all that was said of them, and feedback; the tombstones in the same transaction."""
        ids, told = meant
        self.search.completion_ids.update(ids)
        self.search.completion_ids.update(re.sub(r"-\d+$", "", each) for each in ids)
        if not ids and not told:
            return
        factory, erasure = self.books.journal.factory, self.erasure
        with self.books.database.write(serialize=True) as connection:
            seqs = set(told)
            for some in _chunks(ids):
                query = sa.select(feedback.c.seq).where(feedback.c.factory == factory)
                seqs.update(connection.scalars(query.where(feedback.c.completion.in_(some))))
                texts = sa.select(completions.c.prompt, completions.c.answer).where(completions.c.factory == factory)
                for row in connection.execute(texts.where(completions.c.id.in_(some))):
                    self.eraser.quote(row.prompt, row.answer)
            counted = {"completions": len(ids), "feedback": len(seqs)}
            for place, count in counted.items():
                if count:
                    self.found.add(place, "log", count)
            if erasure is None:
                return
            for seqs_ in _chunks(sorted(seqs)):
                mine = scores.c.factory == factory
                gone = connection.execute(scores.delete().where(mine, scores.c.feedback.in_(seqs_))).rowcount
                counted["scores"] = counted.get("scores", 0) + gone
                mine = choices.c.factory == factory
                gone = connection.execute(choices.delete().where(mine, choices.c.feedback.in_(seqs_))).rowcount
                counted["choices"] = counted.get("choices", 0) + gone
            for some in _chunks(ids):
                mine = choices.c.factory == factory
                gone = connection.execute(choices.delete().where(mine, choices.c.rejected.in_(some))).rowcount
                counted["choices"] = counted.get("choices", 0) + gone
            for seqs_ in _chunks(sorted(seqs)):
                connection.execute(feedback.delete().where(feedback.c.factory == factory, feedback.c.seq.in_(seqs_)))
            for some in _chunks(ids):
                mine = shadow_answers.c.factory == factory
                shadows = shadow_answers.delete().where(mine, shadow_answers.c.completion.in_(some))
                counted["shadow answers"] = counted.get("shadow answers", 0) + connection.execute(shadows).rowcount
                connection.execute(
                    completions.delete().where(completions.c.factory == factory, completions.c.id.in_(some))
                )
            left = sa.select(sa.func.count()).where(
                feedback.c.factory == batches.c.factory, feedback.c.batch == batches.c.number
            )
            connection.execute(batches.update().where(batches.c.factory == factory).values(rows=left.scalar_subquery()))
            self.books.erasures.bury(
                connection, erasure.id, (("completion", each, "") for each in self.search.completion_ids)
            )
            for place, count in counted.items():
                if count:
                    self.books.erasures.note(connection, erasure.id, "places", place, "log", value=count, add=True)
            self.books.journal.write_within(
                connection, ERASED, subject="log", detail={"erasure": erasure.id, **counted}
            )
        self.eraser.read_tombstones()

    def unquote(self) -> None:
        """Take quotations out of what the journal keeps: examples of rejected rows, and errors."""
        factory = self.books.journal.factory
        for table, key, column in (
            (journal, journal.c.seq, journal.c.detail),
            (cycles, cycles.c.trigger, cycles.c.decision),
        ):
            changed: dict[Any, str] = {}
            with self.books.database.read() as connection:
                query = sa.select(key, column).where(table.c.factory == factory, column.is_not(None))
                for name, text in connection.execute(query):
                    told = json.loads(text)
                    left = self._without_quotations(told)
                    if left != told:
                        changed[name] = json.dumps(left, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            if not changed:
                continue
            self.found.add("journal", table.name, len(changed))
            if self.erasure is None:
                continue
            with self.books.database.write(serialize=True) as connection:
                for name, text in changed.items():
                    mine = (table.c.factory == factory, key == name)
                    connection.execute(table.update().where(*mine).values({column.name: text}))
                place = ("places", "journal", table.name)
                self.books.erasures.note(connection, self.erasure.id, *place, value=len(changed), add=True)

    def _without_quotations(self, told: Any) -> Any:
        if isinstance(told, dict):
            return {name: self._without_quotations(value) for name, value in told.items()}
        if isinstance(told, list):
            return [
                self._without_quotations(each)
                for each in told
                if not (isinstance(each, dict) and "text" in each and self.search.is_gone(str(each.get("id"))))
            ]
        if isinstance(told, str) and len(told) >= 16 and any(text in told for text in self.eraser.quoted):
            return "(erased)"
        return told


def _chunks(values: Iterable[Any]) -> Iterator[list[Any]]:
    every = list(values)
    for at in range(0, len(every), _AT_ONCE):
        yield every[at : at + _AT_ONCE]
