"""Run log: what a run says while it goes on, and what of it is kept. Rank 0 alone has one. Pure Python.

Writes   <run folder>/progress.json     the newest figures and the curve of the losses, about every second; every five where the
                                        storage is no local path
         <run folder>/losses/<step>     the losses of the steps after that one, as JSON: a file for each checkpoint
         <run folder>/loss.svg          their picture, now and then and at the end
         and whatever the trackers write
Laws     Nothing of it is read by the run: with it and without it the weights are the same to the bit. What listens has a
         thread of its own; where it fails or hangs that is said, and the run goes on.
         The losses up to a checkpoint are kept before it is committed, so a run that was killed has all of them.
"""

from __future__ import annotations

import json
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from aifactory.observe import metrics
from aifactory.observe.events import log_event
from aifactory.records.storage import Storage
from aifactory.train.flops import Peak, flops_per_token, peak, utilisation
from aifactory.train.trackers import TENSORBOARD, Entry, Tracked, Tracker

if TYPE_CHECKING:
    from aifactory.config import Train

PROGRESS = "progress.json"
CHART = "loss.svg"
MFU = "tokens/s x FLOPs per token / (workers x peak)"
_LOSSES = "losses"
KEPT = (CHART, TENSORBOARD, "wandb")
"""What stays in a run's folder when the run is over."""
_REPORT_EVERY_S = 1.0
_REPORT_AFAR_EVERY_S = 5.0
"""Where it is a request over the network."""
_DRAW_EVERY_S = 30.0
_LAST_WORDS_S = 60.0
"""How long a run that has ended waits for what listens to it."""
_GATHER_S = 0.5
"""How long steps are gathered before they are told of: short ones are not disturbed by each."""
_MOST_WAITING = 100_000
"""Entries that wait for one who listens before it is given up: memory is for the run."""
_POINTS = 200
_CURVE_SHARE = 0.01
"""Of the time, what is spent at most on the curve that is told while a run goes on."""


