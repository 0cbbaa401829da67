"""Training runs: those that go on, by their logs in the storage, and those that have ended, by the journal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from aifactory.errors import StorageError
from aifactory.page.events import cycle_numbers, newest
from aifactory.records.books import Books
from aifactory.records.journal import Event
from aifactory.records.tables import artifacts

SILENT_AFTER_S = 120.0
"""A run whose log has said nothing for so long may have been killed, or takes long steps."""
_PREFIX = "train-"
_PROGRESS = "progress.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The training of one model."""

    model: str
    """Id of the model that comes of it."""
    state: Literal["running", "silent", "ended"]
    cycle: int | None
    """Number of the cycle that made it; None while it goes on."""
    at: float | None
    """When it was last heard of, or ended; seconds since 1970, UTC."""
    step: int
    steps: int
    loss: float | None
    """Nats per token: of the newest step, or in the last tenth of all."""
    tokens: int
    tokens_per_s: float | None
    mfu: float | None
    """Share of the device's peak; None where it is not known."""
    peak_source: str | None
    """measured or nominal: what the peak is known by."""
    learning_rate: float | None
    gradient_norm: float | None
    curve: Sequence[tuple[int, float]]
    """Steps done, and the mean loss since the point before."""
    warnings: Sequence[str]
    precision: str | None
    parameters: int | None
    seconds: float | None
    joules: float | None
    joules_source: str | None

    @property
    def done(self) -> float:
        """The share of the steps that were taken."""
        return self.step / self.steps if self.steps else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds to the last step, at the speed of until now."""
        if self.state == "ended" or not self.step or not self.tokens_per_s or not self.tokens:
            return None
        return (self.steps - self.step) * self.tokens / self.step / self.tokens_per_s


def runs(books: Books, *, limit: int = 20) -> list[Run]:
    """Those that go on, then the newest that have ended, newest first."""
    numbers = cycle_numbers(books)
    ended = newest(books, of=["trained"], limit=limit)
    return [*going_on(books), *(_ended(event, numbers.get(event.trigger or "")) for event in ended)]


def going_on(books: Books) -> list[Run]:
    """Runs whose model is not made yet, the one that was heard of last first."""
    try:
        names = books.storage.names("runs")
    except StorageError:
        return []  # a storage that is away for a while leaves all else to be seen
    open_models = [f"model/{name.removeprefix(_PREFIX)}" for name in names if name.startswith(_PREFIX)]
    made = _made(books, open_models)
    found = [_running(books, model) for model in open_models if model not in made]
    return sorted((run for run in found if run is not None), key=lambda run: -(run.at or 0.0))


def _made(books: Books, models: Sequence[str]) -> set[str]:
    if not models:
        return set()
    with books.database.read() as connection:
        query = sa.select(artifacts.c.id).where(artifacts.c.factory == books.config.name, artifacts.c.kind == "model")
        return set(connection.scalars(query))


def _running(books: Books, model: str) -> Run | None:
    try:
        data = books.storage.read_bytes("runs", _PREFIX + model.partition("/")[2], _PROGRESS)
        told: Mapping[str, Any] | None = None if data is None else json.loads(data)
    except (StorageError, ValueError):
        return None
    if told is None:
        return None
    at = _number(told.get("at"))
    silent = at is None or books.journal.clock() - at > SILENT_AFTER_S
    step = int(told["step"])
    return Run(
        model=model,
        state="silent" if silent else "running",
        cycle=None,
        at=at,
        step=step,
        steps=int(told.get("steps", step)),
        loss=_number(told.get("loss")),
        tokens=step * int(told.get("tokens_per_step", 0)),
        tokens_per_s=_number(told.get("tokens_per_s")),
        mfu=_number(told.get("mfu")),
        peak_source=told.get("peak_source"),
        learning_rate=_number(told.get("learning_rate")),
        gradient_norm=_number(told.get("gradient_norm")),
        curve=_points(told.get("curve")),
        warnings=told.get("warnings", ()),
        precision=None,
        parameters=None,
        seconds=None,
        joules=None,
        joules_source=None,
    )


def _ended(event: Event, cycle: int | None) -> Run:
    figures = event.detail
    steps = int(figures.get("steps", 0))
    return Run(
        model=str(event.subject),
        state="ended",
        cycle=cycle,
        at=event.at,
        step=steps,
        steps=steps,
        loss=_number(figures.get("final_loss")),
        tokens=int(figures.get("tokens", 0)),
        tokens_per_s=_number(figures.get("tokens_per_s")),
        mfu=_number(figures.get("mfu")),
        peak_source=figures.get("peak_source"),
        learning_rate=None,
        gradient_norm=None,
        curve=_points(figures.get("curve")),
        warnings=figures.get("warnings", ()),
        precision=figures.get("precision"),
        parameters=figures.get("parameters"),
        seconds=event.seconds,
        joules=event.joules,
        joules_source=event.joules_source,
    )


def _points(curve: Sequence[Sequence[float]] | None) -> list[tuple[int, float]]:
    return [(int(step), loss) for step, value in curve or () if (loss := _number(value)) is not None]


def _number(value: Any) -> float | None:
    """A finite number; None for what is none, which has no form in JSON either."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
