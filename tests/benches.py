"""The bench of a factory, and what is made on it, without a cluster."""

from __future__ import annotations

from aifactory.cluster.tasks import run_here
from aifactory.factory import Factory
from aifactory.workshop.bench import Bench
from aifactory.workshop.training import Training


def bench_of(factory: Factory) -> Bench:
    """The bench of a factory without a cluster: what is made on it is made in this process."""
    return Bench(factory.books, run_tasks=lambda: run_here)


def training_of(factory: Factory) -> Training:
    """The training from scratch that a factory's configuration asks for, of one candidate."""
    config = factory.config
    return Training(
        token_sets=[factory.tokenize()],
        shares=[1.0],
        recipe=config.train,
        base=None,
        architecture=config.model.architecture,
    )
