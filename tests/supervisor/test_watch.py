"""Laws of the watch and of the backoff: what is lost is said once, what is back with its time, and restarts get rarer."""

from __future__ import annotations

from aifactory.supervisor.backoff import LONGEST_S, WELL_AFTER_S, Backoff
from aifactory.supervisor.watch import Notice, PartWatch, Wanted


def test_a_part_counts_from_the_first_time_that_it_is_whole() -> None:
    watch = PartWatch({"replica": Wanted(number=2)})

    assert watch.look(0, {}) == []
    assert watch.look(1, {"replica": {7}}) == []
    assert watch.lost == ["replica"]
    assert watch.look(2, {"replica": {7, 8}}) == []
    assert watch.lost == []


def test_a_loss_is_said_once_and_its_end_with_the_time_that_it_took() -> None:
    watch = PartWatch({"gcs": Wanted(number=1)})
    watch.look(0, {"gcs": {7}})

    assert watch.look(10, {"gcs": set()}) == [Notice(event="part_lost", part="gcs", pids=(7,))]
    assert watch.look(11, {}) == []
    assert watch.lost == ["gcs"]
    assert watch.look(14.5, {"gcs": {9}}) == [Notice(event="part_back", part="gcs", pids=(9,), seconds=4.5)]
    assert watch.lost == []


def test_what_was_lost_and_came_back_between_two_looks_is_said_too() -> None:
    watch = PartWatch({"gcs": Wanted(number=1)})
    watch.look(0, {"gcs": {7}})

    assert [notice.event for notice in watch.look(1, {"gcs": {8}})] == ["part_lost", "part_back"]


def test_replicas_that_were_taken_away_on_purpose_are_no_loss_until_there_are_too_few() -> None:
    watch = PartWatch({"replica": Wanted(number=1, may_shrink=True)})
    watch.look(0, {"replica": {7, 8, 9}})

    assert watch.look(1, {"replica": {7}}) == []
    assert [notice.event for notice in watch.look(2, {"replica": set()})] == ["part_lost"]


def test_what_dies_is_started_again_at_once_and_then_ever_more_rarely_up_to_a_minute() -> None:
    backoff, now, waits = Backoff(), 0.0, []
    for _ in range(12):
        wait = backoff.wait_s(now)
        waits.append(wait)
        now += wait
        assert backoff.wait_s(now) == 0
        backoff.started(now)

    assert waits[:4] == [0, 0, 0.5, 1]
    assert waits == sorted(waits)
    assert waits[-1] == LONGEST_S


def test_what_has_run_for_a_while_is_started_again_at_once() -> None:
    backoff = Backoff()
    for now in (0.0, 0.0, 0.5, 1.5):
        backoff.started(now)
    assert backoff.wait_s(1.6) > 0

    assert backoff.wait_s(1.5 + WELL_AFTER_S) == 0
    backoff.started(1.5 + WELL_AFTER_S)
    assert backoff.wait_s(2.0 + WELL_AFTER_S) == 0
