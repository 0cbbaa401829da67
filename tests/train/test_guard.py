"""Laws of what is not trained on."""

import math
import random

import pytest

from aifactory.config import Guards
from aifactory.records.storage import Storage
from aifactory.train.guard import Skipped, Skips, objection


def steady(seed, count=100):
    rng = random.Random(seed)
    return [3.0 * 0.999**i + rng.gauss(0, 0.05) for i in range(count)]


@pytest.mark.parametrize(("loss", "norm", "said"), [(math.nan, 1.0, "loss is nan"), (1.0, math.inf, "gradient is inf")])
def test_what_is_not_finite_is_never_taken(loss, norm, said):
    assert said in objection(loss, norm, [], Guards())


def test_by_default_no_finite_loss_is_a_spike():
    assert objection(1e30, 1e30, steady(1), Guards()) == ""


@pytest.mark.parametrize("seed", range(5))
def test_a_spike_is_seen_and_the_noise_of_a_run_is_not(seed):
    guards = Guards(spike_deviations=6, spike_window=64)
    losses = steady(seed, 400)

    assert not any(objection(losses[i], 1.0, losses[:i], guards) for i in range(400))
    assert "deviations above" in objection(losses[-1] + 1.0, 1.0, losses, guards)
    assert objection(losses[-1] - 1.0, 1.0, losses, guards) == ""


def test_there_is_no_spike_before_the_window_is_full():
    assert objection(100.0, 1.0, steady(1, 63), Guards(spike_deviations=6)) == ""
    assert objection(100.0, 1.0, steady(1, 64), Guards(spike_deviations=6)) != ""


def test_losses_that_stand_still_make_no_spike_of_a_tremor():
    guards = Guards(spike_deviations=5)

    assert objection(2.05, 1.0, [2.0] * 64, guards) == ""
    assert objection(2.2, 1.0, [2.0] * 64, guards) != ""


def test_batches_that_are_left_out_are_passed_over_and_no_other_is_read_twice(tmp_path):
    skips = Skips(Storage(str(tmp_path)), "run")
    for batch in (4, 2, 3, 9):
        skips.add(Skipped(batch=batch, step=batch, reason="", rows=()))

    assert [skips.batch(step) for step in range(8)] == [0, 1, 5, 6, 7, 8, 10, 11]


def test_what_was_left_out_is_known_to_the_next_start(tmp_path):
    storage = Storage(str(tmp_path))
    skips = Skips(storage, "run")
    skips.add(Skipped(batch=3, step=3, reason="the loss is nan", rows=("a", "b")))
    skips.write()

    assert Skips(storage, "run").skipped == skips.skipped
    assert Skips(storage, "other").skipped == []
