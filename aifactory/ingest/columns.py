"""Columns: a block of rows as Arrow holds it, and what a rule says of each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

RAW_SCHEMA = pa.schema(
    [
        ("origin", pa.string()),
        ("position", pa.int64()),
        ("prompt", pa.string()),
        ("text", pa.string()),
        ("messages", pa.string()),
        ("rejected", pa.string()),
        ("label", pa.string()),
        ("user", pa.string()),
        ("timestamp", pa.string()),
        ("weight", pa.float64()),
    ]
)
"""What a source says of a row, before any step; no value is null.

origin     the file (below the source's path) or table, or the completion that was corrected
position   line, record or row in it, from 0
prompt     what was asked; "" for plain text
text       the text, the answer, or the answer that was preferred; valid UTF-8
messages   the turns before the answer, as canonical JSON [{"role": ..., "content": ...}]; "" where there are none
rejected   the answer that was not preferred; "" where there is none
label, user, timestamp   as the source gives them; "" where it gives none
weight     1.0 where the source gives none
"""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Which rule each of N texts breaks first, and what was measured."""

    rules: tuple[str, ...]
    """The names of the rules."""
    broken_N: npt.NDArray[np.uint8]
    """0 where every rule is kept, else 1 + the index of the rule in `rules`."""
    score_N: npt.NDArray[np.float64]
    """What the broken rule measured, in that rule's unit; 0 where none is broken."""

    @classmethod
    def none(cls, count: int, rules: tuple[str, ...]) -> Self:
        """Of so many texts that keep all rules, as far as is known."""
        return cls(rules, np.zeros(count, np.uint8), np.zeros(count, np.float64))
