"""Finds: what is found, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["email", "phone", "ip", "credit_card", "iban", "secret", "name"]


@dataclass(frozen=True, slots=True, order=True)
class Find:
    """Personal data at text[start:end], characters."""

    start: int
    end: int
    kind: Kind


def words_of(listed: str) -> tuple[str, ...]:
    return tuple(listed.split())
