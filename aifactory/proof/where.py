"""Which rows are meant: `user = "ann"`, or several such conditions that all hold, joined by `and`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from aifactory.errors import ConfigError
from aifactory.records.identity import canonical_json

FIELDS = ("user", "key", "source", "label", "id")
"""What can be asked for: fields of a row that are not its text. `id` is that of a row, a completion or a line of the ledger."""
_CONDITION = re.compile(
    r"""\s*(?P<field>\w+)\s*=\s*(?:"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<bare>[^\s"'=]+))\s*"""
)
_FORM = 'expected --where as FIELD = VALUE, such as user = "ann@example.org"; join several with `and`'


@dataclass(frozen=True, slots=True)
class Where:
    """Conditions that must all hold, by field."""

    conditions: Mapping[str, str]

    def __str__(self) -> str:
        """The one form of it, in which the same conditions are the same text."""
        return canonical_json(dict(self.conditions))

    @property
    def fields(self) -> list[str]:
        return sorted(self.conditions)

    def mask(self, rows: pa.Table) -> npt.NDArray[np.bool_]:
        """Which of N rows are meant; a field that they do not have is empty in all of them."""
        meant = np.ones(rows.num_rows, bool)
        for name, value in self.conditions.items():
            if name not in rows.column_names:
                return np.zeros(rows.num_rows, bool)
            meant &= pc.fill_null(pc.equal(rows[name], value), False).to_numpy().astype(bool)
        return meant

    def fits(self, values: Mapping[str, str | None]) -> bool:
        """The same for one row."""
        return all(values.get(name) == value for name, value in self.conditions.items())


def parse_where(text: str) -> Where:
    """Raises ConfigError for what has another form, names no field, or says two things of one."""
    conditions: dict[str, str] = {}
    at = 0
    while True:
        found = _CONDITION.match(text, at)
        if found is None:
            raise ConfigError(f"{_FORM}; found {text!r}, where {text[at:].strip() or 'the end'!r} is none.")
        name = found["field"]
        value = next(found[kind] for kind in ("double", "single", "bare") if found[kind] is not None)
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"fields: {', '.join(FIELDS)}"
            raise ConfigError(f"expected a field of rows in --where, found {name!r}; {hint}")
        if name in conditions:
            raise ConfigError(f"expected one value of {name} in --where, found two; forget one after the other.")
        if not value:
            raise ConfigError(
                f"expected a value of {name} in --where, found none: rows without one can't be told apart."
            )
        conditions[name] = value
        at = found.end()
        if at == len(text):
            return Where(conditions)
        joined = re.compile(r"and\b", re.IGNORECASE).match(text, at)
        if joined is None:
            raise ConfigError(f"{_FORM}; found {text[at:].strip()!r} after a condition.")
        at = joined.end()
