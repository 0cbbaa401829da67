"""Laws of a replica's meter: what was used between two entries is in one of them, and nobody's tokens are lost or doubled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

import pytest

from aifactory.observe.energy import Energy
from aifactory.records.feedback import Completion
from aifactory.serve.metering import ServingMeter


class Clock:
    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


class FakeMeter:
    """A watt, by the clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._begun = clock, clock()

    def read(self) -> Energy:
        seconds = self._clock() - self._begun
        return Energy(joules=seconds, source="rapl", seconds=seconds)


class FakeJournal:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.entered: list[dict[str, Any]] = []
        self.is_away = False

    def write(self, event: str, **values: Any) -> None:
        if self.is_away:
            raise OSError("away")
        self.entered.append({"event": event, **values})


class Replica:
    """A meter and all that it asks."""

    def __init__(self, every_s: float = 60.0) -> None:
        self.clock = Clock()
        self.journal = FakeJournal(self.clock)
        self.is_busy = False
        self.charged: list[Mapping[str, float]] = []
        self.meter = ServingMeter(
            self.journal,  # type: ignore[arg-type]
            lambda: FakeMeter(self.clock),  # type: ignore[arg-type,return-value]
            replica="a",
            every_s=every_s,
            is_busy=lambda: self.is_busy,
            prompt_token_share=0.5,
            charge=self.charged.append,
            clock=self.clock,
        )

    def passes(self, seconds: float, *, busy: bool) -> None:
        self.clock.at += seconds
        self.is_busy = busy
        self.meter.look()


def answer(key: str = "alice", release: int = 1, tokens: int = 5) -> Completion:
    return Completion(
        id="x",
        release=release,
        prompt="",
        answer="",
        request="{}",
        finish_reason="stop",
        prompt_tokens=2,
        answer_tokens=tokens,
        key_id=key,
    )


def test_busy_time_and_answers_are_told_with_the_joules() -> None:
    replica = Replica()
    replica.passes(3.0, busy=True)
    replica.passes(7.0, busy=False)
    replica.meter.count([answer(), answer(), answer("bob", 2)])
    replica.meter.tell()

    (entered,) = replica.journal.entered
    assert (entered["event"], entered["joules"], entered["joules_source"], entered["seconds"]) == (
        "metered",
        10,
        "rapl",
        10,
    )
    detail = entered["detail"]
    assert (detail["replica"], detail["begun"], detail["ended"], detail["busy_s"]) == ("a", 100, 110, 3)
    assert detail["answers"] == [
        {"release": 1, "key": "alice", "requests": 2, "prompt_tokens": 4, "answer_tokens": 10},
        {"release": 2, "key": "bob", "requests": 1, "prompt_tokens": 2, "answer_tokens": 5},
    ]


def test_joules_of_busy_time_are_charged_to_keys_by_their_tokens_once_they_are_entered() -> None:
    replica = Replica()
    replica.passes(4.0, busy=True)
    replica.passes(6.0, busy=False)
    replica.meter.count([answer(tokens=2), answer(release=2, tokens=2), answer("bob", tokens=5)])
    replica.journal.is_away = True
    with pytest.raises(OSError, match="away"):
        replica.meter.tell()
    assert replica.charged == []
    replica.journal.is_away = False
    replica.meter.tell()
    replica.passes(5.0, busy=True)
    replica.meter.tell()

    # 2 prompts of 2 at a half and 4 tokens, 1 prompt and 5: 6 and 6; where nobody was answered nobody is charged.
    assert replica.charged == [{"alice": 2.0, "bob": 2.0}]


def test_entries_follow_one_another_without_a_gap_and_nothing_is_told_twice() -> None:
    replica = Replica()
    for seconds in (1.0, 2.0, 4.0):
        replica.passes(seconds, busy=True)
        replica.meter.count([answer()])
        replica.meter.tell()

    details = [entered["detail"] for entered in replica.journal.entered]
    assert [entered["joules"] for entered in replica.journal.entered] == [1, 2, 4]
    assert [detail["busy_s"] for detail in details] == [1, 2, 4]
    assert [detail["begun"] for detail in details[1:]] == [detail["ended"] for detail in details[:-1]]
    assert [detail["answers"][0]["requests"] for detail in details] == [1, 1, 1]


def test_what_could_not_be_entered_is_entered_with_the_next() -> None:
    replica = Replica()
    replica.passes(3.0, busy=True)
    replica.meter.count([answer()])
    replica.journal.is_away = True
    with pytest.raises(OSError, match="away"):
        replica.meter.tell()
    replica.journal.is_away = False
    replica.passes(2.0, busy=False)
    replica.meter.count([answer()])
    replica.meter.tell()

    (entered,) = replica.journal.entered
    assert (entered["joules"], entered["detail"]["busy_s"], entered["detail"]["begun"]) == (5, 3, 100)
    assert entered["detail"]["answers"][0]["requests"] == 2


def test_answers_that_are_counted_while_it_is_told_are_in_one_entry_each() -> None:
    replica = Replica()

    def count() -> None:
        for _ in range(2000):
            replica.meter.count([answer()])

    threads = [threading.Thread(target=count) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        replica.meter.tell()
    replica.meter.tell()

    told = [given["requests"] for entered in replica.journal.entered for given in entered["detail"]["answers"]]
    assert sum(told) == 4000


def test_it_tells_by_itself_as_often_as_it_is_to_and_goes_on_when_the_books_are_away() -> None:
    replica = Replica(every_s=10.0)

    async def watched() -> None:
        running = asyncio.create_task(replica.meter.run())
        replica.journal.is_away = True
        replica.clock.at += 11.0
        await until(lambda: replica.clock.at > 0 and replica.meter._begun_on == replica.clock.at)
        assert not replica.journal.entered
        replica.journal.is_away = False
        replica.clock.at += 11.0
        await until(lambda: bool(replica.journal.entered))
        running.cancel()

    async def until(happened: Any) -> None:
        for _ in range(400):
            if happened():
                return
            await asyncio.sleep(0.01)
        raise AssertionError("it did not happen in time")

    asyncio.run(watched())
    assert [entered["joules"] for entered in replica.journal.entered] == [22]


def test_time_before_it_is_watched_is_idle() -> None:
    replica = Replica(every_s=1000.0)

    async def watched() -> None:
        replica.clock.at += 50.0
        replica.is_busy = True
        running = asyncio.create_task(replica.meter.run())
        await asyncio.sleep(0.2)
        running.cancel()

    asyncio.run(watched())
    replica.meter.tell()
    assert replica.journal.entered[0]["detail"]["busy_s"] == 0
