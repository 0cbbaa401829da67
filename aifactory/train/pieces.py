"""Pieces: the part of weights and moments that a worker holds, in a form that does not depend on how they are shared.

A piece is a flat range of one whole tensor, in row-major order. What a worker holds of a tensor (all of it under DDP, some
rows under FSDP2) is such a range, and where several workers hold the same range, each writes its share of it. So whoever
reads needs overlaps of ranges alone, whatever the number of workers was, and whatever it is now.

File     safetensors: every piece as a flat tensor under its name; in the metadata `starts`, by name where it begins in the
         whole tensor, and `sizes`, how many numbers that has (JSON, since metadata are texts)
Names    weights/<parameter or buffer>, moments/<key of the optimiser's state>/<parameter>
Source   the format: huggingface.co/docs/safetensors, "Format"
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

WEIGHTS = "weights/"
MOMENTS = "moments/"
_DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NAMED = {name: dtype for dtype, name in _DTYPES.items()}
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What compiling and recomputing put into the names of parameters."""
_READ_BYTES = 64 << 20
_GAP_BYTES = 1 << 20
"""So many bytes that nobody needs are read rather than asked for around."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What this worker holds of one whole tensor: the numbers from `start` on, in row-major order."""

    name: str
    values: torch.Tensor
    """Flat; it shares its memory with the parameter, the buffer or the moment."""
    start: int
    size: int
    """Numbers in the whole tensor."""
    replica: int = 0
    replicas: int = 1
    """So many workers hold the same, this one as number `replica`."""

    def share(self) -> Held:
        """The part of it that this worker writes."""
        begin, end = (len(self.values) * which // self.replicas for which in (self.replica, self.replica + 1))
        return Held(name=self.name, values=self.values[begin:end], start=self.start + begin, size=self.size)


def hold(name: str, tensor: torch.Tensor) -> Held:
    """What this worker holds of a tensor: a DTensor's part, or all of one that every worker has."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        rank, workers = whole_group()
        return Held(name=name, values=tensor.view(-1), start=0, size=tensor.numel(), replica=rank, replicas=workers)
    mesh, placements = tensor.device_mesh, tensor.placements
    wrong = [p for p in placements if p.is_partial() or (isinstance(p, Shard) and p.dim != 0)]
    assert not wrong, f"expected {name} to be sharded by rows, found {placements}"
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    local = tensor.to_local()
    replica, replicas = 0, 1
    for dimension, placement in enumerate(placements):
        if placement.is_replicate():
            replica = replica * mesh.size(dimension) + mesh.get_local_rank(dimension)
            replicas *= mesh.size(dimension)
    row = tensor.numel() // max(1, tensor.shape[0]) if tensor.dim() else 1
    start = (offset[0] if offset else 0) * row
    return Held(name=name, values=local.view(-1), start=start, size=tensor.numel(), replica=replica, replicas=replicas)


def held_weights(model: nn.Module) -> list[Held]:
    """What is trained, and the buffers that belong to the state. What is frozen is what the run began with."""
    found = [hold(WEIGHTS + name, parameter) for name, parameter in trained(model)]
    for prefix, module in model.named_modules():
        passing = module._non_persistent_buffers_set
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in passing:
                found.append(hold(f"{WEIGHTS}{plain(prefix + '.' if prefix else '')}{name}", buffer))
    return found


def held_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Held]:
    """The optimiser's states of what is trained."""
    return [
        hold(f"{MOMENTS}{key}/{name}", value)
        for name, parameter in trained(model)
        for key, value in optimizer.state.get(parameter, {}).items()
    ]


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are trained, by their plain names; tied ones once."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield plain(name), parameter


def plain(name: str) -> str:
    """The name of a parameter in a model that nothing wraps."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def whole_group() -> tuple[int, int]:
    """This worker's number, and how many there are."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Staging:
    """Memory for one part of a checkpoint, already in the form of its file; it is used again for the next."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def copy(self, held: Sequence[Held]) -> memoryview:
        """The file with this worker's share of what it holds. Valid until the next call."""
        pieces = [piece for piece in (each.share() for each in held) if len(piece.values)]
        # Wide numbers first: then all of them are aligned, and the format allows no holes.
        pieces.sort(key=lambda piece: -piece.values.element_size())
        header: dict[str, Any] = {
            "__metadata__": {
                "starts": json.dumps({piece.name: piece.start for piece in pieces}),
                "sizes": json.dumps({piece.name: piece.size for piece in pieces}),
            }
        }
        at = 0
        for piece in pieces:
            end = at + piece.values.nbytes
            shape = [len(piece.values)]
            header[piece.name] = {"dtype": _DTYPES[piece.values.dtype], "shape": shape, "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        begin = 8 + len(text)
        on_gpu = any(piece.values.is_cuda for piece in pieces)
        if len(self._bytes) != begin + at:
            self._bytes = torch.empty(begin + at, dtype=torch.uint8, pin_memory=on_gpu)
        view = self._bytes.numpy().data
        view[:8] = len(text).to_bytes(8, "little")
        view[8:begin] = text
        for piece in pieces:
            end = begin + piece.values.nbytes
            self._bytes[begin:end].view(piece.values.dtype).copy_(piece.values, non_blocking=True)
            begin = end
        if on_gpu:
            torch.cuda.synchronize()
        return view


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """One piece in a file."""

    name: str
    start: int
    count: int
    dtype: torch.dtype
    at: int
    """Where its bytes begin in the file."""


class PartFile:
    """One part of a checkpoint, read from an open file that can seek."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__")
        starts = json.loads(metadata["starts"])
        self.sizes: Mapping[str, int] = json.loads(metadata["sizes"])
        """By name how many numbers the whole tensor has, of those of which this file holds a piece."""
        self._pieces = {
            name: _Stored(
                name=name,
                start=starts[name],
                count=entry["shape"][0],
                dtype=_NAMED[entry["dtype"]],
                at=8 + length + entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }

    def fill(self, held: Sequence[Held]) -> dict[str, int]:
        """Copy into `held` what this file has of it; by name how many numbers that were."""
        wanted: list[tuple[int, int, torch.Tensor, torch.dtype]] = []
        counts: dict[str, int] = {}
        for each in held:
            piece = self._pieces.get(each.name)
            if piece is None:
                continue
            begin = max(each.start, piece.start)
            end = min(each.start + len(each.values), piece.start + piece.count)
            if begin < end:
                counts[each.name] = end - begin
                at = piece.at + (begin - piece.start) * piece.dtype.itemsize
                target = each.values[begin - each.start : end - each.start]
                wanted.append((at, at + (end - begin) * piece.dtype.itemsize, target, piece.dtype))
        for run in _runs(sorted(wanted, key=lambda entry: entry[0])):
            first, last = run[0][0], run[-1][1]
            data = torch.empty(last - first, dtype=torch.uint8)
            self._file.seek(first)
            _read_into(self._file, data.numpy().data)
            for at, end, target, dtype in run:
                target.copy_(data[at - first : end - first].view(dtype))
        return counts


def _runs(wanted: Sequence[tuple[int, int, torch.Tensor, torch.dtype]]) -> Iterator[list[Any]]:
    """Ranges that are read in one go: an object store answers few requests sooner than many."""
    run: list[Any] = []
    for entry in wanted:
        if run and (entry[0] - run[-1][1] > _GAP_BYTES or entry[1] - run[0][0] > _READ_BYTES):
            yield run
            run = []
        run.append(entry)
    if run:
        yield run


def _read_into(file: BinaryIO, target: memoryview) -> None:
    while len(target):
        data = file.read(len(target))
        if not data:
            raise EOFError("the file ends before its last piece does")
        target[: len(data)] = data
        target = target[len(data) :]
