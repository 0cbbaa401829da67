"""Trackers: TensorBoard, MLflow and Weights & Biases are told of a run. Each library is loaded where it was asked for.

TensorBoard   events in <run folder>/tensorboard; `tensorboard --logdir <storage root>/runs` shows all runs of a factory
MLflow        by MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME...; without them mlflow.db in the storage root, and the
              factory's name. A run that goes on is the same run.
W&B           by WANDB_API_KEY, WANDB_PROJECT, WANDB_MODE...; without a key offline, below <run folder>/wandb
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from aifactory.records.storage import Storage

ENVIRONMENT = ("MLFLOW_", "WANDB_")
"""What the names of the variables begin with that tell these libraries where to write; workers need them too."""
TENSORBOARD = "tensorboard"
_UPLOAD_EVERY_S = 30.0
_MLFLOW_BATCH = 1000
"""Metrics that MLflow takes at once, by its REST interface."""

Entry = tuple[int, Mapping[str, float]]
"""The number of steps that are done, and the figures of the last of them by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracked:
    """The run of which trackers are told."""

    name: str
    group: str
    """The factory."""
    storage: Storage
    folder: tuple[str, ...]
    first_step: int
    """0, or the steps that were done before this start."""
    parameters: Mapping[str, str | float | bool | None]


class Tracker(Protocol):
    """Is told of a run, from one thread. What it raises is said, and ends it alone."""

    name: str

    def begin(self, run: Tracked) -> None:
        """A run begins or goes on."""

    def log(self, entries: Sequence[Entry]) -> None:
        """Steps were taken."""

    def end(self, is_finished: bool) -> None:
        """The run has ended, or stopped on its way."""


class TensorBoard:
    """Events in TensorBoard's format, in the run's folder."""

    name = "tensorboard"

    def begin(self, run: Tracked) -> None:
        from tensorboardX import SummaryWriter

        self._run = run
        # Its format is written to files of this machine; where the storage is elsewhere they are copied there.
        self._scratch = None if run.storage.is_local else tempfile.TemporaryDirectory()
        folder = run.storage.path(*run.folder, TENSORBOARD) if self._scratch is None else self._scratch.name
        # What earlier starts wrote of later steps is void: they are taken again.
        self._writer = SummaryWriter(
            folder,
            purge_step=run.first_step + 1 if run.first_step else None,
            # Its names are exact to the second: two starts within one would share a file.
            filename_suffix=f".{run.first_step:08d}-{os.getpid()}-{time.monotonic_ns()}",
        )
        lines = "\n".join(f"| {name} | {value} |" for name, value in run.parameters.items())
        self._writer.add_text("recipe", f"| name | value |\n| --- | --- |\n{lines}", run.first_step)
        self._uploaded_at = time.monotonic()

    def log(self, entries: Sequence[Entry]) -> None:
        for step, values in entries:
            for name, value in values.items():
                self._writer.add_scalar(f"train/{name}", value, step)
        self._writer.flush()
        if time.monotonic() - self._uploaded_at >= _UPLOAD_EVERY_S:
            self._upload()

    def end(self, is_finished: bool) -> None:
        self._writer.close()
        self._upload()
        if self._scratch is not None:
            self._scratch.cleanup()

    def _upload(self) -> None:
        self._uploaded_at = time.monotonic()
        if self._scratch is not None:
            self._run.storage.upload(Path(self._scratch.name), *self._run.folder, TENSORBOARD)


class MLflow:
    """A run of MLflow's tracking."""

    name = "mlflow"

    def begin(self, run: Tracked) -> None:
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None and run.storage.is_local:
            uri = "sqlite:///" + run.storage.path("mlflow.db")
        if uri is None:
            raise ValueError(
                f"expected MLFLOW_TRACKING_URI beside the storage {run.storage.root}, which is no local path; set it"
            )
        self._client = MlflowClient(tracking_uri=uri)
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", run.group or "aifactory")
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found is not None else self._client.create_experiment(experiment)
        # The same run after a resume: it is found by what this factory calls it.
        known = self._client.search_runs([experiment_id], f"tags.`aifactory.run` = '{run.name}'", max_results=1)
        if known:
            self._id = known[0].info.run_id
            self._client.set_terminated(self._id, status="RUNNING")
            return
        made = self._client.create_run(experiment_id, run_name=run.name, tags={"aifactory.run": run.name})
        self._id = made.info.run_id
        for name, value in run.parameters.items():
            self._client.log_param(self._id, name, value)

    def log(self, entries: Sequence[Entry]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for step, values in entries for name, value in values.items()]
        for at in range(0, len(metrics), _MLFLOW_BATCH):
            self._client.log_batch(self._id, metrics=metrics[at : at + _MLFLOW_BATCH])

    def end(self, is_finished: bool) -> None:
        self._client.set_terminated(self._id, status="FINISHED" if is_finished else "KILLED")


class WeightsAndBiases:
    """A run of Weights & Biases."""

    name = "wandb"

    def begin(self, run: Tracked) -> None:
        import wandb

        folder = run.storage.path(*run.folder) if run.storage.is_local else tempfile.mkdtemp(prefix="aifactory-wandb-")
        # Without a key it would ask a person for one.
        is_offline = "WANDB_MODE" not in os.environ and not wandb.api.api_key
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", run.group or "aifactory"),
            id=run.name,
            name=run.name,
            resume="allow",
            dir=folder,
            config=dict(run.parameters),
            mode="offline" if is_offline else None,
            # Neither the console nor code of this process is its business.
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
        )

    def log(self, entries: Sequence[Entry]) -> None:
        for step, values in entries:
            self._run.log({f"train/{name}": value for name, value in values.items()}, step=step)

    def end(self, is_finished: bool) -> None:
        self._run.finish(exit_code=0 if is_finished else 1)


_KINDS: dict[str, Any] = {kind.name: kind for kind in (TensorBoard, MLflow, WeightsAndBiases)}


def make_trackers(names: Sequence[str]) -> list[Tracker]:
    """The trackers of these names (`runtime.trackers`)."""
    return [_KINDS[name]() for name in names]


def tracker_environment() -> dict[str, str]:
    """The variables of this process that tell the libraries where to write."""
    return {name: value for name, value in os.environ.items() if name.startswith(ENVIRONMENT)}
