"""The training loop: one place where time flows. Pure torch: it runs alone, under torchrun, or under Ray Train.

A run is described by `TrainingRun`, a plain value. `train_model` continues from the newest committed checkpoint, so
being started again is the same as never having been stopped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from aifactory.errors import TrainingError
from aifactory.observe import metrics
from aifactory.observe.events import log_event
from aifactory.observe.usage import usage
from aifactory.text.shards import TokenRows
from aifactory.train.checkpoint import Checkpoints, State, restore, whole_state
from aifactory.train.execution import Execution
from aifactory.train.float8 import convert_to_float8
from aifactory.train.guard import Skipped, Skips, objection
from aifactory.train.lora import adapters_off
from aifactory.train.objectives import Objective, marked_rows, objective_of
from aifactory.train.parallel import share
from aifactory.train.preparation import prepare
from aifactory.train.room import Room
from aifactory.train.run_log import RunLog
from aifactory.train.sampler import Sampler
from aifactory.train.schedule import learning_rate
from aifactory.train.step import (
    clip_gradients,
    dropout_seed,
    make_optimizer,
    resolve_precision,
    summed_loss,
    update,
)

if TYPE_CHECKING:
    from aifactory.config import Train
    from aifactory.train.validation import Holdout


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
    """How several workers share the model: `ddp` or `fsdp`."""
    shard_workers: int | None = None
    """Of `fsdp`: so many workers hold one copy of the model between them. Default: all."""
    log: RunLog | None = None
    """Of rank 0: where it says how far it is, for whoever watches."""
    execution: Execution = field(default_factory=Execution)
    """How a step is computed."""
    holdout: Holdout | None = None
    """What is asked of held-out rows on the way: whether the run has gone far enough, and which step was the best."""
    alive: Callable[[], None] | None = None
    """Called before each step: who hears nothing for too long takes the worker for hung."""
    after_step: Callable[[int], None] | None = None
    """Called with the number of steps done; tests stop a run with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFigures:
    """What a run counted. Times and rates are those of this start, not of the steps before a resume."""

    steps: int
    """Steps taken: fewer than asked for where the run was stopped early."""
    best_step: int
    """Whose weights the model has: the last, or with early stopping that of the lowest loss on held-out rows."""
    resumed_from: int
    workers: int
    tokens: int
    seconds: float
    tokens_per_s: float
    data_wait_share: float
    checkpoint_stall_share: float
    """Share of the time in which the steps waited for checkpoints."""
    cpu_share: float
    """CPU time of rank 0 over wall time and threads."""
    starved_share: float
    """Time in which its threads were ready and had no CPU, over the same."""
    final_loss: float
    """Mean over the last tenth of the steps, nats per token."""
    precision: str
    micro_batch_rows: int
    """Rows of one forward pass; fewer than asked for where those did not fit into memory."""
    execution: Execution
    """How the steps were computed, with what was chosen where `auto` was asked for."""
    skipped: tuple[Skipped, ...]
    """The batches that were left out, and why."""


