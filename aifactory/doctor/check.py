"""A check: what was found, what was expected, and what to do where they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "warning", "error"]
_MARKS: dict[Status, str] = {"ok": "ok     ", "warning": "WARNING", "error": "ERROR  "}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    of: str
    """What: `shared memory`."""
    status: Status
    found: str
    expected: str
    remedy: str = ""
    """What to do; empty where all is well."""

    def lines(self) -> list[str]:
        first = f"{_MARKS[self.status]}  {self.of:<22} {self.found}"
        if self.status == "ok":
            return [first]
        return [first, f"{'':<9}{'expected':<22} {self.expected}", f"{'':<9}{'do':<22} {self.remedy}"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All that was looked at."""

    checks: Sequence[Check]

    @property
    def holds(self) -> bool:
        """Whether nothing is an error."""
        return all(check.status != "error" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {"holds": self.holds, "checks": [asdict(check) for check in self.checks]}

    def lines(self) -> list[str]:
        counts = Counter(check.status for check in self.checks)
        told = ", ".join(f"{counts[status]} {status}" for status in ("error", "warning", "ok") if counts[status])
        return [*(line for check in self.checks for line in check.lines()), f"{told}."]


def ok(of: str, found: str, expected: str = "") -> Check:
    return Check(of=of, status="ok", found=found, expected=expected or found)


def wrong(of: str, found: str, *, expected: str, remedy: str, is_error: bool = False) -> Check:
    return Check(of=of, status="error" if is_error else "warning", found=found, expected=expected, remedy=remedy)
