"""Models: trained by recipes that are candidates for one cycle, side by side where there is room, and proven."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from aifactory.cluster.tasks import RunTasks, run_threads
from aifactory.config import Config, Train
from aifactory.errors import TrainingError
from aifactory.observe.events import log_event
from aifactory.records.artifacts import Model, TokenSet
from aifactory.records.journal import Cycle
from aifactory.records.storage import StoredFile
from aifactory.workshop.bench import Bench, Folder, Made, small_models_here
from aifactory.workshop.runs import Run
from aifactory.workshop.training import Training

if TYPE_CHECKING:
    from aifactory.train.work import Work

TrainWork = Callable[["Work", Config, RunTasks], Made]
"""Trains what the workers of a run are handed: the model's files lie in its folder when it returns."""


def train_and_prove(work: Work, config: Config, run: RunTasks) -> Made:
    """Train on the cluster; then, before there is a record (law 7), a process that never saw the trainer loads what it exported."""
    from aifactory.train.trainer import prove, train_on_ray

    limit = config.runtime.inline_bytes
    meanwhile = None if work.base_bytes > limit else _import_models
    exported = train_on_ray(work, name=work.run_folder[-1], runtime=config.runtime, meanwhile=meanwhile)
    files = [StoredFile(**file) for file in exported["files"]]
    if sum(file.num_bytes for file in files) <= limit:
        run = small_models_here(config.runtime)
    (parity,) = run(prove, [(work, config.promote.parity_tolerance)])
    return Made(files=files, figures=exported["figures"] | {"parity": parity})


def _import_models() -> None:
    """Import what the proof and the evaluation of a small model need here."""
    import aifactory.evaluate.scoring
    import aifactory.train.parity  # noqa: F401


class Models:
    """Makes the models of one factory."""

    def __init__(
        self,
        bench: Bench,
        *,
        runs_at_once: Callable[[int], int] = lambda most: 1,
        train_work: TrainWork = train_and_prove,
    ) -> None:
        """`runs_at_once` connects to the cluster, and says how many training runs there is room for, at most so many."""
        self._bench = bench
        self._runs_at_once = runs_at_once
        self._train_work = train_work

    def of(
        self,
        cycle: Cycle,
        token_sets: Sequence[TokenSet],
        *,
        recipes: Sequence[Train],
        shares: Sequence[float],
        base: Model | Path | None,
    ) -> list[Model]:
        """For each recipe a model trained on the token sets, mixed by `shares`, from `base` or from scratch.

        As many are trained at once as there is room for. Where one fails the others are trained to their ends, and wait in
        the storage for the same command.
        """
        architecture = self._bench.config.model.architecture
        trainings = [
            Training(token_sets=token_sets, shares=shares, recipe=recipe, base=base, architecture=architecture)
            for recipe in recipes
        ]

        def train(training: Training, at_once: int) -> Model:
            try:
                return self._train(cycle, training, at_once=at_once)
            except TrainingError as error:
                if len(recipes) == 1:
                    raise
                raise TrainingError(
                    f"train.candidates[{recipes.index(training.recipe)}]: {error} The other candidates are trained all the "
                    "same; without this one the same command goes on with them."
                ) from error

        missing = [training for training in trainings if self._bench.find(training.identity) is None]
        if len(missing) > 1:
            at_once = self._runs_at_once(len(missing))
            log_event("training", candidates=len(missing), at_once=at_once)
            run_threads([partial(train, training, at_once) for training in missing], at_once=at_once)
        return [train(training, 1) for training in trainings]

    def _train(self, cycle: Cycle, training: Training, *, at_once: int) -> Model:
        from aifactory.tokens.pipeline import sources_of

        bench, run = self._bench, Run(self._bench, training)

        def write(_: Folder) -> Made:
            run_tasks = bench.run_tasks()
            made = self._train_work(run.work(), bench.config, run_tasks)
            # Law 3: what was read of which rows, and how often, stands in the record of the model.
            mixed = [
                {"tokens": tokens.id, "sources": sources_of(tokens, names), **asdict(drawn)}
                for tokens, names, drawn in training.drawn()
            ]
            return Made(files=made.files, figures={**made.figures, "mixture": mixed})

        runtime = bench.config.runtime
        model = bench.make(
            cycle,
            training.identity,
            write,
            event="trained",
            num_cpus=runtime.most_workers * runtime.cpus_per_worker,
            share=1 / at_once,
            train=training.recipe,
        )
        run.clear()
        bench.show(model)
        return model
