"""Validation: the loss on held-out rows, of committed checkpoints, beside the steps; and early stopping by it. Pure torch.

Who validates looks for what is due in the run's folder and writes there what it finds: under Ray a task that the rim starts,
so that no step waits for it; elsewhere rank 0, between two steps. It loads the weights into a model of its own, so training
is the same with and without it.

Writes   <run folder>/validated-00000100.json   {"step", "loss"}
Law      Whether a run stops is decided at fixed steps, from the losses of fixed steps: at step s, by what was found up to
         the step that was validated before s. It is waited for there, so neither the time that anything takes nor a start
         from a checkpoint changes it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from aifactory.records.storage import Storage
from aifactory.text.shards import TokenRows
from aifactory.train.checkpoint import Checkpoints
from aifactory.train.objectives import MarkedRows, Objective, marked_rows
from aifactory.train.step import Precision, resolve_precision, summed_loss

if TYPE_CHECKING:
    from aifactory.config import EarlyStopping

_PREFIX = "validated-"
_LOOK_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Which steps are validated: every so many, and the last."""

    every_steps: int
    max_steps: int

    def is_due(self, step: int) -> bool:
        return step > 0 and (step % self.every_steps == 0 or step == self.max_steps)

    def before(self, step: int) -> list[int]:
        """The steps that are validated before `step`."""
        return list(range(self.every_steps, step, self.every_steps))


def over_at(losses: Mapping[int, float], stopping: EarlyStopping) -> bool:
    """Whether the last `patience` losses, in the order of their steps, were none of them better than the best before them
    by more than `min_delta`.

    Source  Prechelt 1998, "Early Stopping - But When?", section 2 (UP), with a margin.
    """
    best, waited = float("inf"), 0
    for _, loss in sorted(losses.items()):
        if loss < best - stopping.min_delta:
            best, waited = loss, 0
        else:
            waited += 1
    return waited >= stopping.patience


def best_of(losses: Mapping[int, float]) -> int | None:
    """The step of the lowest loss, the earliest of equals."""
    return min(losses, key=lambda step: (losses[step], step), default=None)


class Validations:
    """What was found so far, in the folder of a run."""

    def __init__(self, storage: Storage, *folder: str) -> None:
        self._storage = storage
        self._folder = folder
        self._known: dict[int, float] = {}  # what is found once stays

    def losses(self) -> dict[int, float]:
        """By step the loss on the held-out rows, nats a token."""
        steps = [
            int(name.removeprefix(_PREFIX).removesuffix(".json"))
            for name in self._storage.names(*self._folder)
            if name.startswith(_PREFIX)
        ]
        return {step: loss for step in steps if (loss := self.loss(step)) is not None}

    def loss(self, step: int) -> float | None:
        """That of one step; None while there is none."""
        if step not in self._known:
            data = self._storage.read_bytes(*self._folder, f"{_PREFIX}{step:08d}.json")
            if data is None:
                return None
            self._known[step] = float(json.loads(data)["loss"])
        return self._known[step]

    def write(self, step: int, loss: float) -> None:
        text = json.dumps({"step": step, "loss": loss})
        self._storage.write_bytes(text.encode(), *self._folder, f"{_PREFIX}{step:08d}.json")


class Holdout:
    """What the loop asks of held-out rows.

    validate   given where this worker is the one that validates: called with a step whose checkpoint is committed
    """

    def __init__(
        self,
        schedule: Schedule,
        checkpoints: Checkpoints,
        *,
        stopping: EarlyStopping | None,
        validate: Callable[[int], float] | None,
    ) -> None:
        self._schedule = schedule
        self._checkpoints = checkpoints
        self._stopping = stopping
        self._validate = validate
        self._found = Validations(checkpoints.storage, *checkpoints.folder)

    def is_due(self, step: int) -> bool:
        """Whether the checkpoint after `step` steps is to be validated."""
        return self._schedule.is_due(step)

    def is_over(self, step: int) -> bool:
        """Whether the run ends after `step` steps because it has stopped getting better."""
        if not self.is_due(step):
            return False
        self._validate_here(step)
        if self._stopping is None:
            return False
        return over_at({s: self._awaited(s) for s in self._schedule.before(step)}, self._stopping)

    def best(self, last: int) -> int:
        """The step whose weights are taken: the last one, or with early stopping the best up to it."""
        self._validate_here(last)
        if self._stopping is None:
            return last
        found = best_of({s: self._awaited(s) for s in [*self._schedule.before(last), last]})
        assert found is not None
        return found

    def spared(self, steps: list[int]) -> set[int]:
        """The checkpoints that are kept for what was found, or will be."""
        losses = self._found.losses()
        best = best_of({step: loss for step, loss in losses.items() if step in steps})
        waiting = {s for s in steps if self.is_due(s) and s not in losses} if self._stopping is not None else set()
        return waiting if best is None else waiting | {best}

    def _validate_here(self, step: int) -> None:
        if self._validate is not None and self._found.loss(step) is None:
            self._checkpoints.wait()
            self._found.write(step, self._validate(step))

    def _awaited(self, step: int) -> float:
        while (loss := self._found.loss(step)) is None:
            time.sleep(_LOOK_S)
        return loss


def holdout_loss(
    model: nn.Module,
    rows: TokenRows,
    *,
    micro_batch_rows: int,
    precision: str,
    device: torch.device,
    preference: Objective | None = None,
) -> float:
    """The mean negative log-likelihood of the tokens that carry loss, nats, without dropout; or the mean loss of
    `preference`, to which all of them are one batch."""
    was_training = model.training
    model.to(device).train(False)
    total, count = 0.0, 0
    if preference is not None:
        with torch.no_grad():
            total = _preference_loss(
                model, rows, preference, micro_batch_rows, resolve_precision(precision, device), device
            )
        model.train(was_training)
        return total / max(1, rows.count_documents(np.arange(len(rows))) // preference.documents_of_one)
    with torch.no_grad():
        for at in range(0, len(rows), micro_batch_rows):
            indices = np.arange(at, min(at + micro_batch_rows, len(rows)))
            tensors: list[Any] = [torch.from_numpy(values).to(device) for values in rows.read(indices)]
            ids_BT, positions_BT, loss_mask_BT = tensors
            total += float(
                summed_loss(model, ids_BT, positions_BT, loss_mask_BT, precision=resolve_precision(precision, device))
            )
            count += rows.count_loss_tokens(indices)
    model.train(was_training)
    return total / max(1, count)


def _preference_loss(
    model: nn.Module,
    rows: TokenRows,
    preference: Objective,
    micro_batch_rows: int,
    precision: Precision,
    device: torch.device,
) -> float:
    def micro_batches() -> Iterator[tuple[int, MarkedRows]]:
        for at in range(0, len(rows), micro_batch_rows):
            indices = np.arange(at, min(at + micro_batch_rows, len(rows)))
            read = (*rows.read(indices), rows.marks(indices))
            yield at, marked_rows([torch.from_numpy(values).to(device) for values in read])

    preference.begin(model, micro_batches(), batch_rows=len(rows), precision=precision)
    return sum(float(preference.summed_loss(model, each, precision=precision)) for _, each in micro_batches())
