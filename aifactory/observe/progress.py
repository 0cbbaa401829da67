"""What a person sees while a stage works: a bar where there is a terminal, lines where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from aifactory.observe.events import log_event

_LINE_EVERY_S = 10.0


class Progress(Protocol):
    """Where a stage says how far it is."""

    def update(self, done: float, **figures: float) -> None:
        """`done` of the total is done; figures are shown beside it."""


class _Lines:
    def __init__(self, stage: str, total: float) -> None:
        self.stage, self.total, self._last = stage, total, time.monotonic()

    def update(self, done: float, **figures: float) -> None:
        if time.monotonic() - self._last >= _LINE_EVERY_S:
            self._last = time.monotonic()
            log_event(self.stage, done=f"{done:g}/{self.total:g}", **figures)


@contextmanager
def progress(stage: str, *, total: float) -> Iterator[Progress]:
    """Show the progress of one stage on standard error."""
    if not sys.stderr.isatty():
        yield _Lines(stage, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn(f"{stage:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(stage, total=total, figures="")

        class Bar:
            def update(self, done: float, **figures: float) -> None:
                text = " ".join(f"{name}={value:.4g}" for name, value in figures.items())
                bars.update(task, completed=done, figures=text)

        yield Bar()
