"""Graphs: what computes in the same memory again and again, as one CUDA graph.

Source   https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Graphs:
    """Of one device; they share their memory, so what one gave is valid until the next runs. On a CPU the same is done without."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def capture(
        self, compute: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor], idle: Sequence[float]
    ) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """What computes it again, and where its results will be.

        inputs   what it reads, and may change. They are as before when this returns.
        idle     what each of them is filled with while it is tried: kernels are compiled, chosen and loaded by running them
        """
        kept = [each.clone() for each in inputs]
        for buffer, value in zip(inputs, idle, strict=True):
            buffer.fill_(value)
        try:
            return self._captured(compute) if self._device.type == "cuda" else _repeated(compute)
        finally:
            for buffer, before in zip(inputs, kept, strict=True):
                buffer.copy_(before)

    def _captured(self, compute: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                compute()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, as those that load the next release, may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = compute()
        return graph.replay, results


def _repeated(compute: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
    results = [each.clone() for each in compute()]

    def run() -> None:
        for result, each in zip(results, compute(), strict=True):
            result.copy_(each)

    return run, results