class RunLog:
    """The log of one start of a run."""

    def __init__(self, storage: Storage, *folder: str, name: str = "", trackers: Sequence[Tracker] = ()) -> None:
        """`name` says whose run it is where several are tracked together."""
        self._storage = storage
        self._folder = folder
        self._name = name
        self._trackers = list(trackers)
        self._listeners: list[_Listener] = []
        self._losses: list[float] = []
        self._kept = 0
        self._warnings: list[str] = []
        self._told: dict[str, Any] = {}
        self._told_at = self._drawn_at = float("-inf")
        self._curve: list[tuple[int, float]] = []
        self._curve_due = float("-inf")
        self._ended: float | None = None
        self._peak: Peak | None = None
        self._flops = 0.0
        self._waits = self._measured = (0.0, 0.0)
        """For data and for checkpoints, seconds since this start: now, and as the meters have it."""

    # ── called by the loop ────────────────────────────────────────────────────────────────────────────────────────────

    def begin(
        self,
        model: nn.Module,
        recipe: Train,
        *,
        device: torch.device,
        precision: str,
        workers: int,
        row_len: int,
        at: int,
    ) -> None:
        """A run of `recipe` begins, or goes on after `at` steps."""
        self._workers = workers
        self._steps = recipe.max_steps
        self._tokens_per_step = recipe.global_batch_rows * row_len
        self._losses = self._read_losses(at)
        self._kept = at
        try:
            self._flops = flops_per_token(model, model.config, attended_tokens=row_len)  # type: ignore[arg-type]
            self._peak = peak(device, torch.bfloat16 if precision == "bf16" else torch.float32)
        except (AttributeError, TypeError) as error:
            self._warn(f"the operations of a {type(model).__name__} can't be counted, so there is no MFU: {error}")
        tracked = Tracked(
            name=self._folder[-1],
            group=self._name,
            storage=self._storage,
            folder=self._folder,
            first_step=at,
            parameters=_flat(recipe.model_dump(mode="json")),
        )
        self._listeners = [_Listener("progress", self._tell, end=self._tell_the_end, warn=self._warn)]
        self._listeners.append(_Listener("metrics", self._measure, warn=self._warn))
        for tracker in self._trackers:
            self._listeners.append(
                _Listener(
                    tracker.name,
                    tracker.log,
                    begin=lambda tracker=tracker: tracker.begin(tracked),  # type: ignore[misc]
                    end=tracker.end,
                    warn=self._warn,
                )
            )
        self._started, self._taken = time.perf_counter(), 0

    def step(
        self, done: int, *, loss: float, norm: float, rate: float, waited_s: float = 0.0, stalled_s: float = 0.0
    ) -> None:
        """The step was taken with which `done` are.

        loss   nats per token; norm   of the gradient, before it was clipped; rate   learning rate
        waited_s, stalled_s   how long steps of this start have waited for data and for checkpoints by now, seconds
        """
        self._waits = (waited_s, stalled_s)
        self._losses.append(loss)
        self._taken += 1
        values = {"loss": loss, "gradient_norm": norm, "learning_rate": rate, "tokens_per_s": self.tokens_per_s}
        if (mfu := self.mfu) is not None:
            values["mfu"] = mfu
        for listener in self._listeners:
            listener.hear((done, values))

    def keep(self) -> None:
        """Make the losses durable; called before a checkpoint of them is committed."""
        data = json.dumps(self._losses[self._kept :]).encode()
        self._storage.write_bytes(data, *self._folder, _LOSSES, f"{self._kept:08d}")
        self._kept = len(self._losses)

    def back(self, step: int) -> None:
        """The run goes on from a checkpoint after so many steps; what came after it was not."""
        del self._losses[step:]
        self._kept = min(self._kept, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.close(is_finished=error is None)

    def close(self, *, is_finished: bool) -> None:
        """The run has ended, or an error stopped it on its way: wait a while for those who listen."""
        if self._ended is not None:
            return
        self._ended = time.perf_counter()
        deadline = time.monotonic() + _LAST_WORDS_S
        for listener in self._listeners[::-1]:  # the progress last: it carries what was said of the others
            listener.stop(is_finished=is_finished, deadline=deadline)
        self._listeners = []

    # ── what was found ────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def tokens_per_s(self) -> float:
        """Since this start, checkpoints included."""
        now = time.perf_counter() if self._ended is None else self._ended
        return self._taken * self._tokens_per_step / max(now - self._started, 1e-9)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation since this start; None where the operations can't be counted, or no step was taken: a run
        that was killed after its last one has only its export left to do."""
        if self._peak is None or not self._taken:
            return None
        return utilisation(self.tokens_per_s, self._flops, self._peak, workers=self._workers)

    def figures(self) -> dict[str, Any]:
        """What the record of the model keeps."""
        found: dict[str, Any] = {"curve": curve(self._losses), "warnings": list(self._warnings)}
        if self._peak is not None:
            found |= {
                "mfu": self.mfu,
                "flops_per_token": self._flops,
                "peak_flops_per_s": self._peak.flops_per_s,
                "peak_source": self._peak.source,
            }
        return found

    # ── how ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _read_losses(self, steps: int) -> list[float]:
        """Those of the first `steps` steps; what was kept of later ones belongs to no checkpoint and is deleted."""
        losses = [float("nan")] * steps
        for name in self._storage.names(*self._folder, _LOSSES):
            begin = int(name)
            data = self._storage.read_bytes(*self._folder, _LOSSES, name) if begin < steps else None
            if data is None:
                self._storage.delete_file(*self._folder, _LOSSES, name)
                continue
            found = json.loads(data)[: steps - begin]
            losses[begin : begin + len(found)] = found
        return losses

    def _tell(self, entries: Sequence[Entry]) -> None:
        """Write the newest figures and, more rarely, the picture of the losses; it runs in a thread of its own."""
        self._told = {"step": entries[-1][0], **entries[-1][1]}
        now = time.monotonic()
        if now - self._told_at >= (_REPORT_EVERY_S if self._storage.is_local else _REPORT_AFAR_EVERY_S):
            self._told_at = now
            self._write_progress()
        if now - self._drawn_at >= _DRAW_EVERY_S:
            self._drawn_at = now
            self._draw()

    def _measure(self, entries: Sequence[Entry]) -> None:
        """Count steps in the meters of this process; it runs in a thread of its own."""
        last, waits = entries[-1][1], self._waits
        metrics.TRAIN_STEPS.add(len(entries))
        metrics.TRAIN_TOKENS.add(len(entries) * self._tokens_per_step)
        metrics.TRAIN_LOSS.set(last["loss"])
        metrics.TRAIN_NORM.set(last["gradient_norm"])
        metrics.TRAIN_RATE.set(last["tokens_per_s"])
        if "mfu" in last:
            metrics.TRAIN_MFU.set(last["mfu"])
        for metric, now, before in zip((metrics.TRAIN_WAIT, metrics.TRAIN_STALL), waits, self._measured, strict=True):
            metric.add(max(0.0, now - before))
        self._measured = waits

    def _tell_the_end(self, is_finished: bool) -> None:
        if self._told:
            self._curve_due = float("-inf")
            self._write_progress()
            self._draw()

    def _write_progress(self) -> None:
        self._bend_curve()
        told = self._told | {"warnings": list(self._warnings)}
        # The time is for a reader: whoever was killed says nothing more, and nothing else tells it from one that waits.
        told |= {
            "at": time.time(),
            "steps": self._steps,
            "tokens_per_step": self._tokens_per_step,
            "curve": self._curve,
        }
        if self._peak is not None:
            told |= {"flops_per_token": self._flops, "peak_flops_per_s": self._peak.flops_per_s}
            told |= {"peak_source": self._peak.source}
        self._storage.write_bytes(json.dumps(told).encode(), *self._folder, PROGRESS, durable=False)

    def _bend_curve(self) -> None:
        """Work the curve out again, the more rarely the longer that takes: all losses are gone through for it."""
        began = time.monotonic()
        if began >= self._curve_due:
            self._curve = curve(list(self._losses))
            ended = time.monotonic()
            self._curve_due = ended + (ended - began) / _CURVE_SHARE

    def _draw(self) -> None:
        from aifactory.train.loss_chart import loss_chart

        chart = loss_chart(curve(list(self._losses)))
        self._storage.write_bytes(chart.encode(), *self._folder, CHART, durable=False)

    def _warn(self, text: str) -> None:
        self._warnings.append(text)
        log_event("warned", of=text)


class _Listener:
    """Somebody who is told of every step, in a thread of its own; the first error ends it."""

    def __init__(
        self,
        name: str,
        log: Callable[[Sequence[Entry]], None],
        *,
        begin: Callable[[], None] | None = None,
        end: Callable[[bool], None] | None = None,
        warn: Callable[[str], None],
    ) -> None:
        self._name, self._warn = name, warn
        self._begin, self._log, self._end = begin, log, end
        self._waiting: queue.SimpleQueue[Entry | bool] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._is_deaf = False
        self._thread = threading.Thread(target=self._listen, name=f"train-{name}", daemon=True)
        self._thread.start()

    def hear(self, entry: Entry) -> None:
        """Take one step's figures; never waits."""
        if self._is_deaf:
            return
        if self._waiting.qsize() > _MOST_WAITING:
            self._give_up(f"it is {_MOST_WAITING:,} steps behind")
        self._waiting.put(entry)

    def stop(self, *, is_finished: bool, deadline: float) -> None:
        """Let it finish what waits, until `deadline` (monotonic seconds)."""
        self._waiting.put(is_finished)
        self._ending.set()
        self._thread.join(max(0.1, deadline - time.monotonic()))
        if self._thread.is_alive() and not self._is_deaf:
            self._give_up(f"it did not end within {_LAST_WORDS_S:g} s")

    def _listen(self) -> None:
        try:
            if self._begin is not None:
                self._begin()
            while True:
                heard = [self._waiting.get()]
                self._ending.wait(_GATHER_S)
                while not self._waiting.empty():
                    heard.append(self._waiting.get())
                entries = [each for each in heard if not isinstance(each, bool)]
                if self._is_deaf:
                    return
                if entries:
                    self._log(entries)
                if isinstance(heard[-1], bool):
                    if self._end is not None:
                        self._end(heard[-1])
                    return
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> None:
        self._is_deaf = True
        self._warn(f"the run is not tracked further by {self._name}, and goes on without it: {reason}")


def curve(losses: Sequence[float], *, points: int = _POINTS) -> list[tuple[int, float]]:
    """At most so many points of a curve: a step, and the mean loss of the steps up to it since the point before.

    A step whose loss is not known (it is no number) is left out.
    """
    width = max(1, -(-len(losses) // points))
    found = []
    for at in range(0, len(losses), width):
        known = [loss for loss in losses[at : at + width] if math.isfinite(loss)]
        if known:
            found.append((min(at + width, len(losses)), sum(known) / len(known)))
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str | float | bool | None]:
    """Settings by dotted names."""
    found: dict[str, str | float | bool | None] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, str | int | float | bool | None) else json.dumps(value)
    return found
