"""Fixtures of the whole suite: one Ray session, and factories over small configurations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from small_factories import small_config, unknown_traffic

if TYPE_CHECKING:
    # Not where the other engine is tested: its environment has no database.
    from drivers import Driver


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray for the whole suite, as `aifactory` starts it; tests that need a cluster of their own start a process."""
    from aifactory.cluster.session import connect, disconnect

    connect("tests")
    yield
    disconnect()


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    """A run of the command, to its end, that nobody has killed: what others must come to."""
    from drivers import Driver

    folder = tmp_path_factory.mktemp("uninterrupted")
    driver = Driver(folder, small_config(folder, traffic=unknown_traffic(folder)))
    driver.finish()
    outcome = driver.outcome()
    assert outcome.decisions == ("promoted", "promoted"), driver.log.read_text(encoding="utf-8")[-4000:]
    assert (outcome.feedback, outcome.batches) == (150, 1)
    return driver


@pytest.fixture
def make_factory(tmp_path: Path, ray_session: None) -> Iterator[Callable[..., Any]]:
    """Makes factories over small configurations, and closes them and what they serve."""
    from aifactory import Config, Factory
    from aifactory.improve.evaluator import stop as stop_evaluator
    from aifactory.serve.app import stop as stop_serving

    made: list[Factory] = []

    def make(**sections: Any) -> Factory:
        factory = Factory(Config.model_validate(small_config(tmp_path, **sections)))
        made.append(factory)
        return factory

    yield make
    for factory in made:
        stop_evaluator(factory.config.name)
        stop_serving(factory.config.name)
        factory.close()
