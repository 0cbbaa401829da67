"""What a person sees while a stage works: a bar where there is a terminal, lines where there is none."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from aifactory.observe.events import log_event

_LINE_EVERY_S = 10.0


class Progress(Protocol):
    """Where a stage says how far it is."""

    def update(self, done: float, **figures: float | str) -> None:
        """`done` of the total is done; figures are shown beside it."""


class _Lines:
    def __init__(self, stage: str, total: float) -> None:
        self.stage, self.total, self._last = stage, total, time.monotonic()
        self._first: tuple[float, float] | None = None
        """When something was said to be done for the first time, and how much: what was done before tells no speed."""

    def update(self, done: float, **figures: float | str) -> None:
        now = time.monotonic()
        since, before = self._first = self._first or (now, done)
        if now - self._last >= _LINE_EVERY_S:
            self._last = now
            speed = (done - before) / (now - since) if now > since else 0.0
            left = {"left_s": f"{(self.total - done) / speed:.0f}"} if speed else {}
            log_event(self.stage, done=f"{done:g}/{self.total:g}", **figures, **left)


class _Bars:
    """The bars of this process: a terminal has room for one display, whatever runs side by side."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shown: Any = None
        self._users = 0

    @contextmanager
    def open(self) -> Iterator[Any]:
        """The display; it is there as long as somebody has it open."""
        with self._lock:
            if self._users == 0:
                self._shown = _display()
                self._shown.start()
            self._users += 1
        try:
            yield self._shown
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._shown.stop()


_bars = _Bars()


@contextmanager
def progress(stage: str, *, total: float) -> Iterator[Progress]:
    """Show the progress of one stage on standard error. Several may run at once, each in a thread of its own."""
    if not sys.stderr.isatty():
        yield _Lines(stage, total)
        return
    with _bars.open() as bars:
        task = bars.add_task(stage, total=total, figures="")

        class Bar:
            def update(self, done: float, **figures: float | str) -> None:
                bars.update(task, completed=done, figures=_text(figures))

        try:
            yield Bar()
        finally:
            bars.remove_task(task)


def _display() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description:>10}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=Console(stderr=True),
        transient=True,
    )


def _text(figures: dict[str, float | str]) -> str:
    return " ".join(f"{name}={value if isinstance(value, str) else f'{value:.4g}'}" for name, value in figures.items())
