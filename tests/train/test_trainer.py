"""Laws of the rim: what Ray Train runs and validates is what the loop alone would have made."""

from __future__ import annotations

from pathlib import Path

import pytest
from benches import bench_of, training_of
from small_factories import small_config

from aifactory import Config, Factory
from aifactory.errors import TrainingError
from aifactory.text.shards import TokenRows
from aifactory.train.room import NoRoomError
from aifactory.train.trainer import _causes
from aifactory.workshop.runs import Run

STOPPING = {"every_steps": 10, "patience": 1, "min_delta": 5.0, "rows": 8}
"""A margin that no model keeps up with: at step 30 it is known that 20 was no better than 10."""


@pytest.mark.slow
def test_a_run_ends_early_by_what_tasks_beside_it_have_found(make_factory):
    model = make_factory(train={"early_stopping": STOPPING}).train()

    assert model.figures["steps"] == 30
    assert set(model.figures["holdout_loss"]) == {"10", "20", "30"}
    losses = {int(step): loss for step, loss in model.figures["holdout_loss"].items()}
    assert model.figures["best_step"] == min(losses, key=losses.__getitem__)
    assert 0 <= model.figures["checkpoint_stall_share"] < 1


@pytest.mark.slow
def test_validation_beside_a_run_changes_no_weights_and_is_in_the_record(make_factory, tmp_path):
    plain = make_factory(runtime={"storage": str(tmp_path / "plain")}).train()
    validated = make_factory(runtime={"validate_every_steps": 20, "validate_rows": 4}).train()

    assert validated.fingerprint == plain.fingerprint
    assert validated.digest == plain.digest
    assert "60" in validated.figures["holdout_loss"]


@pytest.mark.slow
def test_what_would_happen_again_is_not_tried_again(make_factory):
    factory = make_factory(
        train={"global_batch_rows": 1},
        runtime={"workers": 2, "cpus_per_worker": 0.4, "max_failures": 100},
    )

    # A hundred more tries would take half an hour.
    with pytest.raises(
        TrainingError, match=r"expected 2 workers to finish .* found: expected at least one row a worker"
    ):
        factory.train()


def test_what_the_runtime_says_reaches_the_workers(tmp_path):
    runtime = {"keep_checkpoints": 5, "hang_timeout_s": 7.0, "validate_every_steps": 11, "validate_rows": 2}
    with Factory(Config.model_validate(small_config(tmp_path, runtime=runtime))) as factory:
        task = Run(bench_of(factory), training_of(factory)).work()
        rows = TokenRows(Path(task.storage.path(*task.held_out.folder)), task.held_out.names)

    assert (task.keep_checkpoints, task.hang_timeout_s, task.validate_every_steps) == (5, 7.0, 11)
    assert len(rows) == 2


def test_what_was_raised_on_purpose_is_found_among_the_failures():
    class WrappedError(Exception):
        cause = NoRoomError("no room")

    on_purpose = TrainingError("on purpose")

    assert _causes({0: RuntimeError("connection reset"), 1: on_purpose, 2: None}) == [on_purpose]
    assert _causes({0: WrappedError()}) == [WrappedError.cause]
