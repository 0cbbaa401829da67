"""The bench: how any product of the loop is made. It is looked for by its fingerprint before it is made; what is made is
measured, published and entered into the books.

A fingerprint holds the stage's recipe, its inputs' fingerprints and its code version; the runtime is in none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from aifactory.bottleneck import MEASURED
from aifactory.cluster.tasks import RunTasks, run_here, threads_here
from aifactory.config import Runtime, Train
from aifactory.observe import tracing
from aifactory.observe.energy import measured
from aifactory.observe.events import log_event
from aifactory.records.artifacts import Artifact, Model, Record, Scorecard, digest_of
from aifactory.records.books import Books
from aifactory.records.identity import fingerprint
from aifactory.records.journal import Cycle
from aifactory.records.storage import StoredFile
from aifactory.workshop.cards import write_card
from aifactory.workshop.execution import execution_of
from aifactory.workshop.measuring import StageTasks, count, making

Noun = TypeVar("Noun", bound=Artifact)
Folder = tuple[str, ...]
"""A directory below the storage root, in parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity(Generic[Noun]):
    """All that tells one product from another, known before it is made."""

    noun: type[Noun]
    code_version: int
    recipe: Mapping[str, Any]
    contents: Sequence[str] = ()
    """Digests of what it is made from and what is no artifact."""
    inputs: Sequence[Artifact]

    @property
    def fingerprint(self) -> str:
        """64 hex digits."""
        return fingerprint(
            stage=self.noun.kind,
            code_version=self.code_version,
            recipe=self.recipe,
            inputs=[*self.contents, *(artifact.fingerprint for artifact in self.inputs)],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a stage has written."""

    files: Sequence[StoredFile]
    figures: Mapping[str, Any]


def small_models_here(runtime: Runtime) -> RunTasks:
    """Runs tasks in this process, with the threads that they would have elsewhere."""
    return threads_here(concurrency=runtime.data_tasks, threads_each=max(1, int(runtime.cpus_per_worker)))


class Bench:
    """Where the products of one factory are made."""

    def __init__(self, books: Books, *, run_tasks: Callable[[], RunTasks]) -> None:
        """`run_tasks` connects to the cluster: it is called only where something is to be made."""
        self.books = books
        self.config = books.config
        self.run_tasks = run_tasks

    @property
    def data_cpus(self) -> float:
        """CPUs of the tasks over data that run at once."""
        return self.config.runtime.data_tasks * self.config.runtime.cpus_per_worker

    def run_for(self, num_bytes: int) -> RunTasks:
        """How to run tasks over so much data: what is little is done here, before workers elsewhere would have started."""
        return run_here if num_bytes <= self.config.runtime.inline_bytes else self.run_tasks()

    def run_with_models(self, *models: Artifact | None) -> RunTasks:
        """How to run tasks that load models: what small ones are asked is answered here, before other processes would have imported
        what they need."""
        sizes = [sum(file.num_bytes for file in model.record.files) for model in models if model is not None]
        is_small = max(sizes, default=0) <= self.config.runtime.inline_bytes
        return small_models_here(self.config.runtime) if is_small else self.run_tasks()

    def find(self, identity: Identity[Noun]) -> Noun | None:
        """The product with this identity, if it is there."""
        return self.books.artifacts.find(identity.noun, identity.fingerprint)

    def folder(self, identity: Identity[Any]) -> Folder:
        """Where the product with this identity lies, or will."""
        return self.books.artifacts.folder(identity.noun.kind, identity.fingerprint)

    def make(
        self,
        cycle: Cycle,
        identity: Identity[Noun],
        write: Callable[[Folder], Made],
        *,
        event: str,
        num_cpus: float,
        share: float = 1.0,
        train: Train | None = None,
    ) -> Noun:
        """The product with this identity: as it is there, or written to its folder, published, and then entered into the books.

        event   that the books enter
        share   of the node's energy, where as much again runs beside it
        train   the recipe by which it runs, where the configuration's is not that
        """
        artifact, measured_by = self.find(identity), None
        if artifact is None:
            tasks = StageTasks(event, self.config)
            watts = self.config.runtime.watts_per_cpu
            with (
                tracing.span("make", kind=identity.noun.kind),
                making(event),
                measured(num_cpus=num_cpus, watts_per_cpu=watts, share=share) as energy,
            ):
                made = write(self.folder(identity))
            artifact = self.books.artifacts.publish(
                identity.noun,
                Record(
                    kind=identity.noun.kind,
                    fingerprint=identity.fingerprint,
                    digest=digest_of(made.files),
                    code_version=identity.code_version,
                    recipe=identity.recipe,
                    inputs=[*(a.id for a in identity.inputs)],
                    files=made.files,
                    figures=made.figures,
                    execution=execution_of(self.config.runtime, train or self.config.train),
                    seconds=energy.seconds,
                    joules=energy.joules,
                    joules_source=energy.source,
                    created_at=self.books.journal.clock(),
                ),
            )
            count(event, artifact, energy, self.config.runtime.site)
            measured_by = tasks.measured(artifact, energy.seconds)
        self._enter(cycle, event, artifact, measured_by)
        return artifact

    def show(self, model: Model, scorecard: Scorecard | None = None) -> None:
        """Write what a person reads of a model, beside it and in no digest."""
        write_card(self.books, model, scorecard)

    def _enter(self, cycle: Cycle, event: str, artifact: Artifact, measured_by: Mapping[str, Any] | None) -> None:
        """Published but not entered, or in the index and not in the journal: the process was killed between the two. Both
        heal here."""
        self.books.lineage.add(artifact)
        if any(entered.subject == artifact.id for entered in self.books.journal.events(event=event)):
            return
        self.books.journal.write(
            event,
            cycle=cycle.trigger,
            attempt=cycle.attempt,
            subject=artifact.id,
            # What it waited for is no figure of the artifact: the same one, made again, waits for something else.
            detail=_plain(artifact.figures) | ({} if measured_by is None else {MEASURED: measured_by}),
            seconds=artifact.record.seconds,
            joules=artifact.record.joules,
            joules_source=artifact.record.joules_source,
        )
        log_event(event, cycle=cycle.number, artifact=artifact.id, **_shown(artifact))


def _shown(artifact: Artifact) -> dict[str, object]:
    """The figures of an artifact that a person wants to see pass by."""
    keys = ("rows_in", "rows_kept", "rows_rejected", "tokens", "packed_rows", "steps", "tokens_per_s", "final_loss")
    shown: dict[str, object] = {key: artifact.figures[key] for key in keys if key in artifact.figures}
    for name in ("holdout", "target"):
        comparison = artifact.figures.get(name)
        if isinstance(comparison, Mapping) and isinstance(comparison.get("candidate"), Mapping):
            shown[f"{name}_bits_per_byte"] = comparison["candidate"]["estimate"]
    return shown | {"seconds": artifact.record.seconds}


def _plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures without numbers that have no JSON form."""
    return {key: None if value != value else value for key, value in figures.items()}
