"""DecodeSteps: decode steps whose inputs and outputs stay in the same memory, so that each can be one CUDA graph.

    feed ─▶ ids, positions, rows ─▶ forward ─▶ logits ─▶ the likeliest token of each row ─▶ ids, and a copy for the CPU
            └──────────────────────────────── one graph ──────────────────────────────────┘

Why      a step of a model of a billion parameters is some hundred kernels of a few microseconds: launched one by one they take
         ten times as long as they run. Of greedy rows the next step needs nothing from the CPU, so it is begun before the
         CPU has looked at the last one (`ahead`); what was begun in vain is not used.
Graphs   one for each size of batch (1, 2, 4, 8, then every 8, all slots) and each extent of reading that a forward tells apart. They are
         captured when they are first needed, which takes a fraction of a second, and share their memory.
Padding  rows that fill up a batch write to the cache's spare row, which belongs to nobody.
Shapes   B rows of a step, S num_slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from aifactory.engine.cache import SlotCache
from aifactory.engine.graphs import Graphs
from aifactory.engine.sampling import NOT_FINITE

_FEW = (1, 2, 4, 8)
_MULTIPLE = 8
_MOST_PARTS = 256


class DecodeForward(Protocol):
    """Computes one token of each row; the same calls in the same order whatever the inputs hold."""

    def extent(self, longest: int) -> int:
        """How much is read so that a row of `longest` positions is; few different ones, as each has graphs of its own."""

    def __call__(self, ids_B1: Tensor, positions_B: Tensor, rows_B: Tensor, extent: int) -> Tensor:
        """Write the tokens at their positions of the cache's rows; the logits (B, V) after them."""


class DecodeSteps:
    """Steps of the first rows of a cache. On a CPU the same is done without graphs."""

    def __init__(self, forward: DecodeForward, cache: SlotCache, *, device: torch.device | str) -> None:
        """The cache must be allocated."""
        self._forward = forward
        self._cache = cache
        self._device = torch.device(device)
        is_cuda = self._device.type == "cuda"
        most = cache.num_slots
        self._ids_S1 = torch.zeros(most, 1, dtype=torch.int64, device=device)
        self._positions_S = torch.zeros(most, dtype=torch.int64, device=device)
        self._rows_S = torch.full((most,), cache.spare_row, dtype=torch.int64, device=device)
        self._told_S = torch.zeros(most, dtype=torch.int64, pin_memory=is_cuda)
        self._num_rows = 0
        self._graphs: dict[tuple[int, int], tuple[Callable[[], None], Tensor]] = {}
        self._of_device = Graphs(self._device)
        self._done = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]
        self._ahead: Tensor | None = None

    def feed(self, ids_B: Tensor, positions_B: Tensor) -> None:
        """What the next step writes, and where: after rows have come or gone."""
        self._ahead = None
        self._num_rows = num_rows = len(ids_B)
        for buffer, values_B, rest in (
            (self._ids_S1[:, 0], ids_B, 0),
            (self._positions_S, positions_B, 0),
            (self._rows_S, torch.arange(num_rows, device=self._device), self._cache.spare_row),
        ):
            buffer[:num_rows] = values_B
            buffer[num_rows:] = rest

    def step(self, longest: int) -> Tensor:
        """Take it; the logits (B, V), valid until the next step.

        longest   positions of the longest row, this token counted in
        After it every row goes on with its likeliest token, unless `put` says otherwise.
        """
        logits_BV, self._ahead = self._ahead, None
        if logits_BV is None:
            logits_BV = self._begin(longest)
        return logits_BV

    def likeliest(self) -> list[int]:
        """The token of each row with the largest logit, NOT_FINITE where there is none. Waits for the step."""
        if self._done is not None:
            self._done.synchronize()
        told: list[int] = self._told_S[: self._num_rows].tolist()
        return told

    def begin_next(self, longest: int) -> None:
        """Begin the step after this one, whose tokens are the likeliest, before anybody asks for it.

        longest   as `step` would be told. After `likeliest` only; a step that does not fit into the cache is not begun.
        """
        if longest <= self._cache.num_positions:
            self._ahead = self._begin(longest)

    def put(self, ids_B: Tensor) -> None:
        """What each row goes on with, where it is not the likeliest."""
        self._ids_S1[: self._num_rows, 0] = ids_B.clamp(min=0)

    def _begin(self, longest: int) -> Tensor:
        self._cache.touch(longest)
        key = min(_padded(self._num_rows), self._cache.num_slots), self._forward.extent(longest)
        if key not in self._graphs:
            self._graphs[key] = self._captured(*key)
        run, logits_BV = self._graphs[key]
        run()
        if self._done is not None:
            self._done.record()
        return logits_BV[: self._num_rows]

    def _captured(self, num_rows: int, extent: int) -> tuple[Callable[[], None], Tensor]:
        """What takes a step of so many rows, and where its logits will be. It is tried on rows that nobody reads."""
        run, (logits_BV,) = self._of_device.capture(
            lambda: [self._take(num_rows, extent)],
            inputs=(self._ids_S1, self._positions_S, self._rows_S),
            idle=(0, 0, self._cache.spare_row),
        )
        return run, logits_BV

    def _take(self, num_rows: int, extent: int) -> Tensor:
        ids_B1, positions_B = self._ids_S1[:num_rows], self._positions_S[:num_rows]
        logits_BV = self._forward(ids_B1, positions_B, self._rows_S[:num_rows], extent)
        top_B, best_B = _largest(logits_BV)
        self._told_S[:num_rows].copy_(torch.where(torch.isfinite(top_B), best_B, NOT_FINITE), non_blocking=True)
        ids_B1.copy_(best_B[:, None])
        positions_B += 1
        return logits_BV


def _padded(num_rows: int) -> int:
    return next((each for each in _FEW if each >= num_rows), -(-num_rows // _MULTIPLE) * _MULTIPLE)


def _largest(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row and where it is, in two stages: of few long rows one stage keeps few processors busy."""
    num_rows, width = logits_BV.shape
    parts = next((each for each in range(_MOST_PARTS, 1, -1) if width % each == 0), 1)
    if parts == 1:
        top_B, best_B = logits_BV.max(dim=-1)
        return top_B, best_B
    tops_BP, bests_BP = logits_BV.reshape(num_rows, parts, width // parts).max(dim=-1)
    top_B, part_B = tops_BP.max(dim=-1)
    return top_B, part_B * (width // parts) + bests_BP.gather(1, part_B[:, None])[:, 0]
