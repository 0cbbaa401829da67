"""Fixtures of the whole suite: one Ray session, and small factories."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# The suite is one program with many small modules beside the tests (fakes, corpora).
sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from corpora import write_topics
from drivers import Driver

KNOWN = range(0, 6)
"""Topics that a small factory is taught."""
UNKNOWN = range(6, 14)
"""Topics that it hears of from its users alone."""


def small_config(folder: Path, *, name: str = "small", **sections: Any) -> dict[str, Any]:
    """A configuration whose whole loop takes seconds of work: a two-layer model of texts about six topics."""
    corpus = folder / "corpus"
    if not corpus.exists():
        write_topics(corpus, KNOWN, documents=14)
    values: dict[str, Any] = {
        "name": name,
        "ingest": {"sources": [{"name": "topics", "kind": "text", "path": str(corpus)}], "holdout_share": 0.2},
        "tokenize": {"vocab_size": 512, "row_len": 128},
        "model": {"architecture": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "context_length": 512}},
        "train": {"max_steps": 60, "global_batch_rows": 8, "learning_rate": 0.01, "warmup_steps": 5},
        "evaluate": {"prompt_bytes": 150, "answer_bytes": 300, "max_tasks": 80, "bootstrap_samples": 500},
        "promote": {"min_tasks": 10, "min_clusters": 4},
        "improve": {
            "min_scored": 50,
            "batch_rows": 150,
            "retrain": {"max_steps": 60, "learning_rate": 0.01},
        },
        "runtime": {
            "storage": str(folder / "storage"),
            "workers": 1,
            "cpus_per_worker": 0.8,
            "data_tasks": 2,
            "checkpoint_every_steps": 10,
            "tick_s": 0.3,
            "endpoint": {"port": 0, "poll_s": 0.2},
        },
    }
    return merged(values, sections)


def unknown_traffic(folder: Path, **values: Any) -> dict[str, Any]:
    """Simulated users who ask about topics that the factory was not taught."""
    source = folder / "unknown"
    if not source.exists():
        write_topics(source, UNKNOWN, documents=8)
    traffic = {
        "source": {"name": "unknown", "kind": "text", "path": str(source)},
        "requests": 150,
        "max_tokens": 8,
        "timeout_s": 240,
    }
    return merged(traffic, values)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` put over it, section by section."""
    result = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else value
    return result


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
