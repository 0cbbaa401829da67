"""SIGKILL of the driver, each time followed by the same command: as if it had never been killed."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import small_config, unknown_traffic
from drivers import Driver

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


def test_a_driver_killed_three_times_ends_as_if_it_had_never_been(tmp_path: Path, uninterrupted: Driver) -> None:
    killed = driver(tmp_path)

    assert killed.kill_when(lambda: _checkpoints(killed) >= 2)  # in the middle of training
    assert killed.kill_when(lambda: killed.books.feedback.counts()["feedback"] >= 40)  # in the middle of traffic
    assert killed.kill_when(lambda: killed.events().count("ingested") == 2)  # in the middle of the retrain
    killed.finish()

    assert killed.outcome() == uninterrupted.outcome()


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(20))
def test_a_driver_killed_at_a_random_moment_ends_as_if_it_had_never_been(
    seed: int, tmp_path: Path, uninterrupted: Driver
) -> None:
    killed = driver(tmp_path)

    killed.kill_when(_after(random.Random(seed).uniform(1, 60)))
    killed.finish()

    assert killed.outcome() == uninterrupted.outcome()


@pytest.mark.faults
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_driver_killed_at_a_stage_boundary_ends_as_if_it_had_never_been(
    boundary: str, number: int, tmp_path: Path, uninterrupted: Driver
) -> None:
    killed = driver(tmp_path)

    killed.kill_when(lambda: killed.events().count(boundary) >= number)
    killed.finish()

    assert killed.outcome() == uninterrupted.outcome()


def _after(seconds: float) -> Callable[[], bool]:
    due = threading.Event()
    timer = threading.Timer(seconds, due.set)
    timer.daemon = True
    timer.start()
    return due.is_set


def _checkpoints(driver: Driver) -> int:
    return len(list(Path(driver.books.storage.path("runs")).glob("train-*/step-*/COMMITTED")))
