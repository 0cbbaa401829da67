"""The training loop: one place where time flows. Pure torch: it runs alone, under torchrun, or under Ray Train.

A run is described by `TrainingRun`, a plain value. `train_model` continues from the newest committed checkpoint, so
being started again is the same as never having been stopped.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from aifactory.errors import TrainingError
from aifactory.text.shards import TokenRows
from aifactory.train.checkpoint import Checkpoints
from aifactory.train.sampler import Sampler
from aifactory.train.step import (
    dropout_seed,
    learning_rate,
    make_optimizer,
    resolve_precision,
    summed_loss,
    update,
)

if TYPE_CHECKING:
    from aifactory.config import Train

_REPORT_EVERY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """What one worker needs to take its part in a run."""

    recipe: Train
    rows: tuple[TokenRows, ...]
    shares: tuple[float, ...]
    """Share of each row set in a batch."""
    micro_batch_rows: int
    checkpoint_every_steps: int
    checkpoints: Checkpoints
    parallel: str = "ddp"
    """How several workers share the model: a key of `_PARALLEL`."""
    progress_file: Path | None = None
    """Where rank 0 appends a line of JSON about every second, for whoever watches."""
    after_step: Callable[[int], None] | None = None
    """Called with the number of steps done; tests stop a run with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFigures:
    """What a run counted. Times and rates are those of this start, not of the steps before a resume."""

    steps: int
    resumed_from: int
    tokens: int
    seconds: float
    tokens_per_s: float
    data_wait_share: float
    final_loss: float
    """Mean over the last tenth of all steps, nats per token."""
    precision: str


def train_model(
    model: nn.Module, run: TrainingRun, *, device: torch.device, rank: int = 0, world_size: int = 1
) -> TrainingFigures:
    """Train `model` in place.

    Raises   TrainingError if a gradient is not finite: what was committed before is intact.
    """
    recipe = run.recipe
    if recipe.global_batch_rows < world_size:
        raise TrainingError(
            f"expected at least one row a worker in train.global_batch_rows, found {recipe.global_batch_rows} rows for "
            f"{world_size} workers; raise it or lower runtime.workers."
        )
    precision = resolve_precision(recipe.precision, device)
    model.to(device).train()
    optimizer = make_optimizer(model, recipe)
    first_step, restored = run.checkpoints.restore(model, optimizer)
    losses = deque(restored, maxlen=max(1, recipe.max_steps // 10))
    wrapped = _PARALLEL[run.parallel](model, device) if world_size > 1 else model
    sampler = Sampler(
        set_sizes=[len(rows) for rows in run.rows],
        shares=run.shares,
        batch_rows=recipe.global_batch_rows,
        seed=recipe.seed,
    )
    mine = _share_of_batch(recipe.global_batch_rows, rank, world_size)
    row_len = run.rows[0].row_len
    started = reported = time.perf_counter()
    waited = 0.0

    for step in range(first_step, recipe.max_steps):
        asked = time.perf_counter()
        # Every worker knows the number of tokens in the whole batch, so the mean needs no exchange of its own.
        batch, num_tokens = _read_batch(run, sampler, step, mine)
        waited += time.perf_counter() - asked
        micro_batches = [range(at, min(at + run.micro_batch_rows, mine.stop)) for at in mine[:: run.micro_batch_rows]]
        own_loss = torch.zeros((), device=device)
        for micro in micro_batches:
            torch.manual_seed(dropout_seed(recipe.seed, step, micro.start))
            here = slice(micro.start - mine.start, micro.stop - mine.start)
            tensors = (torch.from_numpy(values[here]).to(device) for values in batch)
            is_last = micro is micro_batches[-1]
            with nullcontext() if is_last or not isinstance(wrapped, DistributedDataParallel) else wrapped.no_sync():
                loss = summed_loss(wrapped, *tensors, precision=precision) / num_tokens
                # DDP divides the summed gradients by the number of workers; this takes that back.
                (loss * world_size).backward()  # type: ignore[no-untyped-call]
            own_loss += loss.detach()
        norm = update(model, optimizer, rate=learning_rate(recipe, step), grad_clip=recipe.grad_clip)
        if not np.isfinite(norm):
            raise TrainingError(
                f"expected a finite gradient, found {norm} at step {step}; the checkpoints up to step "
                f"{max(run.checkpoints.committed(), default=0)} are intact. Lower train.learning_rate."
            )
        if world_size > 1:
            distributed.all_reduce(own_loss)
        losses.append(float(own_loss))
        done = step + 1
        if rank == 0:
            if done % run.checkpoint_every_steps == 0 and done < recipe.max_steps:
                run.checkpoints.save(done, model, optimizer, losses=losses)
            now = time.perf_counter()
            if run.progress_file and (now - reported >= _REPORT_EVERY_S or done == recipe.max_steps):
                reported = now
                rate = (done - first_step) * recipe.global_batch_rows * row_len / (now - started)
                _append(run.progress_file, {"step": done, "loss": losses[-1], "tokens_per_s": rate})
        if run.after_step is not None:
            run.after_step(done)

    seconds = time.perf_counter() - started
    tokens = (recipe.max_steps - first_step) * recipe.global_batch_rows * row_len
    return TrainingFigures(
        steps=recipe.max_steps,
        resumed_from=first_step,
        tokens=recipe.max_steps * recipe.global_batch_rows * row_len,
        seconds=seconds,
        tokens_per_s=tokens / seconds if tokens else 0.0,
        data_wait_share=waited / seconds if tokens else 0.0,
        final_loss=float(np.mean(losses)),
        precision=precision,
    )


def _ddp(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # Rotary frequencies are the only buffers and never change.
        broadcast_buffers=False,
    )


_PARALLEL: Mapping[str, Callable[[nn.Module, torch.device], DistributedDataParallel]] = {"ddp": _ddp}
"""How several workers share a model, by the word of `runtime.parallel`."""


def _share_of_batch(batch_rows: int, rank: int, world_size: int) -> range:
    """The slots of one worker: contiguous, and as many as the others' or one more."""
    return range(batch_rows * rank // world_size, batch_rows * (rank + 1) // world_size)


def _read_batch(run: TrainingRun, sampler: Sampler, step: int, mine: range) -> tuple[list[np.ndarray], int]:
    """ids_BT, positions_BT and loss_mask_BT of the slots that are `mine`, and the tokens with loss in all slots."""
    slots = sampler.batch(step)
    row_len = run.rows[0].row_len
    batch = [np.empty((len(mine), row_len), np.int64) for _ in range(3)]
    num_tokens = 0
    for row_set, rows in enumerate(run.rows):
        num_tokens += rows.count_loss_tokens(np.array([s.row for s in slots if s.row_set == row_set], np.int64))
        places = [i for i, slot in enumerate(slots[mine.start : mine.stop]) if slot.row_set == row_set]
        if places:
            found = rows.read(np.array([slots[mine.start + i].row for i in places]))
            for values, read in zip(batch, found, strict=True):
                values[places] = read
    return batch, max(1, num_tokens)


def _append(file: Path, values: dict[str, float]) -> None:
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(values) + "\n")
