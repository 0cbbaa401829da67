"""What answers wait for is measured on a real engine, and named: too few slots, too small a queue, and neither."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from aifactory.bottleneck import read
from aifactory.serve.answer_meter import Load
from aifactory.serve.releases import Releases

AT_ONCE = 8
ASKED = {"model": "alpha", "prompt": "the quick brown fox", "max_tokens": 60, "temperature": 0}


def measured(factory, exported, answer_on, load, folder: Path, **endpoint: int) -> dict:
    """What a replica with these options measures while so many ask at once."""
    made = type(factory)(folder, exported, **endpoint)
    made.promote(made.publish(1))
    releases = Releases(made.books, load)
    releases.load_first()
    with answer_on(made, releases) as served, ThreadPoolExecutor(AT_ONCE) as pool:

        def ask(_: int) -> int:
            return httpx.post(f"{served.url}/v1/completions", json=ASKED, timeout=60).status_code

        seen = Load(lambda: served.gateway)
        asked = [pool.submit(ask, number) for number in range(AT_ONCE * 3)]
        last = time.monotonic()
        while not all(each.done() for each in asked):
            time.sleep(0.002)
            now = time.monotonic()
            seen.look(now - last)
            last = now
        found = seen.take()
    # What else runs on the machine of the tests is not the matter here.
    return found | {"used": found["used"] | {"starved_s": 0.0}}


@pytest.mark.parametrize(
    ("endpoint", "option"),
    [({"slots": 1}, "runtime.endpoint.slots"), ({"slots": 1, "max_queued": 1}, "max_queued")],
)
def test_a_replica_with_too_small_a_queue_is_named(
    factory, exported, answer_on, load, tmp_path, endpoint, option
) -> None:
    found = read(measured(factory, exported, answer_on, load, tmp_path / "small", **endpoint))
    assert found is not None and found.of == "queue"
    assert option in found.options[0]


def test_a_replica_that_lets_everybody_in_is_not_said_to_have_a_queue(
    factory, exported, answer_on, load, tmp_path
) -> None:
    seen = measured(factory, exported, answer_on, load, tmp_path / "large", slots=64)
    found = read(seen)
    assert found is not None and "to be let in" not in " ".join(found.reasons)
    assert seen["requests"] == AT_ONCE * 3 and seen["refused"] == 0 and seen["engine_s"] > 0
