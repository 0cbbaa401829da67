"""Laws of the order of rows: a function of seed, step and slot, fair in every prefix."""

from __future__ import annotations

import pytest

from aifactory.train.sampler import Sampler


def draws(number, *, batch_rows=1, sizes=(7,), shares=(1.0,), seed=3):
    sampler = Sampler(set_sizes=sizes, shares=shares, batch_rows=batch_rows, seed=seed)
    return [slot for step in range(number // batch_rows) for slot in sampler.batch(step)]


def test_the_order_is_that_of_the_slots_whatever_the_batch():
    one = draws(120, sizes=(7, 50), shares=(0.3, 0.7))

    assert draws(120, sizes=(7, 50), shares=(0.3, 0.7), batch_rows=8) == one
    assert draws(120, sizes=(7, 50), shares=(0.3, 0.7), batch_rows=120) == one


def test_any_step_can_be_asked_for_first():
    options = {"set_sizes": (7, 50), "shares": (0.3, 0.7), "batch_rows": 6, "seed": 1}
    sampler = Sampler(**options)
    in_order = [sampler.batch(step) for step in range(40)]

    assert [Sampler(**options).batch(step) for step in reversed(range(40))] == in_order[::-1]


def test_every_row_comes_once_in_every_epoch():
    rows = [slot.row for slot in draws(5 * 13, sizes=(13,))]
    epochs = [rows[i : i + 13] for i in range(0, len(rows), 13)]

    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_every_row_of_every_set_comes_once_in_every_epoch_of_it():
    mixed = draws(3000, sizes=(13, 40), shares=(0.25, 0.75))
    for row_set, size in enumerate((13, 40)):
        rows = [slot.row for slot in mixed if slot.row_set == row_set]
        for start in range(0, len(rows) - size, size):
            assert sorted(rows[start : start + size]) == list(range(size))


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (1 / 3, 2 / 3), (0.123, 0.877), (3, 1), (0.2, 0.3, 0.5)])
def test_the_shares_are_held_in_every_prefix(shares):
    found = draws(3000, sizes=(10,) * len(shares), shares=shares)
    given = [0] * len(shares)
    for number, slot in enumerate(found, start=1):
        given[slot.row_set] += 1
        for row_set, share in enumerate(shares):
            assert abs(given[row_set] - number * share / sum(shares)) <= 1 + number / 1000


def test_the_seed_changes_the_order():
    assert draws(50, sizes=(50,), seed=1) != draws(50, sizes=(50,), seed=2)


@pytest.mark.parametrize("sizes", [(), (0,), (3, 0), (3,)])
def test_an_empty_set_is_refused(sizes):
    with pytest.raises(ValueError, match="non-empty"):
        Sampler(set_sizes=sizes, shares=(0.5, 0.5), batch_rows=1, seed=0)
