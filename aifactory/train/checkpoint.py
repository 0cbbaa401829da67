"""Checkpoints: committed or not there.

Layout   <folder>/step-00000100/{model.safetensors, optimizer.pt, COMMITTED}; the marker holds the latest losses
Law      COMMITTED is written last. A run continues from the newest step that has it, whatever its launcher remembers.
         Nothing is read that can run code: safetensors, and `weights_only` for the optimiser.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from aifactory.records.storage import Storage

_MARKER = "COMMITTED"


class Checkpoints:
    """The checkpoints of one training run."""

    def __init__(self, storage: Storage, *folder: str, keep: int = 2) -> None:
        self.storage = storage
        self.folder = folder
        self.keep = keep

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, *, losses: Sequence[float] = ()
    ) -> None:
        """Commit the state after `step` steps, then delete all but the newest `keep`."""
        name = f"step-{step:08d}"
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        self.storage.write_bytes(save_tensors(_weights(model)), *self.folder, name, "model.safetensors")
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

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, list[float]]:
        """Load the newest committed state; return its step and losses, 0 and none where there is none."""
        steps = self.committed()
        if not steps:
            return 0, []
        name = f"step-{steps[-1]:08d}"
        weights = self._read(name, "model.safetensors")
        missing, unexpected = model.load_state_dict(load_tensors(weights), strict=False)
        tied = set(getattr(model, "_tied_weights_keys", None) or ())
        assert not unexpected, unexpected
        assert set(missing) <= tied, missing
        state: dict[str, Any] = torch.load(io.BytesIO(self._read(name, "optimizer.pt")), weights_only=True)
        optimizer.load_state_dict(state)
        marker = json.loads(self._read(name, _MARKER))
        return steps[-1], list(marker["losses"])

    def _read(self, *names: str) -> bytes:
        data = self.storage.read_bytes(*self.folder, *names)
        assert data is not None, names
        return data


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state without the second names of tied weights, which safetensors refuses."""
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    names = {name for name, _ in model.named_parameters()}  # parameters that are shared are named once
    state = model.state_dict()
    return {name: value.contiguous() for name, value in state.items() if name in names or name not in tied}
