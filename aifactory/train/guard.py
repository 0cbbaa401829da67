"""Guard: steps that are not taken, and the batches that are read no more.

A loss or a gradient that is not finite, or a loss far above those before it, is never applied: the run goes back to its
newest checkpoint, and from then on the batch that did it is left out. All workers see the same numbers, so all of them
decide alike. Pure Python and NumPy.

Writes   <run folder>/skipped.json   [{"batch", "step", "reason", "rows"}]: rows are the ids of the source rows in the batch
Law      It is written before the run goes on, so a run that is killed and started again leaves out the same batches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from aifactory.records.storage import Storage

if TYPE_CHECKING:
    from aifactory.config import Guards

_FILE = "skipped.json"
_NORMAL = 1.4826
"""Standard deviations of a normal distribution in its median absolute deviation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A batch that is read no more."""

    batch: int
    """Which of all batches of the sampler, from 0."""
    step: int
    """The step that would have been taken with it, from 0."""
    reason: str
    rows: tuple[str, ...]
    """Ids of the source rows in it."""


def objection(loss: float, norm: float, losses: Sequence[float], guards: Guards) -> str:
    """Why a step must not be taken; "" where it may be.

    losses   those of the steps before, the newest last. A spike is a loss more than `spike_deviations` robust standard
             deviations above their median (Iglewicz & Hoaglin 1993, How to detect and handle outliers, section 3.3).
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(norm):
        return f"the norm of the gradient is {norm}"
    if guards.spike_deviations and len(losses) >= guards.spike_window:
        window = np.asarray(losses[-guards.spike_window :])
        median = float(np.median(window))
        # Of losses that hardly differ any is an outlier: a hundredth of the median is no spike, whatever they do.
        deviation = max(_NORMAL * float(np.median(np.abs(window - median))), 0.01 * abs(median))
        if loss > median + guards.spike_deviations * deviation:
            return f"the loss is {loss:.4g}, {(loss - median) / deviation:.1f} deviations above {median:.4g}"
    return ""


class Skips:
    """The batches that a run leaves out."""

    def __init__(self, storage: Storage, *folder: str) -> None:
        self._storage = storage
        self._folder = folder
        data = storage.read_bytes(*folder, _FILE)
        told: list[dict[str, Any]] = [] if data is None else json.loads(data)
        self.skipped = [Skipped(**{**each, "rows": tuple(each["rows"])}) for each in told]

    def batch(self, step: int) -> int:
        """The batch of a step: as many batches that are left out as come before it are passed over."""
        batch = step
        for left_out in sorted(each.batch for each in self.skipped):
            batch += left_out <= batch
        return batch

    def add(self, skipped: Skipped) -> None:
        """Leave out one more."""
        self.skipped.append(skipped)

    def write(self) -> None:
        """Make it durable; rank 0 does."""
        told = [asdict(each) for each in self.skipped]
        self._storage.write_bytes(json.dumps(told).encode(), *self._folder, _FILE)
