"""SIGKILL of the driver, each time followed by the same command: as if it had never been killed."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from drivers import Driver
from small_factories import small_config, unknown_traffic

BOUNDARIES = (
    "cycle_begun",
    "ingested",
    "tokenized",
    "trained",
    "evaluated",
    "promoted",
    "sealed",
    "decided",
)


def driver(folder: Path) -> Driver:
    values: dict[str, Any] = small_config(folder, traffic=unknown_traffic(folder))
    return Driver(folder, values)


@pytest.mark.slow
def test_a_driver_killed_in_training_and_in_traffic_ends_as_if_it_had_never_been(
    tmp_path: Path, uninterrupted: Driver
) -> None:
    killed = driver(tmp_path)

    assert killed.kill_when(lambda: _checkpoints(killed) >= 2)
    assert killed.kill_when(lambda: killed.books.feedback.counts()["feedback"] >= 40)
    killed.finish()

    assert killed.outcome() == uninterrupted.outcome()


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(5))
def test_a_driver_killed_at_five_random_moments_ends_as_if_it_had_never_been(
    seed: int, tmp_path: Path, uninterrupted: Driver
) -> None:
    killed = driver(tmp_path)
    moments = random.Random(seed)

    # A start takes about 10 s and a stage about as long: some kills meet Ray as it starts, some a stage, some traffic.
    kills = [killed.kill_when(_after(moments.uniform(1, 25))) for _ in range(5)]
    killed.finish()

    print(f"seed {seed}: {sum(kills)} kills of a driver at work")
    assert killed.outcome() == uninterrupted.outcome()


@pytest.mark.faults
def test_a_driver_killed_at_every_stage_boundary_ends_as_if_it_had_never_been(
    tmp_path: Path, uninterrupted: Driver
) -> None:
    killed = driver(tmp_path)

    met = [
        (boundary, number)
        for number in (1, 2)
        for boundary in BOUNDARIES
        if killed.kill_when(lambda b=boundary, n=number: killed.events().count(b) >= n)  # type: ignore[misc]
    ]
    killed.finish()

    print(f"killed at {met}")
    assert killed.outcome() == uninterrupted.outcome()


def _after(seconds: float) -> Callable[[], bool]:
    due = threading.Event()
    timer = threading.Timer(seconds, due.set)
    timer.daemon = True
    timer.start()
    return due.is_set


def _checkpoints(driver: Driver) -> int:
    return len(list(Path(driver.books.storage.path("runs")).glob("train-*/step-*/COMMITTED")))
