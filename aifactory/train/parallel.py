"""Parallel: how the workers of a run share a step. Pure torch.

alone   one worker
ddp     each holds the whole model; gradients are summed while the last backward pass runs
fsdp    FSDP2: each holds a part of every block's weights, gradients and optimiser states, and gathers a block when it
        is its turn (Zhao et al. 2023, "PyTorch FSDP", VLDB 16; torch.distributed.fsdp.fully_shard)
tree    each holds the whole model; gradients are summed in one binary tree over the micro-batches of the global batch,
        so that the weights are the same to the bit for 1, 2, 4... of them

Law      After `reduce` every worker has the gradient of the mean loss over the tokens with loss of the whole batch (of its
         part of the weights, for fsdp), and knows that loss.

Legend   M micro-batches in a global batch, W workers, G numbers in all gradients together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from aifactory.errors import TrainingError
from aifactory.train.exchange import exchange_directly
from aifactory.train.step import Precision

# Where all CPUs compute, nothing is won by sums that run beside a backward pass, and each begin costs.
_BUCKET_MB_OF_GLOO = 100


class Alone:
    """One worker."""

    scale = 1.0
    """What a loss is multiplied by before its backward pass."""

    def __init__(self, model: nn.Module, device: torch.device, precision: Precision) -> None:
        self.forward: Callable[..., Any] = model
        """What is called for logits."""
        self._model = model
        self._device = device
        self.precision: Precision = precision
        """Of the products, for whoever computes the loss."""
        self._loss = torch.zeros((), device=device)

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Around the forward and the backward pass of one micro-batch."""
        return nullcontext()

    def frozen(self, model: nn.Module) -> nn.Module:
        """Another model of the same kind that is not trained, shared in the same way."""
        return model

    def add(self, loss: torch.Tensor) -> None:
        """Note the share of one micro-batch in the mean loss, after its backward pass."""
        self._loss += loss.detach()

    def reduce(self) -> float:
        """Bring the workers together; the loss of the whole batch."""
        loss, self._loss = self._loss, torch.zeros((), device=self._device)
        self._sum(loss)
        return float(loss)

    def _sum(self, loss: torch.Tensor) -> None:
        """Over all workers, in place."""


class Ddp(Alone):
    """Each worker holds the whole model."""

    def __init__(self, model: nn.Module, device: torch.device, precision: Precision, *, gradients: str) -> None:
        super().__init__(model, device, precision)
        self.scale = float(distributed.get_world_size())  # DDP divides the summed gradients by it
        self._wrapped = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            # Rotary frequencies are the only buffers and never change.
            broadcast_buffers=False,
            bucket_cap_mb=None if device.type == "cuda" else _BUCKET_MB_OF_GLOO,
            # After its first step torch orders the buckets anew, unless it looks for unused parameters. Of more than two
            # workers a sum's order depends on its place in a bucket: a run that was begun again would have other bits.
            find_unused_parameters=distributed.get_world_size() > 2,
        )
        if gradients == "bf16":
            # Without annotations: torch compares them as objects, and here they are texts.
            self._wrapped.register_comm_hook(None, lambda _, bucket: _mean_in_bf16(bucket))
        self.forward = self._wrapped

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext() if is_last else self._wrapped.no_sync()

    def _sum(self, loss: torch.Tensor) -> None:
        distributed.all_reduce(loss)


def _mean_in_bf16(bucket: Any) -> Any:
    """A bucket's mean over the workers, exchanged in bf16. torch's own hook of this kind refuses gloo, which can do it."""
    rounded = bucket.buffer().to(torch.bfloat16).div_(distributed.get_world_size())
    summed = distributed.all_reduce(rounded, async_op=True).get_future()

    def widened(done: Any) -> Any:
        return bucket.buffer().copy_(done.value()[0])

    return summed.then(widened)


