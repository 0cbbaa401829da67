"""What a training worker is handed, and what can be asked of its run without a model.

Law      Nothing here loads transformers: a driver that starts workers, and whoever controls them, would wait for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory.records.storage import Storage
from aifactory.train.checkpoint import Checkpoints
from aifactory.train.execution import Execution
from aifactory.train.validation import Schedule, Validations

if TYPE_CHECKING:
    from aifactory.config import Architecture, Train

EXPORTED = "exported.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Files of one directory below the storage root."""

    folder: tuple[str, ...]
    names: tuple[str, ...]

    def fetch(self, storage: Storage) -> Path:
        """A local folder that holds them."""
        return storage.fetch(list(self.names), *self.folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSet:
    """The shards of one token set, and its share of a batch."""

    shards: Stored
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """All that a worker needs; plain values, so that it can be pickled."""

    storage: Storage
    run_folder: tuple[str, ...]
    model_folder: tuple[str, ...]
    recipe: Train
    architecture: Architecture
    base: Path | Stored | None
    """The model that training starts from; none for one from scratch."""
    tokenizer: Stored
    """The tokenizer's files in the folder of a token set."""
    row_sets: tuple[RowSet, ...]
    micro_batch_rows: int
    checkpoint_every_steps: int
    num_threads: int
    parallel: str = "ddp"
    """How several workers share the model."""
    shard_workers: int | None = None
    """Of `fsdp`: so many workers hold one copy of the model between them."""
    factory: str = ""
    """Whose run it is, for trackers."""
    trackers: tuple[str, ...] = ()
    """Who else is told of the run (`runtime.trackers`)."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Variables that trackers read, where the worker's machine does not set them itself."""
    execution: Execution = field(default_factory=Execution)
    """How a step is computed."""
    keep_checkpoints: int = 2
    hang_timeout_s: float | None = None
    """A worker that takes no step for so long ends itself."""
    held_out: Stored | None = None
    """Packed rows that do not train; none: nothing is validated."""
    validate_every_steps: int = 0
    validates_itself: bool = True
    """Whether rank 0 validates, between two steps; else somebody does who watches the run's folder."""

    @property
    def base_bytes(self) -> int:
        """Of the files of the model that training starts from; 0 for one from scratch."""
        if isinstance(self.base, Stored):
            return sum(self.storage.size(*self.base.folder, *name.split("/")) or 0 for name in self.base.names)
        return 0 if self.base is None else sum(path.stat().st_size for path in self.base.rglob("*") if path.is_file())

    @property
    def schedule(self) -> Schedule:
        """Which steps are validated."""
        return Schedule(every_steps=self.validate_every_steps, max_steps=self.recipe.max_steps)


def exported(storage: Storage, run_folder: Sequence[str]) -> dict[str, Any] | None:
    """What a finished run exported; None while there is nothing."""
    data = storage.read_bytes(*run_folder, EXPORTED)
    return None if data is None else dict(json.loads(data))


def holdout_losses(task: Work) -> dict[str, float]:
    """By step the losses on held-out rows that were found, nats a token."""
    found = Validations(task.storage, *task.run_folder).losses()
    return {str(step): loss for step, loss in sorted(found.items())}


def due(task: Work) -> list[int]:
    """The steps whose committed checkpoints are to be validated and have not been, ascending."""
    found = Validations(task.storage, *task.run_folder).losses()
    committed = Checkpoints(task.storage, *task.run_folder).committed()
    return [step for step in committed if task.schedule.is_due(step) and step not in found]
