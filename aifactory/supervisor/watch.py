"""PartWatch: what is lost and what is back, from the processes that are seen of each part. Pure; the clock is handed in."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How many processes of a part there are to be."""

    number: int
    may_shrink: bool = False
    """Whether more than that come and go as they are needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something that is worth a line in the journal."""

    event: Literal["part_lost", "part_back"]
    part: str
    pids: tuple[int, ...]
    """Of lost: those that are gone; of back: those that run."""
    seconds: float | None = None
    """Of back: since it was first found lost."""


class PartWatch:
    """Looks again and again at which processes there are. A part counts from the first time that it is whole."""

    def __init__(self, wanted: Mapping[str, Wanted]) -> None:
        self._wanted = wanted
        self._before: dict[str, frozenset[int]] = {}
        self._since: dict[str, float] = {}

    @property
    def lost(self) -> list[str]:
        """Parts that are not as they are wanted now, or never were."""
        return sorted(part for part in self._wanted if part in self._since or part not in self._before)

    def look(self, now: float, seen: Mapping[str, Set[int]]) -> list[Notice]:
        """What has changed since the look before."""
        notices = []
        for part, wanted in self._wanted.items():
            found = frozenset(seen.get(part, ()))
            is_whole = len(found) >= wanted.number
            if part not in self._before:
                if is_whole:
                    self._before[part] = found
                continue
            gone = self._before[part] - found
            # What is there in larger numbers than it must be may also have been taken away on purpose.
            if gone and part not in self._since and not (wanted.may_shrink and is_whole):
                self._since[part] = now
                notices.append(Notice(event="part_lost", part=part, pids=tuple(sorted(gone))))
            if is_whole and part in self._since:
                seconds = now - self._since.pop(part)
                notices.append(Notice(event="part_back", part=part, pids=tuple(sorted(found)), seconds=seconds))
            self._before[part] = found
        return notices
