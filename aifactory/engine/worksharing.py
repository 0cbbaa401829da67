"""Worksharing: how the threads that run a kernel side by side divide its work, and wait for one another.

Each takes some panels of a matrix after others, until none are left. A thread that waits for long gives its processor away, so that a
busy machine costs little.
"""

from __future__ import annotations

from typing import Any

from numba.core import types
from numba.extending import intrinsic

from aifactory.engine.compilation import kernel
from aifactory.engine.vectors import PANEL

SYNC_SIZE = 24
"""Elements of `sync`, int64, zeros at first."""
PANELS_AT_LEAST = 4
_PANELS_AT_ONCE = 32


@intrinsic
def fetch_add(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Add to an element of an int64 array; what it was before. Atomic."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [args[1]]), args[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), generate


_yield_processor = types.ExternalFunction("sched_yield", types.int32())
_SPINS = 2_000
"""About 10 µs; a barrier between threads that all run takes less than one."""


@kernel
def wait_for_all(sync: Any, num_threads: int) -> None:
    """A barrier: sync[0] counts who is there, sync[8] how often all were, sync[16] what was taken of the work since (on cache lines
    of their own)."""
    if num_threads == 1:
        sync[16] = 0
        return
    turn = fetch_add(sync, 8, 0)
    if fetch_add(sync, 0, 1) == num_threads - 1:
        fetch_add(sync, 0, -num_threads)
        fetch_add(sync, 16, -fetch_add(sync, 16, 0))
        fetch_add(sync, 8, 1)
        return
    spins = 0
    while fetch_add(sync, 8, 0) == turn:
        spins += 1
        if spins > _SPINS:
            _yield_processor()


@kernel
def part_of(size: int, thread: int, num_threads: int) -> tuple[int, int]:
    """The rows of a matrix that are a thread's: whole panels."""
    panels = size // PANEL
    return PANEL * (panels * thread // num_threads), PANEL * (panels * (thread + 1) // num_threads)


@kernel
def next_part(sync: Any, num_panels: int, num_threads: int, least: int) -> tuple[int, int]:
    """The panels of a matrix that whoever asks takes next, until the next barrier, at least so many: on a machine that others use too
    a thread that was held up takes less. None where all are taken."""
    step = max(least, min(_PANELS_AT_ONCE, num_panels // (4 * num_threads) // least * least))
    begin = min(num_panels, fetch_add(sync, 16, step))
    return begin, min(num_panels, begin + step)


@kernel
def next_of(sync: Any) -> int:
    """The number of the next piece of work, likewise."""
    return fetch_add(sync, 16, 1)
