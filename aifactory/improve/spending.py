"""What retrains have cost and brought, from the journal alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from aifactory.config import Budget, Runtime
from aifactory.improve.budget import Spending, Tried, Usage
from aifactory.records.books import Books
from aifactory.records.journal import Cycle, Event

_STAGES = ("ingested", "tokenized", "trained", "evaluated")


def spending(books: Books, budget: Budget) -> Spending:
    """What is known now of costs and gains."""
    now, runtime = books.journal.clock(), books.config.runtime
    cycles = books.journal.cycles()
    retrains = [cycle for cycle in cycles if cycle.bound.is_retrain]
    made: dict[str, list[Event]] = {cycle.trigger: [] for cycle in cycles}
    for stage in _STAGES:
        for event in books.journal.events(event=stage):
            if event.trigger in made:
                made[event.trigger].append(event)
    recent = (e for cycle in retrains for e in made[cycle.trigger] if now - e.at < budget.window_s)
    ended = [c for c in retrains if c.closed_at is not None and now - c.opened_at < budget.memory_s]
    runs = [cycle for cycle in cycles if cycle.bound.kind == "run"]
    return Spending(
        spent=_sum(recent, runtime),
        retrains=[_tried(cycle, made[cycle.trigger], runtime) for cycle in ended],
        first=_tried(runs[-1], made[runs[-1].trigger], runtime) if runs else None,
    )


def _tried(cycle: Cycle, made: Sequence[Event], runtime: Runtime) -> Tried:
    trained = [event for event in made if event.event == "trained"]
    gain = max((_gain(event.detail) for event in made if event.event == "evaluated"), default=0.0)
    return Tried(
        gain=gain if cycle.state == "promoted" else 0.0,
        steps=sum(int(event.detail.get("steps", 0)) for event in trained),
        training=_sum(trained, runtime),
        rest=_sum((event for event in made if event.event != "trained"), runtime),
    )


def _gain(figures: Mapping[str, object]) -> float:
    """Of a scorecard: what the candidate needs less than the release before for held-out corrections, bits per byte."""
    target = figures.get("target")
    change = target.get("over_champion") if isinstance(target, Mapping) else None
    return max(0.0, -float(change["estimate"])) if isinstance(change, Mapping) else 0.0


def _sum(events: Iterable[Event], runtime: Runtime) -> Usage:
    used = Usage()
    for event in events:
        hours = (event.seconds or 0.0) / 3600
        trains = event.event == "trained"
        number = runtime.most_workers if trains else runtime.data_tasks
        used = used + Usage(
            cpu_hours=hours * number * runtime.cpus_per_worker,
            gpu_hours=hours * number * runtime.gpus_per_worker if trains else 0.0,
            joules=event.joules or 0.0,
        )
    return used
