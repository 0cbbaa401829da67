"""Checkpoints: committed or not there; written beside the steps, by every worker its part.

Layout   <folder>/step-00000100/{<attempt>-0-of-2.safetensors, <attempt>-1-of-2.safetensors, COMMITTED}
Law      COMMITTED is written last, by rank 0, when all parts are there; it names them, so that what an earlier attempt has
         left in the folder counts for nothing. A run continues from the newest step that has it, whatever its launcher
         remembers. Nothing is read that can run code: safetensors and JSON.
Whole    The parts together hold whole weights and moments (see `pieces`), so that any number of workers goes on from them,
         by ddp or by fsdp. Each number is written once, and by each worker as many as by any other. What is frozen beside
         adapters is not in them.
Cost     The loop waits for a copy into memory, and where the writing of the checkpoint before has not ended for that; both
         are counted in `stalled_s`.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from aifactory.errors import StorageError
from aifactory.records.storage import Storage
from aifactory.train.pieces import (
    MOMENTS,
    Held,
    PartFile,
    Staging,
    held_moments,
    held_weights,
    hold,
    trained,
    whole_group,
)

State = dict[str, Any]
"""Weights by name, whole, on the CPU."""

_MARKER = "COMMITTED"
# Weights that are not trained are those of the base, which is there anyway.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_SHORTEST_LOOK_S = 0.01
_LONGEST_LOOK_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """What stands in the marker of a checkpoint."""

    step: int
    losses: tuple[float, ...]
    """The latest, the newest last."""
    parts: tuple[str, ...]
    """The names of its files."""


class Checkpoints:
    """The checkpoints of one training run, as one worker reads and writes them.

    keep      so many of the newest are kept
    Leave it as a context: then the last one has been written, or the error that prevented it is raised.
    """

    def __init__(
        self,
        storage: Storage,
        *folder: str,
        keep: int = 2,
    ) -> None:
        self.storage = storage
        self.folder = folder
        self.keep = keep
        self.stalled_s = 0.0
        """How long the loop has waited for checkpoints."""
        self.spared: Callable[[list[int]], set[int]] = lambda _: set()
        """Of the steps of all checkpoints those that are kept beside the newest, for instance the best."""
        self._attempt = ""
        self._staging = Staging()
        self._writing: threading.Thread | None = None
        self._failed: BaseException | None = None
        self._is_left = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
            return
        # The others may never come to write their parts.
        self._is_left.set()
        if self._writing is not None:
            self._writing.join()

    # ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, *, losses: Sequence[float] = ()
    ) -> None:
        """Begin to write the state after `step` steps. All workers must call it, each with its part of the model.

        Raises   StorageError if the checkpoint before could not be written.
        """
        self.wait()
        asked = time.perf_counter()
        if not self._attempt:
            self._attempt = _agreed_name(next(model.parameters()).device)
        data = self._staging.copy(held_weights(model) + held_moments(model, optimizer))
        self._writing = threading.Thread(
            target=self._write, args=(step, data, tuple(losses)), name=f"checkpoint-{step}", daemon=True
        )
        self._writing.start()
        self.stalled_s += time.perf_counter() - asked

    def wait(self) -> None:
        """Until this worker's part of what was begun is written; on rank 0 until it is committed.

        Raises   StorageError if it could not be.
        """
        if self._writing is not None:
            asked = time.perf_counter()
            self._writing.join()
            self._writing = None
            self.stalled_s += time.perf_counter() - asked
        self.require_written()

    def require_written(self) -> None:
        """Raise what has gone wrong with the writing so far; it doesn't wait."""
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed

    def _write(self, step: int, data: memoryview, losses: tuple[float, ...]) -> None:
        try:
            rank, workers = whole_group()
            parts = [f"{self._attempt}-{each}-of-{workers}.safetensors" for each in range(workers)]
            self.storage.write_bytes(data, *self.folder, _name(step), parts[rank])
            if rank == 0 and self._all_there(step, parts):
                marker = json.dumps({"step": step, "losses": losses, "parts": parts})
                self.storage.write_bytes(marker.encode(), *self.folder, _name(step), _MARKER)
                self._delete_old()
        except BaseException as error:
            self._failed = error

    def _all_there(self, step: int, parts: Sequence[str]) -> bool:
        """Wait until all workers have written their parts; False if the run is left before."""
        pause = _SHORTEST_LOOK_S
        while not set(parts) <= set(self.storage.names(*self.folder, _name(step))):
            if self._is_left.wait(pause):
                return False
            pause = min(2 * pause, _LONGEST_LOOK_S)
        return True

    def _delete_old(self) -> None:
        steps = self.committed()
        for old in sorted(set(steps[: -self.keep]) - self.spared(steps)):
            # Without its marker a half-deleted checkpoint can't be taken for a whole one.
            self.storage.delete_file(*self.folder, _name(old), _MARKER)
            self.storage.delete(*self.folder, _name(old))

    # ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def committed(self) -> list[int]:
        """The steps of all committed checkpoints, ascending."""
        return sorted(
            int(name.removeprefix("step-"))
            for name in self.storage.names(*self.folder)
            if name.startswith("step-") and self.storage.size(*self.folder, name, _MARKER) is not None
        )

    def marker(self, step: int) -> Committed:
        """What a committed checkpoint says of itself."""
        data = self.storage.read_bytes(*self.folder, _name(step), _MARKER)
        if data is None:
            raise StorageError(
                f"expected a checkpoint in {self.storage.path(*self.folder, _name(step))}, found none; begin the run again."
            )
        told = json.loads(data)
        return Committed(step=told["step"], losses=tuple(told["losses"]), parts=tuple(told["parts"]))

    def load(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Committed:
        """Fill the model, and the optimiser where one is given, each worker its part, from a committed checkpoint.

        Raises   StorageError if it does not hold all of them.
        """
        marker = self.marker(step)
        held = held_weights(model)
        sizes: dict[str, int] = {}
        for part in marker.parts:
            with self.storage.open_file(*self.folder, _name(step), part) as file:
                sizes |= PartFile(cast("Any", file)).sizes
        moments: Mapping[nn.Parameter, Mapping[str, torch.Tensor]] = {}
        if optimizer is not None:
            moments = _empty_moments(model, sizes)
            names = {parameter: name for name, parameter in trained(model)}
            held += [
                hold(f"{MOMENTS}{key}/{names[p]}", value)
                for p, state in moments.items()
                for key, value in state.items()
            ]
        self._fill(step, marker.parts, held, sizes)
        if optimizer is not None:
            _take_over(optimizer, moments)
        return marker

    def _fill(self, step: int, parts: Sequence[str], held: Sequence[Held], sizes: Mapping[str, int]) -> None:
        missing = {each.name: len(each.values) for each in held}
        wrong = [each.name for each in held if sizes.get(each.name) != each.size]
        for part in parts:
            if wrong:
                break
            with self.storage.open_file(*self.folder, _name(step), part) as file, torch.no_grad():
                for name, count in PartFile(cast("Any", file)).fill(held).items():
                    missing[name] -= count
        wrong += [name for name, count in missing.items() if count]
        if wrong:
            where = self.storage.path(*self.folder, _name(step))
            raise StorageError(
                f"expected all of {wrong[0]} in the checkpoint {where}, found a part of it, or another size; delete that folder "
                "and run the same command again."
            )


def restore(checkpoints: Checkpoints, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, list[float]]:
    """Load the newest committed state, each worker its part; return its step and losses, 0 and none where there is none.

    All workers must call it: what is being written is finished first, and all take the same.
    """
    checkpoints.wait()
    steps = checkpoints.committed()
    step = max(steps, default=0)
    if distributed.is_initialized():
        # Rank 0 has waited for its marker; another may have looked before it was there.
        newest = torch.tensor(step, device=next(model.parameters()).device)
        distributed.broadcast(newest, src=0)
        step = int(newest)
    if not step:
        return 0, []
    return step, list(checkpoints.load(step, model, optimizer).losses)


def whole_state(model: nn.Module) -> State:
    """The weights that are trained, whole, on the CPU. All workers must call it; rank 0 has what it returns.

    Weights that are tied are named once, as safetensors wants it.
    """
    names = {name for name, each in model.named_parameters() if each.requires_grad}
    names |= {name for name, _ in model.named_buffers()}
    state: dict[str, Any] = get_model_state_dict(model, options=_WHOLE)
    return {name: value.contiguous() for name, value in state.items() if name in names}


def _empty_moments(model: nn.Module, sizes: Mapping[str, int]) -> dict[nn.Parameter, dict[str, torch.Tensor]]:
    """Room for the states of which a checkpoint tells: as their parameter is, or one number."""
    moments: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
    parameters = dict(trained(model))
    for name in sorted(sizes):
        if not name.startswith(MOMENTS):
            continue
        key, _, of = name.removeprefix(MOMENTS).partition("/")
        parameter = parameters.get(of)
        if parameter is None:
            continue  # of something that is trained no more
        is_like_it = key != "step" and sizes[name] == parameter.numel()
        room = torch.zeros_like(parameter, requires_grad=False) if is_like_it else torch.zeros(sizes[name])
        moments.setdefault(parameter, {})[key] = room if is_like_it or sizes[name] > 1 else room.view(())
    return moments


def _take_over(optimizer: torch.optim.Optimizer, moments: Mapping[nn.Parameter, Mapping[str, torch.Tensor]]) -> None:
    """Give the optimiser these states; it puts each where it belongs."""
    state = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {i: dict(moments[p]) for i, p in enumerate(parameters) if p in moments}
    optimizer.load_state_dict({"state": states, "param_groups": state["param_groups"]})


def _agreed_name(device: torch.device) -> str:
    """A name of this start of the run, the same on all workers, that no other start has."""
    number = torch.tensor(secrets.randbits(62), device=device)
    if distributed.is_initialized():
        distributed.broadcast(number, src=0)
    return f"{int(number):016x}"


def _name(step: int) -> str:
    return f"step-{step:08d}"
