"""Laws of admission: no more run than may, keys and users come in turn, nobody fills the queue for all, none is lost."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from aifactory.errors import CapacityError
from aifactory.serve.admission import Admission

ANN, BOB = ("key", "ann"), ("key", "bob")


def in_loop(function):
    """The test runs in an event loop."""

    def test():
        async def run():
            await function()

        asyncio.run(run())

    test.__name__ = function.__name__
    test.__doc__ = function.__doc__
    return test


async def order_of(admission, entries, running):
    """Names of waiting entries in the order in which they are let in, one ending after another."""
    order = []
    waiting = dict(entries)
    while waiting:
        running.pop(0).leave()
        for name, entry in list(waiting.items()):
            if entry.admitted.done():
                order.append(name)
                running.append(waiting.pop(name))
    return order


@in_loop
async def test_one_who_sends_a_hundred_does_not_hold_up_another():
    admission = Admission(max_running=1, max_waiting=200)
    running = [admission.enter(ANN, 1)]
    entries = [(f"ann{i}", admission.enter(ANN, 1)) for i in range(100)]
    entries += [(f"bob{i}", admission.enter(BOB, 1)) for i in range(3)]

    order = await order_of(admission, entries, running)

    assert [order.index(f"bob{i}") for i in range(3)] == [1, 3, 5]
    assert [name for name in order if name.startswith("ann")] == [f"ann{i}" for i in range(100)]


@in_loop
async def test_a_key_gains_nothing_by_many_users():
    admission = Admission(max_running=1, max_waiting=200)
    running = [admission.enter(("many", ""), 1)]
    entries = [(f"many{i}", admission.enter(("many", str(i)), 1)) for i in range(20)]
    entries += [(f"one{i}", admission.enter(("one", ""), 1)) for i in range(10)]

    order = await order_of(admission, entries, running)

    assert Counter(name[:3] for name in order[:20]) == {"man": 10, "one": 10}


@in_loop
async def test_n_answers_are_n_turns():
    admission = Admission(max_running=1, max_waiting=200)
    running = [admission.enter(("first", ""), 1)]
    entries = [(f"ann{i}", admission.enter(ANN, 5)) for i in range(2)]
    entries += [(f"bob{i}", admission.enter(BOB, 1)) for i in range(6)]

    order = await order_of(admission, entries, running)

    assert order == ["ann0", "bob0", "bob1", "bob2", "bob3", "bob4", "ann1", "bob5"]


@in_loop
async def test_whoever_comes_late_has_saved_no_turns_up():
    admission = Admission(max_running=1, max_waiting=200)
    running = [admission.enter(ANN, 1)]
    entries = [(f"ann{i}", admission.enter(ANN, 1)) for i in range(30)]
    order = []
    for _ in range(20):
        running.pop(0).leave()
        name, entry = next((n, e) for n, e in entries if e.admitted.done() and n not in order)
        order.append(name)
        running.append(entry)
    late = [(f"bob{i}", admission.enter(BOB, 1)) for i in range(10)]

    rest = [(n, e) for n, e in entries if n not in order]
    after = await order_of(admission, rest + late, running)

    assert Counter(name[:3] for name in after[:10]) == {"ann": 5, "bob": 5}


@in_loop
async def test_a_full_queue_refuses_the_one_with_the_longest_line():
    admission = Admission(max_running=1, max_waiting=4)
    admission.enter(ANN, 1)
    anns = [admission.enter(ANN, 1) for _ in range(4)]

    with pytest.raises(CapacityError):
        admission.enter(ANN, 1)
    bob = admission.enter(BOB, 1)
    carl = admission.enter(("other", ""), 1)

    # The newest of the longest line have made room.
    assert [entry.waits for entry in anns] == [True, True, False, False]
    for entry in anns[2:]:
        with pytest.raises(CapacityError):
            await entry.admitted
    assert bob.waits
    assert carl.waits
    with pytest.raises(CapacityError):
        admission.enter(BOB, 2)


@in_loop
async def test_work_in_the_background_runs_when_nobody_waits_and_takes_half():
    admission = Admission(max_running=4, max_waiting=100)
    behind = [admission.enter(("batch", ""), 1, behind=True) for _ in range(6)]
    assert [entry.waits for entry in behind] == [False, False, True, True, True, True]

    front = [admission.enter(ANN, 1) for _ in range(5)]
    assert [entry.waits for entry in front] == [False, False, True, True, True]
    behind[0].leave()
    assert [entry.waits for entry in front] == [False, False, False, True, True]
    assert behind[2].waits
    for entry in front:
        entry.leave()
    assert [entry.waits for entry in behind[2:]] == [False, True, True, True]


@in_loop
async def test_one_of_more_answers_than_may_run_runs_alone():
    admission = Admission(max_running=2, max_waiting=10)
    large = admission.enter(ANN, 8)
    other = admission.enter(BOB, 1)

    assert not large.waits
    large.free(6)
    assert other.waits
    large.free(1)
    assert not other.waits


@in_loop
async def test_none_is_lost_and_none_too_many_run_in_any_order_of_events():
    chance = random.Random(7)
    admission = Admission(max_running=3, max_waiting=12)
    entries, refused = [], 0
    for _ in range(3000):
        if chance.random() < 0.45:
            path = (chance.choice("ab"), chance.choice("xyz"))
            try:
                entries.append(admission.enter(path, chance.randint(1, 3), behind=chance.random() < 0.2))
            except CapacityError:
                refused += 1
        elif entries:
            entry = chance.choice(entries)
            if chance.random() < 0.5:
                entry.free()
            else:
                entry.leave(CapacityError("gone"))
        entries = [entry for entry in entries if entry.waits or entry.running]
        running = [entry.running for entry in entries]
        assert sum(running) - max(running, default=0) < 3
        assert admission.waiting == sum(entry.cost for entry in entries if entry.waits and not entry.behind) <= 12
        if admission.waiting:
            assert sum(running) >= 3
    assert refused
    while entries:
        entries[0].leave(CapacityError("gone"))
        entries = [entry for entry in entries if entry.waits or entry.running]
    assert not admission.enter(ANN, 1).waits
