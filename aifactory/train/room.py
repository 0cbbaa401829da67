"""Room: how many rows fit into memory at once. Pure torch.

A micro-batch that is too large is halved, and the run goes on from its newest checkpoint with the same global batch. Workers
that share a step can't leave it one by one, so the run ends and is begun again: by `work` where there is one worker, by
whoever placed them where there are several.

Writes   <run folder>/micro_batch.json   {"rows"}: the most rows that are tried from now on
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from aifactory.errors import TrainingError
from aifactory.observe.events import log_event
from aifactory.records.storage import Storage

_FILE = "micro_batch.json"
_CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"  # torch 2.13, c10/core/impl/alloc_cpu.cpp


class NoRoomError(TrainingError):
    """A micro-batch does not fit into memory; begun again, the run takes smaller ones."""


class Room:
    """What a run has learnt about the memory of its workers."""

    def __init__(self, storage: Storage, *folder: str) -> None:
        self._storage = storage
        self._folder = folder

    def rows(self, asked: int) -> int:
        """As many rows as were asked for, or as fit."""
        data = self._storage.read_bytes(*self._folder, _FILE)
        return asked if data is None else min(asked, int(json.loads(data)["rows"]))

    @contextmanager
    def watched(self, rows: int, *, is_fixed: bool) -> Iterator[None]:
        """Around the work on a micro-batch of so many rows. is_fixed: it bears identity and must not be halved.

        Raises   NoRoomError after noting that half of them are to be tried; TrainingError where that can't be.
        """
        try:
            yield
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError) and _CPU_ALLOCATOR not in str(error):
                raise
            if is_fixed or rows == 1:
                why = "train.reproducible: across_workers fixes it" if is_fixed else "one row is the least"
                raise TrainingError(
                    f"expected room for a micro-batch of {rows} rows, found none, and it can't be halved: {why}. Lower "
                    f"tokenize.row_len or train.micro_batch_rows, or take a smaller model or a larger machine. {error}"
                ) from error
            half = rows // 2
            self._storage.write_bytes(json.dumps({"rows": half}).encode(), *self._folder, _FILE)
            log_event("halved", micro_batch_rows=half, because=f"{rows} rows do not fit into memory")
            raise NoRoomError(
                f"expected room for a micro-batch of {rows} rows, found none; begun again, the run takes {half}, and as many "
                "more of them: the global batch stays."
            ) from error
