"""Exchange: how the workers of FSDP2 pass shards on over gloo: each to each, without a copy between.

torch's gloo copies what it gathers, and sums all of what it scatters: for 17 million numbers between two workers it took 180 and
187 ms, where sending half of them while the other half is taken took 40 (torch 2.13, two CPUs; benchmarks/train_exchange.py).
A sum is taken in the order of the workers, wherever it lies in memory.

Legend   W workers, S numbers of one worker's shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed.fsdp import FSDPModule

from aifactory.errors import TrainingError

# Which of two exchanges under way a message belongs to.
_GATHER, _SCATTER = 1, 2


def exchange_directly(module: FSDPModule) -> None:
    """Let a module that `fully_shard` has made pass its shards on in this way."""
    module.set_custom_all_gather(_AllGather())  # type: ignore[arg-type]
    module.set_custom_reduce_scatter(_ReduceScatter())  # type: ignore[arg-type]


class _Allocates:
    """What torch's `Comm` asks for; its class has no public name in torch 2.13."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Allocates):
    """Every worker's shard to every worker."""

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False
    ) -> distributed.Work:
        """`input_tensor` (S) of all workers in `output_tensor` (W * S), once it was waited for, as FSDP2 does in any case."""
        shards_WS = output_tensor.view(distributed.get_world_size(group), -1)
        mine_S = shards_WS[distributed.get_rank(group)]
        if mine_S.data_ptr() != input_tensor.data_ptr():
            mine_S.copy_(input_tensor)
        return _Transfers(_exchange([mine_S] * len(shards_WS), shards_WS, group, _GATHER))


class _ReduceScatter(_Allocates):
    """To every worker the sum, or the mean, of all workers' numbers for its shard."""

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """`input_tensor` (W * S) of all workers in `output_tensor` (S).

        Raises   TrainingError for another operation.
        """
        if op not in (distributed.ReduceOp.SUM, distributed.ReduceOp.AVG):
            raise TrainingError(f"expected a sum or a mean of gradients over gloo, found {op}.")
        rank, num_workers = distributed.get_rank(group), distributed.get_world_size(group)
        given_WS = input_tensor.view(num_workers, -1)
        taken_WS = torch.empty_like(given_WS)
        transfers = _exchange(given_WS, taken_WS, group, _SCATTER)
        for transfer in transfers:
            transfer.wait()
        shards = [given_WS[rank] if other == rank else taken_WS[other] for other in range(num_workers)]
        output_tensor.copy_(shards[0])
        for shard_S in shards[1:]:
            output_tensor.add_(shard_S)
        if op == distributed.ReduceOp.AVG:
            output_tensor.div_(num_workers)


class _Transfers(distributed.Work):
    """Several transfers that are waited for as one."""

    def __init__(self, transfers: Sequence[Any]) -> None:
        super().__init__()
        self._transfers = transfers

    def wait(self, timeout: timedelta | None = None) -> bool:
        for transfer in self._transfers:
            transfer.wait()
        self._transfers = ()
        return True


def _exchange(given: Sequence[torch.Tensor] | torch.Tensor, taken_WS: torch.Tensor, group: Any, tag: int) -> list[Any]:
    """Begin to send `given[w]` to each other worker w, and to take what it sends into `taken_WS[w]`."""
    rank, num_workers = distributed.get_rank(group), distributed.get_world_size(group)
    begun: list[Any] = []
    for distance in range(1, num_workers):
        to, of = (rank + distance) % num_workers, (rank - distance) % num_workers
        begun.append(distributed.isend(given[to], group=group, group_dst=to, tag=tag))
        begun.append(distributed.irecv(taken_WS[of], group=group, group_src=of, tag=tag))
    return begun
