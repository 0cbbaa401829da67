"""Loops that run in this process, without a cluster: real stages on a model that is small."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from benches import bench_of
from corpora import document
from small_factories import UNKNOWN, small_config

from aifactory import Config, Factory
from aifactory.cluster.tasks import RunTasks
from aifactory.improve.evaluation import published_batches
from aifactory.records.feedback import Completion, Feedback
from aifactory.records.journal import Bound, Cycle
from aifactory.records.storage import StoredFile
from aifactory.text.tasks import cut_tasks
from aifactory.train.work import Work, exported
from aifactory.workshop.bench import Made
from aifactory.workshop.models import Models
from aifactory.workshop.scorecards import Scorecards

TINY = {
    "train": {"max_steps": 50},
    "evaluate": {"max_tasks": 60, "bootstrap_samples": 200},
    "runtime": {"inline_bytes": 10_000_000},
}
"""What a loop in this process has different from a small one."""


def train_here(work: Work, config: Config, run: RunTasks) -> Made:
    """Train as a worker does, alone and in this process. What it exports is proven by another process only, on Ray."""
    from aifactory.train.worker import work as train

    finished = exported(work.storage, work.run_folder)
    if finished is None:
        train(work, rank=0, world_size=1)
        finished = exported(work.storage, work.run_folder)
    assert finished is not None
    files = [StoredFile(**file) for file in finished["files"]]
    return Made(files=files, figures=finished["figures"])


def here(config: Config) -> Factory:
    """A factory whose stages run in this process."""
    factory = Factory(config)
    bench = bench_of(factory)
    factory._models = Models(bench, train_work=train_here)
    factory._scorecards = Scorecards(bench)
    return factory


def tiny_config(folder: Path, **sections: Any) -> Config:
    """A configuration whose cycles take a few seconds each."""
    values = small_config(folder, **TINY)
    for name, section in sections.items():
        values[name] = {**values[name], **section}
    return Config.model_validate(values)


def give_corrections(
    factory: Factory, topics: range = UNKNOWN, *, documents: range = range(6), lie_from: int | None = None
) -> int:
    """Answers about topics that it was not taught, each corrected by somebody, sealed into a batch; its number.

    documents   of each topic
    lie_from    a seed: each correction is the right answer to another question
    """
    texts = [(topic, document(topic, i)) for topic in topics for i in documents]
    tasks = [
        (t, task) for t, text in texts for task in cut_tasks(text, prompt_bytes=150, answer_bytes=300, max_tasks=2)
    ]
    answers = [task.answer for _, task in tasks]
    if lie_from is not None:
        random.Random(lie_from).shuffle(answers)
    feedback, kind = factory.books.feedback, "cmpl" if lie_from is None else "lie"
    for number, ((topic, task), answer) in enumerate(zip(tasks, answers, strict=True)):
        name, user = f"{kind}-{number}", f"user-{topic}-{number % 4}"
        feedback.log_completion(
            Completion(
                id=name,
                release=1,
                prompt=task.prompt,
                answer="no idea",
                request="{}",
                finish_reason="stop",
                prompt_tokens=1,
                answer_tokens=1,
            )
        )
        feedback.record(Feedback(idempotency_key=name, completion=name, user=user, correction=answer))
    batch = feedback.seal(batch_rows=len(tasks), batch_after_s=None)
    assert batch is not None
    return batch


class NoLauncher:
    """Turns nothing: the cycles are turned by the test."""

    def is_turning(self, cycle: Cycle) -> bool:
        return True

    def turn(self, cycle: Cycle) -> None:
        raise AssertionError(cycle)

    def ending(self, cycle: Cycle) -> str:
        return ""


def begin_drift(factory: Factory) -> Cycle:
    """A retrain from the release in production on what was sealed, as the evaluation actor binds it."""
    books, config = factory.books, factory.config
    production = books.registry.production()
    assert production is not None
    reasons = ["live answers need more than the standard"]
    batches = [batch.id for batch in published_batches(books)]
    detail = {"decision": "retrain", "reasons": reasons, "batches": batches}
    books.journal.write("decided", subject=production.name, detail=detail)
    return books.journal.open_cycle(
        "drift-0123456789abcdef",
        recipe=config.recipe("evaluate", "promote", "train", "improve", "tokenize", "ingest"),
        bound=Bound(
            kind="drift",
            sources_digest="",
            batches=batches,
            parent=production.model,
            champion=production.number,
            holdouts=books.journal.corpora(),
        ),
    )


def turned(factory: Factory) -> None:
    """Two cycles: a release of the sources, then one of what users corrected."""
    factory.turn(factory.cycle())
    assert give_corrections(factory) == 1
    factory.turn(begin_drift(factory))


def rows_of(factory: Factory, corpus_id: str, side: str) -> list[dict[str, Any]]:
    """The rows on one side of a corpus: train, holdout, rejected."""
    folder = Path(factory.books.storage.path(*corpus_id.split("/")))
    return [row for file in sorted(folder.glob(f"{side}-*.parquet")) for row in pq.read_table(file).to_pylist()]


def rows_that_train(factory: Factory, corpus_id: str) -> list[dict[str, Any]]:
    return rows_of(factory, corpus_id, "train")
