"""`aifactory keys`: what was asked by flags, done on the books of a factory, and how it is told."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from aifactory.errors import ConfigError
from aifactory.keys.proxy_maps import write_maps
from aifactory.records.allowances import Spent
from aifactory.records.keys import ApiKey, IssuedKey, Keys
from aifactory.records.limits import NAMES, Limits, Subject

if TYPE_CHECKING:
    from aifactory.factory import Factory


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """A key and its token."""

    key: ApiKey
    token: str
    said: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self.key) | {"token": self.token}

    def lines(self) -> Iterator[str]:
        yield self.token
        yield ""
        yield f"{self.key.id} ({self.key.name}): {self.said}"
        yield "Keep it: only a salted hash of it is in the database, and nobody can tell it again."


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """All keys, and the limits that hold."""

    keys: Sequence[ApiKey]
    limits: Mapping[Subject, Limits]
    spent: Mapping[Subject, Spent]
    """In this calendar month, UTC."""
    now: float

    def to_json(self) -> dict[str, Any]:
        return {
            "keys": [
                asdict(key) | {"state": key.state(self.now)} | self._of(Subject("key", key.id)) for key in self.keys
            ],
            "others": {str(subject): self._of(subject) for subject in self._others()},
        }

    def lines(self) -> Iterator[str]:
        used = f"{'requests':>10}{'tokens':>13}{'J':>11}"
        yield f"{'id':<21}{'name':<25}{'team':<17}{'scopes':<24}{'state':<9}{'ends':<17}{used}  limits"
        for key in self.keys:
            ends = "" if key.expires_at is None else _when(key.expires_at)
            yield (
                f"{key.id:<21}{key.name:<25}{key.team or '':<17}{','.join(key.scopes):<24}{key.state(self.now):<9}{ends:<17}"
                f"{self._told(Subject('key', key.id))}"
            ).rstrip()
        for subject in self._others():
            yield f"{subject!s:<113}{self._told(subject)}".rstrip()
        yield "Requests, tokens and joules are those of this month (UTC)."

    def _others(self) -> list[Subject]:
        ids = {key.id for key in self.keys}
        known = {*self.limits, *self.spent}
        return sorted(subject for subject in known if subject.kind != "key" or subject.name not in ids)

    def _of(self, subject: Subject) -> dict[str, Any]:
        return {"limits": self._asked(subject), "used_this_month": asdict(self.spent.get(subject, Spent()))}

    def _told(self, subject: Subject) -> str:
        spent = self.spent.get(subject, Spent())
        return f"{spent.requests:>10,}{spent.tokens:>13,}{spent.joules:>11,.0f}  {_form(self._asked(subject))}"

    def _asked(self, subject: Subject) -> dict[str, Any]:
        limited = self.limits.get(subject)
        return {} if limited is None else limited.asked()


def run(factory: Factory, arguments: argparse.Namespace) -> Any:
    """What was asked.

    Raises   ConfigError for a key that there is not, or a limit that can't hold.
    """
    keys = factory.keys
    if arguments.what == "list":
        spent = factory.books.allowances.spent("month")
        return Listed(keys=keys.all(), limits=keys.limits_of(), spent=spent, now=keys.journal.clock())
    if arguments.what == "create":
        limited = _limits(factory, arguments)
        scopes = arguments.scope or ("infer", "feedback")
        found = keys.create(
            arguments.subject, scopes=scopes, team=arguments.team, expires_in_s=arguments.expires, limited=limited
        )
        return _issued(found, f"good for {', '.join(found.key.scopes)}{_until(found.key)}")
    if arguments.what == "rotate":
        found = keys.rotate(arguments.subject, overlap_s=arguments.overlap)
        return _issued(found, f"another secret; the one before is good for {arguments.overlap:g} s more")
    if arguments.what == "export":
        return {"keys": write_maps(keys, arguments.folder), "folder": arguments.folder}
    if arguments.what == "revoke":
        return _revoked(keys, arguments)
    subject = keys.limit("team" if arguments.team else "key", arguments.subject, _limits(factory, arguments))
    holds = keys.limits_of(subject).get(subject)
    return {"subject": str(subject)} | ({"limits": "none"} if holds is None else holds.asked())


def _revoked(keys: Keys, arguments: argparse.Namespace) -> dict[str, Any]:
    key = keys.revoke(arguments.subject, reason=arguments.reason)
    assert key.revoked_at is not None
    return {"id": key.id, "name": key.name, "state": "revoked", "revoked_at": key.revoked_at}


def _limits(factory: Factory, arguments: argparse.Namespace) -> Limits:
    limited = Limits(**{name: getattr(arguments, name) for name in NAMES}, budget_window=arguments.budget_window)
    gateway = factory.config.runtime.gateway
    if limited.budget_money is not None and not gateway.money_for(prompt_tokens=1, answer_tokens=1):
        raise ConfigError(
            "expected a price of tokens beside a budget of money, found none; set "
            "runtime.gateway.price_per_million_prompt_tokens and price_per_million_answer_tokens."
        )
    return limited


def _issued(found: IssuedKey, said: str) -> Issued:
    return Issued(key=found.key, token=found.token, said=said)


def _until(key: ApiKey) -> str:
    return "" if key.expires_at is None else f" until {_when(key.expires_at)} UTC"


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")


def _form(asked: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in asked.items()
    )