def train_model(
    model: nn.Module, run: TrainingRun, *, device: torch.device, rank: int = 0, world_size: int = 1
) -> tuple[TrainingFigures, State]:
    """Train `model` in place. Returns also the weights, whole, on the CPU; on other ranks than 0 they may be empty.

    Raises   NoRoomError if a micro-batch does not fit into memory: begun again, the run takes smaller ones;
             TrainingError if more batches than `train.guards` allows had to be left out: what was committed is intact.
    """
    recipe = run.recipe
    room = Room(run.checkpoints.storage, *run.checkpoints.folder)
    micro_batch_rows = recipe.micro_batch_rows or room.rows(run.micro_batch_rows)
    _require_shares(recipe, world_size, run.parallel)
    _require_objective(run)
    precision = resolve_precision(recipe.precision, device)
    model.to(device).train()
    if recipe.precision == "fp8":
        convert_to_float8(model, device)
    # Preferences are told by the log-probabilities of single answers, so they need logits.
    wanted = replace(run.execution, loss="plain") if recipe.is_preference else run.execution
    execution = prepare(model, wanted, device, precision)
    # Before anything is restored: the model as it starts.
    preference = objective_of(recipe, model, partial(adapters_off, model) if recipe.lora else None)
    shared = share(
        run.parallel,
        model,
        device,
        precision,
        world_size=world_size,
        shard_workers=run.shard_workers,
        gradients=run.execution.gradients,
        num_micro_batches=recipe.global_batch_rows // micro_batch_rows if recipe.is_across_workers else None,
    )
    if preference:
        preference.share(shared.frozen)
    optimizer = make_optimizer(model, recipe)
    first_step, restored = restore(run.checkpoints, model, optimizer)
    last_tenth = max(1, recipe.max_steps // 10)
    losses = deque(restored, maxlen=max(last_tenth, recipe.guards.spike_window))
    skips = Skips(run.checkpoints.storage, *run.checkpoints.folder)
    sampler = Sampler(
        set_sizes=[len(rows) for rows in run.rows],
        shares=run.shares,
        batch_rows=recipe.global_batch_rows,
        seed=recipe.seed,
    )
    mine = _share_of_batch(recipe.global_batch_rows, rank, world_size)
    row_len = run.rows[0].row_len
    log = run.log if rank == 0 else None
    if log is not None:
        log.begin(model, recipe, device=device, precision=precision, workers=world_size, row_len=row_len, at=first_step)
    started, before = time.perf_counter(), usage()
    waited = 0.0

    step = first_step
    taken = 0
    while step < recipe.max_steps and not (run.holdout is not None and run.holdout.is_over(step)):
        if run.alive is not None:
            run.alive()
        run.checkpoints.require_written()
        asked = time.perf_counter()
        number = skips.batch(step)
        # Every worker knows the number of tokens in the whole batch, so the mean needs no exchange of its own.
        batch, num_tokens = _read_batch(run, sampler, number, mine, preference)
        waited += time.perf_counter() - asked
        micro_batches = [range(at, min(at + micro_batch_rows, mine.stop)) for at in mine[::micro_batch_rows]]
        if preference:
            with room.watched(len(micro_batches[0]), is_fixed=recipe.is_across_workers):
                preference.begin(
                    shared.forward,
                    ((each.start, marked_rows(_tensors(batch, each, mine, device))) for each in micro_batches),
                    batch_rows=recipe.global_batch_rows,
                    precision=shared.precision,
                )
        for micro in micro_batches:
            torch.manual_seed(dropout_seed(recipe.seed, step, micro.start))
            tensors = _tensors(batch, micro, mine, device)
            with room.watched(len(micro), is_fixed=recipe.is_across_workers):
                with shared.micro_batch(is_last=micro is micro_batches[-1]):
                    if preference:
                        loss = preference.summed_loss(shared.forward, marked_rows(tensors), precision=shared.precision)
                    else:
                        loss = summed_loss(shared.forward, *tensors, precision=shared.precision)
                    loss = loss / num_tokens
                    (loss * shared.scale).backward()  # type: ignore[no-untyped-call]
                shared.add(loss)
        loss_of_batch = shared.reduce()
        norm = clip_gradients(model, recipe.grad_clip)
        taken += 1
        if reason := objection(loss_of_batch, norm, list(losses), recipe.guards):
            optimizer.zero_grad(set_to_none=True)
            skips.add(Skipped(batch=number, step=step, reason=reason, rows=_rows_of(run, sampler, number)))
            if len(skips.skipped) > recipe.guards.max_skipped:
                raise TrainingError(
                    f"expected at most {recipe.guards.max_skipped} batches that can't be trained on (train.guards), found one "
                    f"more at step {step}: {reason}; the checkpoints up to step "
                    f"{max(run.checkpoints.committed(), default=0)} are intact. Lower train.learning_rate."
                )
            if rank == 0:
                skips.write()
            # Without a checkpoint the weights are those before this step, which was not taken.
            back, restored = restore(run.checkpoints, model, optimizer)
            if back:
                step, losses = back, deque(restored, maxlen=losses.maxlen)
                if log is not None:
                    log.back(step)
            log_event("skipped", batch=number, reason=reason, goes_on_at=step)
            if rank == 0:
                metrics.TRAIN_SKIPPED.add()
            continue
        losses.append(loss_of_batch)
        rate = learning_rate(recipe, step)
        update(optimizer, rate=rate)
        done = step + 1
        if log is not None:
            log.step(
                done,
                loss=loss_of_batch,
                norm=norm,
                rate=rate,
                waited_s=waited,
                stalled_s=run.checkpoints.stalled_s,
            )
        if done % run.checkpoint_every_steps == 0 or done == recipe.max_steps or _is_validated(run, done):
            if log is not None:
                log.keep()
            run.checkpoints.save(done, model, optimizer, losses=losses)
        if run.after_step is not None:
            run.after_step(done)
        step = done

    # Saving comes before all that is done with the weights.
    run.checkpoints.wait()
    seconds = time.perf_counter() - started
    used, threads = usage() - before, torch.get_num_threads()
    best_step = run.holdout.best(step) if run.holdout is not None else step
    if best_step != step:
        run.checkpoints.load(best_step, model)
    tokens = taken * recipe.global_batch_rows * row_len
    figures = TrainingFigures(
        steps=step,
        best_step=best_step,
        resumed_from=first_step,
        workers=world_size,
        tokens=step * recipe.global_batch_rows * row_len,
        seconds=seconds,
        tokens_per_s=tokens / seconds if tokens else 0.0,
        data_wait_share=waited / seconds if tokens else 0.0,
        checkpoint_stall_share=run.checkpoints.stalled_s / seconds if tokens else 0.0,
        cpu_share=used.cpu_s / seconds / threads if tokens else 0.0,
        starved_share=used.starved_s / seconds / threads if tokens else 0.0,
        final_loss=float(np.mean(list(losses)[-last_tenth:])),
        precision="fp8" if recipe.precision == "fp8" else precision,
        micro_batch_rows=micro_batch_rows,
        execution=execution,
        skipped=tuple(skips.skipped),
    )
    return figures, whole_state(model)


def _is_validated(run: TrainingRun, step: int) -> bool:
    return run.holdout is not None and run.holdout.is_due(step)


def _require_shares(recipe: Train, world_size: int, how: str) -> None:
    """Refuse a number of workers among whom the batch can't be divided."""
    rows = recipe.global_batch_rows
    if rows < world_size:
        raise TrainingError(
            f"expected at least one row a worker in train.global_batch_rows, found {rows} rows for {world_size} workers; "
            "raise it or lower runtime.workers."
        )
    if how == "fsdp" and rows % world_size:
        # All workers gather a block together, so each must come to it equally often.
        raise TrainingError(
            f"expected runtime.workers to divide train.global_batch_rows for runtime.parallel: fsdp, found {world_size} "
            f"and {rows}; change one of them."
        )


def _require_objective(run: TrainingRun) -> None:
    """Refuse rows that were packed for another objective."""
    for rows in run.rows:
        if rows.has_marks != run.recipe.is_preference:
            found = "rows of preferences" if rows.has_marks else "rows without preferences"
            raise TrainingError(
                f"expected token sets made for train.objective: {run.recipe.objective}, found {found}; tokenize again."
            )


def _share_of_batch(batch_rows: int, rank: int, world_size: int) -> range:
    """The slots of one worker: contiguous, and as many as the others' or one more."""
    return range(batch_rows * rank // world_size, batch_rows * (rank + 1) // world_size)


def _read_batch(
    run: TrainingRun, sampler: Sampler, step: int, mine: range, preference: Objective | None
) -> tuple[list[np.ndarray], int]:
    """ids_BT, positions_BT and loss_mask_BT of the slots that are `mine`, with `preference` also marks_BT; and over how many
    tokens with loss, or pairs or documents, of all slots the mean is."""
    slots = sampler.batch(step)
    row_len = run.rows[0].row_len
    batch = [np.empty((len(mine), row_len), np.int64) for _ in range(4 if preference else 3)]
    num_tokens = 0
    for row_set, rows in enumerate(run.rows):
        drawn = np.array([s.row for s in slots if s.row_set == row_set], np.int64)
        if preference:
            num_tokens += rows.count_documents(drawn) // preference.documents_of_one
        else:
            num_tokens += rows.count_loss_tokens(drawn)
        places = [i for i, slot in enumerate(slots[mine.start : mine.stop]) if slot.row_set == row_set]
        if places:
            indices = np.array([slots[mine.start + i].row for i in places])
            found = rows.read(indices)
            if preference:
                found = (*found, rows.marks(indices))
            for values, read in zip(batch, found, strict=True):
                values[places] = read
    return batch, max(1, num_tokens)


def _tensors(batch: list[np.ndarray], micro: range, mine: range, device: torch.device) -> list[torch.Tensor]:
    """What was read of the slots `mine`, for those of a micro-batch."""
    here = slice(micro.start - mine.start, micro.stop - mine.start)
    return [torch.from_numpy(values[here]).to(device) for values in batch]


def _rows_of(run: TrainingRun, sampler: Sampler, step: int) -> tuple[str, ...]:
    """The ids of the source rows in a batch."""
    found: dict[str, None] = {}
    for slot in sampler.batch(step):
        for document in run.rows[slot.row_set].documents(slot.row):
            found[str(document["row"])] = None
    return tuple(found)
