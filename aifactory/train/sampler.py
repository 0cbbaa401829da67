"""The order of the rows: `row = f(seed, step, slot)`, whatever the number of workers.

Row sets are mixed by fixed shares. Each set is read in a new permutation every epoch, so no row is read a third time
before every row was read twice. There is no state: a resumed run asks for the same step and gets the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

_PATTERN_LEN = 1000


@dataclass(frozen=True, slots=True)
class Slot:
    """One row of a global batch."""

    row_set: int
    row: int


class Sampler:
    """Draws global batches from several row sets."""

    def __init__(self, *, set_sizes: Sequence[int], shares: Sequence[float], batch_rows: int, seed: int) -> None:
        if not set_sizes or min(set_sizes) < 1 or len(set_sizes) != len(shares):
            raise ValueError(f"expected a share for each of some non-empty row sets, found {set_sizes} and {shares}")
        self._set_sizes = list(set_sizes)
        self._batch_rows = batch_rows
        self._seed = seed
        self._pattern = _spread(shares)
        # How often each set has come up before each place of the pattern, and in the whole of it.
        hits = np.eye(len(set_sizes), dtype=np.int64)[self._pattern]
        self._before = np.cumsum(hits, axis=0) - hits
        self._per_pattern = hits.sum(axis=0)

    def batch(self, step: int) -> list[Slot]:
        """The rows of step `step` (from 0), in the order of their slots."""
        first = step * self._batch_rows
        return [self._slot(first + slot) for slot in range(self._batch_rows)]

    def _slot(self, draw: int) -> Slot:
        rounds, place = divmod(draw, len(self._pattern))
        row_set = int(self._pattern[place])
        nth = rounds * int(self._per_pattern[row_set]) + int(self._before[place, row_set])
        epoch, at = divmod(nth, self._set_sizes[row_set])
        return Slot(row_set, int(_permutation(self._seed, row_set, epoch, self._set_sizes[row_set])[at]))


def _spread(shares: Sequence[float]) -> npt.NDArray[np.int64]:
    """A pattern in which every set comes up as its share says, as evenly as can be."""
    wanted = np.asarray(shares, np.float64) / sum(shares)
    given = np.zeros(len(shares))
    pattern = np.zeros(_PATTERN_LEN if len(shares) > 1 else 1, np.int64)
    for place in range(len(pattern)):
        behind = wanted * (place + 1) - given
        pattern[place] = int(np.argmax(behind))
        given[pattern[place]] += 1
    return pattern


@lru_cache(maxsize=16)
def _permutation(seed: int, row_set: int, epoch: int, size: int) -> npt.NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=[seed, row_set * 2**32 + epoch])).permutation(size)
