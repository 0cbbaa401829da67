"""What making an artifact adds to the meters of this process: its time, its energy, and the figures of its stage."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from aifactory.bottleneck import TasksMeasured, TrainingMeasured
from aifactory.cluster.tasks import ledger
from aifactory.config import Config, Site
from aifactory.observe import metrics
from aifactory.observe.energy import Energy, count_joules
from aifactory.records.artifacts import Artifact

STAGES = {"ingested": "ingest", "tokenized": "tokenize", "trained": "train", "evaluated": "evaluate"}
"""By the event that the books enter for what a stage makes."""


class StageTasks:
    """What a stage waits for, from here on: its tasks, or what the training run has counted."""

    def __init__(self, event: str, config: Config) -> None:
        self._stage = STAGES[event]
        self._config = config
        self._before = ledger.spent

    def measured(self, artifact: Artifact, seconds: float) -> dict[str, Any] | None:
        """As the books have it; None of a run of which nothing was counted."""
        runtime, figures = self._config.runtime, artifact.figures
        is_remote = any("://" in place for place in (runtime.storage or "", *_places(self._config)))
        if self._stage == "train":
            if "cpu_share" not in figures:
                return None
            shares = ("seconds", "data_wait_share", "checkpoint_stall_share", "cpu_share", "starved_share", "workers")
            training = TrainingMeasured(
                **{name: figures[name] for name in shares}, gpus_each=runtime.gpus_per_worker, is_remote=is_remote
            )
            return {"kind": "training", **asdict(training)}
        spent = ledger.spent - self._before
        tasks = TasksMeasured(
            stage=self._stage,
            seconds=seconds,
            tasks=spent.tasks,
            at_once=runtime.data_tasks,
            cpus_each=runtime.cpus_per_worker,
            used=spent.used,
            queued_s=spent.queued_s,
            is_remote=is_remote,
        )
        return {"kind": "tasks", **asdict(tasks)}


def _places(config: Config) -> list[str]:
    """Where the sources lie."""
    return [str(getattr(source, "path", "")) for source in config.ingest.sources]


@contextmanager
def making(event: str) -> Iterator[None]:
    """Count the CPU time of this process while an artifact is made, and an error that ends it."""
    stage, before = STAGES[event], _cpu_seconds()
    try:
        yield
    except Exception:
        metrics.STAGE_FAILURES.add(stage=stage)
        raise
    finally:
        metrics.STAGE_CPU_SECONDS.add(max(0.0, _cpu_seconds() - before), stage=stage)


def count(event: str, artifact: Artifact, energy: Energy, site: Site) -> None:
    """Count an artifact that was made just now."""
    stage, figures = STAGES[event], artifact.figures
    metrics.STAGE_SECONDS.observe(energy.seconds, stage=stage)
    count_joules(energy, site, stage=stage)
    if stage == "ingest":
        for outcome in ("rejected", "erased", "holdout"):
            metrics.INGEST_ROWS.add(figures[f"rows_{outcome}"], outcome=outcome)
        metrics.INGEST_ROWS.add(figures["rows_kept"] - figures["rows_holdout"], outcome="kept")
        metrics.INGEST_BYTES.add(figures["bytes_kept"])
        for rule, rows in figures["rejected_by_rule"].items():
            metrics.INGEST_REJECTED_ROWS.add(rows, rule=rule)
    if stage == "tokenize":
        metrics.TOKENIZE_TOKENS.add(figures["tokens"])
        metrics.TOKENIZE_ROWS.add(figures["packed_rows"])
    if stage == "evaluate":
        for name in ("holdout", "target", "known"):
            for model in ("candidate", "champion"):
                if scores := (figures.get(name) or {}).get(model):
                    metrics.EVALUATE_BITS.set(scores["estimate"], set=name, model=model)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
