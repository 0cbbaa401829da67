"""SIGKILL at every write to the books, and at random moments, of a loop under traffic: as if nobody had been killed."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from crash_loops import (
    PROCESSES,
    CrashPoints,
    End,
    Loop,
    Seen,
    assert_nothing_lost_or_doubled,
    copy_of,
    end_of,
    is_closed,
    loop_values,
    running,
    taught,
    traffic,
)
from drivers import Driver

KILLS_OF_A_LOOP = 10
SWAPPED = "replica: insert journal swapped"


@dataclass(frozen=True, kw_only=True)
class Whole:
    """What nobody has killed."""

    template: Path
    """Of every loop: a release, and corrections that nobody has looked at."""
    first: dict[str, int]
    """What the driver of the first cycle writes, by point."""
    retrain: dict[str, int]
    """What the loop writes from there on."""
    before: End
    """Of the template."""
    end: End


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    template = folder / "template"
    of_first, of_retrain = CrashPoints(folder / "first"), CrashPoints(folder / "retrain")
    taught(template, of_first)
    with looked_at(template) as loop:
        before = end_of(loop.books)
    assert [state for _, _, state, *_ in before.cycles] == ["promoted"]
    end = closed(template, folder / "loop", of_retrain)
    assert [state for _, _, state, *_ in end.cycles] == ["promoted", "promoted"]
    first = {point: n for point, n in of_first.written().items() if point.startswith("driver")}
    return Whole(template=template, first=first, retrain=dict(of_retrain.written()), before=before, end=end)


@contextmanager
def looked_at(folder: Path) -> Iterator[Driver]:
    """The books of a loop that nobody runs."""
    driver = Driver(folder, loop_values(folder, port=0))
    yield driver
    driver.books.close()


def closed(template: Path, folder: Path, points: CrashPoints) -> End:
    """A copy of the loop, turned under traffic until it has closed."""
    values = copy_of(template, folder)
    with running(folder, values, environment=points.environment) as loop, traffic(loop.url, values["name"]) as seen:
        loop.wait_for(lambda: is_closed(loop.books, seen))
    return looked_over(folder, seen)


def looked_over(folder: Path, seen: Seen) -> End:
    with looked_at(folder) as driver:
        assert_nothing_lost_or_doubled(driver.books, seen)
        print(
            f"\n{len(seen.answers)} answers, {len(seen.acknowledged)} feedbacks acknowledged, {seen.again} sent again: none "
            "lost, none doubled"
        )
        return end_of(driver.books)


def through(whole: Whole, folder: Path, retrain: Mapping[str, int | list[str]]) -> None:
    """A loop that is killed at these writes comes to the same end, and every one of the kills was made."""
    points = CrashPoints(folder / "points", retrain)
    end = closed(whole.template, folder / "loop", points)
    told(points)
    assert points.killed() == points.wanted()
    assert end == whole.end


def told(points: CrashPoints) -> None:
    """Print every write and how often it was killed there."""
    killed = points.killed()
    for point in sorted(points.plan):
        print(f"{killed[point, 'before']:>4} times before and {killed[point, 'after']} after  {point}")
    print(f"{len(points.plan)} points, {killed.total()} kills by SIGKILL")


def every_write(whole: Whole) -> dict[str, int | list[str]]:
    """All that the loop writes, each as often as it does; of what each request writes, and each failed attempt, one."""
    by_request = {point: 1 for point in whole.retrain if point.startswith("replica: insert")}
    # Killed before it says that it has swapped, a replica begins anew on the release and has swapped nothing.
    return {**whole.retrain, **by_request, "evaluator: insert journal attempt_failed": 1, SWAPPED: ["before"]}


@pytest.mark.slow
def test_a_loop_killed_as_its_retrain_begins_and_as_it_is_promoted_ends_as_if_it_had_never_been(
    tmp_path: Path, whole: Whole
) -> None:
    some = ("journal cycle_begun", "publish model", "journal promoted")
    plan = {point: n for point, n in whole.retrain.items() if any(each in point for each in some)}
    assert len(plan) == len(some)
    assert SWAPPED in whole.retrain

    through(whole, tmp_path, {**plan, SWAPPED: ["after"]})


@pytest.mark.faults
def test_a_loop_killed_at_every_write_of_its_retrain_ends_as_if_it_had_never_been(tmp_path: Path, whole: Whole) -> None:
    plan = every_write(whole)
    assert {point.partition(":")[0] for point in plan} >= {"evaluator", "cycle", "replica"}

    through(whole, tmp_path, plan)


@pytest.mark.faults
def test_a_driver_killed_at_every_write_of_a_first_cycle_ends_as_if_it_had_never_been(
    tmp_path: Path, whole: Whole
) -> None:
    points = CrashPoints(tmp_path / "points", whole.first)
    folder = tmp_path / "loop"
    driver = Driver(folder, loop_values(folder, port=0), verb="promote", environment=points.environment)

    kills = driver.finish_through_kills()

    told(points)
    assert points.killed() == points.wanted()
    assert kills == points.wanted().total()
    end = end_of(driver.books)
    driver.books.close()
    assert (end.cycles, end.releases, end.events) == (whole.before.cycles, whole.before.releases, whole.before.events)
    assert end.digests == whole.before.digests


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(5))
def test_a_loop_killed_at_ten_random_moments_ends_as_if_it_had_never_been(
    seed: int, tmp_path: Path, whole: Whole
) -> None:
    """Five times ten are fifty; each takes any process of the loop, its driver with all that it had started too."""
    chance, killed = random.Random(seed), []
    values = copy_of(whole.template, tmp_path / "loop")
    with running(tmp_path / "loop", values) as loop, traffic(loop.url, values["name"]) as seen:
        while len(killed) < KILLS_OF_A_LOOP:
            until(loop, chance.uniform(0.2, 6))
            state = loop.books.journal.cycles()[-1].state
            # The driver takes the most time to start again; what trains and turns lives for seconds only.
            of = chance.choices(["driver", *PROCESSES], weights=[1, 2, 3, 3, 1])[0]
            if loop.kill(of, chance):
                killed.append((of, state))
        loop.wait_for(lambda: is_closed(loop.books, seen))

    print(f"\nseed {seed}: killed, each beside the state of the newest cycle: {killed}")
    assert looked_over(tmp_path / "loop", seen) == whole.end


def until(loop: Loop, seconds: float) -> None:
    """A while in which the driver is seen to."""
    due = time.monotonic() + seconds
    loop.wait_for(lambda: time.monotonic() >= due)
