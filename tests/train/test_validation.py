"""Laws of what is measured on held-out rows: it changes no weights, and what it decides depends on the recipe and the data."""

from __future__ import annotations

import json
import multiprocessing
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aifactory.config import EarlyStopping
from aifactory.engine.load import load_model
from aifactory.text.shards import TokenRows
from aifactory.train.base import model_from_scratch
from aifactory.train.checkpoint import Checkpoints
from aifactory.train.step import make_optimizer
from aifactory.train.validation import Holdout, Schedule, best_of, holdout_loss, over_at
from aifactory.train.work import due, holdout_losses
from aifactory.train.worker import validate_committed


def test_a_run_is_over_when_so_many_losses_in_a_row_are_no_better():
    stopping = EarlyStopping(patience=2, min_delta=0.1)

    assert not over_at({}, stopping)
    assert not over_at({2: 3.0, 4: 2.95}, stopping)
    assert over_at({2: 3.0, 4: 2.95, 6: 2.91}, stopping)  # less than the margin below the best is no better
    assert not over_at({2: 3.0, 4: 2.95, 6: 2.85}, stopping)
    assert over_at({6: 3.3, 2: 3.0, 4: 2.5, 8: 3.2}, stopping)  # by their steps, however they come


def test_the_best_is_the_lowest_and_the_earliest_of_equals():
    assert best_of({4: 1.5, 2: 1.5, 6: 2.0}) == 2
    assert best_of({}) is None


def test_every_so_many_steps_are_due_and_the_last():
    schedule = Schedule(every_steps=4, max_steps=10)

    assert [step for step in range(11) if schedule.is_due(step)] == [4, 8, 10]
    assert schedule.before(10) == [4, 8]
    assert schedule.before(8) == [4]


HELD_OUT = {"validate_every_steps": 2}
STOPPING = {"every_steps": 2, "patience": 2, "min_delta": 0.5}
"""A margin that a small model can't keep up with for long."""


@pytest.fixture(scope="module")
def held_out(runs):
    return {**HELD_OUT, "held_out": runs.row_sets[1].shards}


def test_validation_changes_no_weights_and_is_counted(runs, uninterrupted, held_out):
    task = runs.work("validated", changes=held_out)
    runs.run(task)
    losses = runs.figures(task)["holdout_loss"]

    assert runs.files(task) == runs.files(uninterrupted)
    assert [int(step) for step in losses] == [2, 4, 6, 8, 10]
    assert losses["10"] < losses["2"]
    model = load_model(runs.folder(task), device="cpu", dtype=torch.float32)
    rows = TokenRows(Path(runs.storage.path("tokens", "a")), runs.row_sets[1].shards.names)
    last = holdout_loss(model, rows, micro_batch_rows=2, precision="fp32", device=torch.device("cpu"))
    assert losses["10"] == last


def test_the_best_checkpoint_is_kept_beside_the_newest(runs, uninterrupted):
    model = model_from_scratch(uninterrupted.architecture, vocab_size=300, end_id=0, row_len=32, seed=1)
    optimizer = make_optimizer(model, uninterrupted.recipe)
    losses = {2: 2.0, 4: 1.0, 6: 3.0, 8: 1.5}
    with Checkpoints(runs.storage, "runs", "best-kept", keep=1) as checkpoints:
        schedule = Schedule(every_steps=2, max_steps=10)
        holdout = Holdout(schedule, checkpoints, stopping=None, validate=losses.__getitem__)
        checkpoints.spared = holdout.spared
        for step in range(1, 10):
            checkpoints.save(step, model, optimizer)
            holdout.is_over(step)

    assert checkpoints.committed() == [4, 9]


@pytest.fixture(scope="module")
def early(runs, held_out):
    task = runs.work("early", max_steps=40, early_stopping=STOPPING, changes=held_out)
    runs.run(task)
    return task


def test_a_run_that_gets_no_better_ends_early_with_the_best_weights(runs, early):
    figures = runs.figures(early)
    losses = {int(step): loss for step, loss in figures["holdout_loss"].items()}
    decided = max(losses) - 2

    assert figures["steps"] == max(losses) < 40
    assert over_at({s: loss for s, loss in losses.items() if s <= decided}, EarlyStopping(**STOPPING))
    assert not over_at({s: loss for s, loss in losses.items() if s < decided}, EarlyStopping(**STOPPING))
    assert figures["best_step"] == best_of(losses)
    model = load_model(runs.folder(early), device="cpu", dtype=torch.float32)
    rows = TokenRows(Path(runs.storage.path("tokens", "a")), runs.row_sets[1].shards.names)
    own = holdout_loss(model, rows, micro_batch_rows=2, precision="fp32", device=torch.device("cpu"))
    assert own == min(losses.values())


def test_a_run_that_was_stopped_again_and_again_ends_early_at_the_same_step(runs, stopped, early, held_out):
    end = runs.figures(early)["steps"]
    task = runs.work("early-again", max_steps=40, early_stopping=STOPPING, changes=held_out)
    for stop_after in (1, end // 2, end - 1, end):
        with pytest.raises(stopped):
            runs.run(task, stop_after=stop_after)
    runs.run(task)

    assert runs.files(task) == runs.files(early)
    assert runs.figures(task)["holdout_loss"] == runs.figures(early)["holdout_loss"]


def test_somebody_else_may_validate_and_be_late_with_the_same_result(runs, early, held_out):
    task = runs.work("early-late", max_steps=40, early_stopping=STOPPING, changes=held_out)
    task = replace(task, validates_itself=False)
    ended = threading.Event()

    def follow(other):
        while not ended.wait(0.3):
            for step in due(task)[:1]:
                other.submit(validate_committed, task, step).result()

    # A process of its own, as a task is: the seed that a model is made by is the whole process's, as is that of dropout.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
        validator = threading.Thread(target=follow, args=(other,))
        validator.start()
        runs.run(task)
        ended.set()
        validator.join()

    assert runs.files(task) == runs.files(early)
    assert holdout_losses(task) == runs.figures(early)["holdout_loss"]


def test_a_step_is_decided_by_what_was_found_before_it_alone(runs, tmp_path):
    checkpoints = Checkpoints(runs.storage, "runs", "decided")
    for step, loss in ((2, 3.0), (4, 3.0), (6, 3.0)):
        text = json.dumps({"step": step, "loss": loss})
        runs.storage.write_bytes(text.encode(), "runs", "decided", f"validated-{step:08d}.json")
    schedule = Schedule(every_steps=2, max_steps=100)
    holdout = Holdout(schedule, checkpoints, stopping=EarlyStopping(patience=2), validate=None)

    # Of 6, which was found too, nothing is known at step 6: whether it is depends on how long it took.
    assert [holdout.is_over(step) for step in (2, 4, 5, 6, 8)] == [False, False, False, False, True]


def test_a_checkpoint_that_is_gone_is_not_validated(runs, held_out):
    task = runs.work("gone", changes=held_out)
    validate_committed(task, 4)

    assert holdout_losses(task) == {}