class Fsdp(Alone):
    """Each worker holds a part of every block.

    shard_workers   so many workers hold one copy of the model between them (hybrid sharding: only gradients cross from
                    one such group to the next); None: all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        precision: Precision,
        *,
        gradients: str,
        shard_workers: int | None = None,
    ) -> None:
        super().__init__(model, device, precision)
        workers = distributed.get_world_size()
        self.scale = float(workers)  # FSDP2 divides the summed gradients by it
        shape: tuple[int, ...] = (workers,)
        names: tuple[str, ...] = ("shard",)
        if shard_workers is not None and shard_workers != workers:
            if workers % shard_workers:
                raise TrainingError(
                    f"expected runtime.shard_workers to divide the number of workers, found {shard_workers} and {workers}."
                )
            shape, names = (workers // shard_workers, shard_workers), ("replicate", "shard")
        self._options: dict[str, Any] = {"mesh": init_device_mesh(device.type, shape, mesh_dim_names=names)}
        # Gathered and multiplied in bf16 where it is the precision; summed over workers in fp32 unless asked otherwise.
        self._options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if precision == "bf16" else None,
            reduce_dtype=torch.bfloat16 if gradients == "bf16" else torch.float32,
        )
        if precision == "bf16":
            self.precision = "fp32"  # of what is done outside: nothing is left to cast
        self._sharded: FSDPModule = self._shard(model)

    def _shard(self, model: nn.Module) -> Any:
        names = set(getattr(model, "_no_split_modules", None) or ())
        blocks: list[Any] = [module for module in model.modules() if type(module).__name__ in names]
        for block in blocks:
            fully_shard(block, **self._options)
        sharded: Any = fully_shard(model, **self._options)
        if self._device.type == "cpu":
            for module in (sharded, *blocks):
                exchange_directly(module)
            # On CUDA the host runs ahead; here each block is asked for while the one before it computes.
            for module, following in zip((sharded, *blocks), blocks, strict=False):
                module.set_modules_to_forward_prefetch([following])
        return sharded

    def frozen(self, model: nn.Module) -> nn.Module:
        sharded: nn.Module = self._shard(model)
        return sharded

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        self._sharded.set_requires_gradient_sync(is_last)
        yield

    def _sum(self, loss: torch.Tensor) -> None:
        distributed.all_reduce(loss)


class Tree(Alone):
    """Gradients are summed in one binary tree over the micro-batches, whoever computes them.

    A worker sums a whole subtree by itself, of which it holds at most one sum of each height; then workers exchange theirs
    by twos, fours and so on, so that all end with the root. Floating-point addition commutes, so both of a pair get the
    same bits. Holds (log2(M / W) + 2) G numbers in fp32.

    Raises   TrainingError where the workers' shares of the batch are no subtrees.
    """

    def __init__(self, model: nn.Module, device: torch.device, precision: Precision, *, num_micro_batches: int) -> None:
        super().__init__(model, device, precision)
        self._workers = distributed.get_world_size() if distributed.is_initialized() else 1
        self._rank = distributed.get_rank() if distributed.is_initialized() else 0
        for what, count in (("micro-batches in a global batch", num_micro_batches), ("workers", self._workers)):
            if count & (count - 1):
                raise TrainingError(
                    f"expected a power of two of {what} for train.reproducible: across_workers, found {count}; change "
                    "train.global_batch_rows, train.micro_batch_rows or runtime.workers."
                )
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self._row_G = torch.empty(0)
        self._sums: list[tuple[int, torch.Tensor]] = []

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        # Gradients are made in one row of numbers; the last one is the loss.
        self._row_G = torch.zeros(sum(self._sizes) + 1, device=self._device)
        self._hand_out()
        yield

    def add(self, loss: torch.Tensor) -> None:
        self._row_G[-1] = loss.detach()
        height, total_G = 0, self._row_G
        while self._sums and self._sums[-1][0] == height:
            _, left_G = self._sums.pop()
            total_G = left_G.add_(total_G)
            height += 1
        self._sums.append((height, total_G))

    def reduce(self) -> float:
        ((_, self._row_G),) = self._sums
        self._sums = []
        distance = 1
        while distance < self._workers:
            self._row_G += self._exchanged(self._row_G, self._rank ^ distance)
            distance *= 2
        self._hand_out()
        return float(self._row_G[-1])

    def _exchanged(self, mine_G: torch.Tensor, other: int) -> torch.Tensor:
        theirs_G = torch.empty_like(mine_G)
        wanted = [
            distributed.P2POp(distributed.isend, mine_G, other),
            distributed.P2POp(distributed.irecv, theirs_G, other),
        ]
        for request in distributed.batch_isend_irecv(wanted):
            request.wait()
        return theirs_G

    def _hand_out(self) -> None:
        pieces = torch.split(self._row_G[:-1], self._sizes)
        for parameter, piece in zip(self._parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)


def share(
    how: str,
    model: nn.Module,
    device: torch.device,
    precision: Precision,
    *,
    world_size: int,
    shard_workers: int | None,
    gradients: str,
    num_micro_batches: int | None,
) -> Alone:
    """What `how` (`runtime.parallel`) says; the tree where the recipe fixes the micro-batches (`num_micro_batches`).

    gradients   `fp32` or `bf16`: in what they cross from worker to worker; the tree's always cross in fp32
    """
    if num_micro_batches is not None:
        return Tree(model, device, precision, num_micro_batches=num_micro_batches)
    if world_size == 1:
        return Alone(model, device, precision)
    if how == "fsdp":
        return Fsdp(model, device, precision, shard_workers=shard_workers, gradients=gradients)
    return Ddp(model, device, precision, gradients=gradients)
