"""Checkpoints: committed or not there.

Layout   <folder>/step-00000100/{model.safetensors, optimizer.pt, COMMITTED}; the marker holds the latest losses
Law      COMMITTED is written last. A run continues from the newest step that has it, whatever its launcher remembers.
         Nothing is read that can run code: safetensors, and `weights_only` for the optimiser.
Whole    A checkpoint holds whole weights and moments by their names, however they were shared, so that any number of
         workers goes on from it, by ddp or by fsdp. With adapters, it holds theirs alone.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from aifactory.records.storage import Storage

State = dict[str, Any]
"""Weights by name, whole, on the CPU."""

_MARKER = "COMMITTED"
# Weights that are not trained are those of the base, which is there anyway.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


class Checkpoints:
    """The checkpoints of one training run."""

    def __init__(self, storage: Storage, *folder: str, keep: int = 2) -> None:
        self.storage = storage
        self.folder = folder
        self.keep = keep

    def save(self, step: int, weights: State, moments: Mapping[str, Any], *, losses: Sequence[float] = ()) -> None:
        """Commit the state after `step` steps, then delete all but the newest `keep`."""
        name = f"step-{step:08d}"
        buffer = io.BytesIO()
        torch.save(dict(moments), buffer)
        self.storage.write_bytes(save_tensors(weights), *self.folder, name, "model.safetensors")
        self.storage.write_bytes(buffer.getvalue(), *self.folder, name, "optimizer.pt")
        marker = json.dumps({"step": step, "losses": list(losses)})
        self.storage.write_bytes(marker.encode(), *self.folder, name, _MARKER)
        for old in self.committed()[: -self.keep]:
            # Without its marker a half-deleted checkpoint can't be taken for a whole one.
            self.storage.delete_file(*self.folder, f"step-{old:08d}", _MARKER)
            self.storage.delete(*self.folder, f"step-{old:08d}")

    def committed(self) -> list[int]:
        """The steps of all committed checkpoints, ascending."""
        return sorted(
            int(name.removeprefix("step-"))
            for name in self.storage.names(*self.folder)
            if name.startswith("step-") and self.storage.read_bytes(*self.folder, name, _MARKER) is not None
        )

    def newest(self) -> tuple[int, list[float], State, dict[str, Any]] | None:
        """Of the newest committed checkpoint the step, the losses, the weights and the optimiser's state; None without one."""
        steps = self.committed()
        if not steps:
            return None
        name = f"step-{steps[-1]:08d}"
        weights = load_tensors(self._read(name, "model.safetensors"))
        moments: dict[str, Any] = torch.load(io.BytesIO(self._read(name, "optimizer.pt")), weights_only=True)
        return steps[-1], list(json.loads(self._read(name, _MARKER))["losses"]), weights, moments

    def _read(self, *names: str) -> bytes:
        data = self.storage.read_bytes(*self.folder, *names)
        assert data is not None, names
        return data


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> tuple[State, dict[str, Any]]:
    """The weights that are trained, and the optimiser's state where it is asked for. All workers must call it; rank 0 has what
    it returns.

    Weights that are tied are named once, as safetensors wants it.
    """
    names = {name for name, each in model.named_parameters() if each.requires_grad}
    names |= {name for name, _ in model.named_buffers()}
    state: dict[str, Any] = get_model_state_dict(model, options=_WHOLE)
    weights = {name: value.contiguous() for name, value in state.items() if name in names}
    moments = {} if optimizer is None else get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    return weights, moments


def restore(checkpoints: Checkpoints, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, list[float]]:
    """Load the newest committed state, each worker its part; return its step and losses, 0 and none where there is none."""
    found = checkpoints.newest()
    if found is None:
        return 0, []
    step, losses, weights, moments = found
    options = StateDictOptions(full_state_dict=True, strict=False)
    missing, unexpected = set_model_state_dict(model, weights, options=options)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    frozen = {name for name, each in model.named_parameters() if not each.requires_grad}
    assert not unexpected, unexpected
    assert set(missing) <= tied | frozen, missing
    set_optimizer_state_dict(model, optimizer, moments, options=options)
    return step, losses
