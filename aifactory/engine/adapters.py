"""Adapters: low-rank changes of a model, chosen by name for each request, many of them in one batch.

    folder (peft's form) ─load_adapter─▶ Adapter ─▶ AdapterHooks, for the model's own forward
                                                 └▶ compiled.py, for the kernels

y = W x + B (A x), B scaled by alpha / rank (Hu et al. 2021, arXiv:2106.09685) or alpha / sqrt(rank) (Kalajdzievski 2023,
arXiv:2312.03732). Reads adapter_config.json and adapter_model.safetensors; what they ask for beyond that is refused, by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from aifactory.engine.load import require_no_code
from aifactory.engine.packed import PackedLinear
from aifactory.errors import ConfigError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class LowRank:
    """The change of one matrix."""

    a: Tensor
    """(rank, in)."""
    b: Tensor
    """(out, rank), scaled."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A model's changes, by the path of the module."""

    name: str
    changes: Mapping[str, LowRank]

    @property
    def rank(self) -> int:
        """The largest of its ranks."""
        return max(change.a.shape[0] for change in self.changes.values())


def load_adapter(name: str, folder: Path, model: PreTrainedModel) -> Adapter:
    """The adapter of a folder, on the model's device and in its dtype.

    Raises  UnsafeModelError, ConfigError if it is none for this model.
    """
    folder = Path(folder)
    require_no_code(folder)
    config = _read_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"Expected {WEIGHTS_NAME} in {folder}, found: {error}. Save the adapter again.") from error
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ConfigError(
                f"Expected tensors of the form base_model.model.*.lora_A.weight and lora_B, found {key} in {folder}. Merge "
                "the adapter into its model instead."
            )
        parts.setdefault(match["module"], {})[match["part"]] = tensor
    if not parts:
        raise ConfigError(f"Expected an adapter that changes something, found no tensor in {folder}.")
    modules = dict(model.named_modules())
    changes = {}
    for path, pair in parts.items():
        sizes = _sizes(modules.get(path))
        found = {part: tuple(tensor.shape) for part, tensor in sorted(pair.items())}
        rank = pair["A"].shape[0] if "A" in pair else 0
        if sizes is None or found != {"A": (rank, sizes[0]), "B": (sizes[1], rank)} or rank == 0:
            expected = (
                "no linear module of that name"
                if sizes is None
                else f"A of (rank, {sizes[0]}), B of ({sizes[1]}, rank)"
            )
            raise ConfigError(
                f"Expected an adapter for this model, which has {expected}, found {found} for {path} in {folder}. It belongs "
                "to another model."
            )
        scale = _scale(config, path, rank)
        changes[path] = LowRank(
            pair["A"].to(model.device, model.dtype), (pair["B"].float() * scale).to(model.device, model.dtype)
        )
    return Adapter(name, changes)


class AdapterHooks:
    """Adds adapters' changes to what a model's own modules compute, for the rows that `use` names."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._modules = dict(model.named_modules())
        self._hooked: set[str] = set()
        self._active: list[tuple[Adapter, Tensor]] = []

    def add(self, adapter: Adapter) -> None:
        """Hook the modules that it changes."""
        for path in adapter.changes.keys() - self._hooked:
            self._modules[path].register_forward_hook(_Hook(self, path))
            self._hooked.add(path)

    def use(self, adapters: Sequence[Adapter | None]) -> None:
        """Which adapter each row of the next forwards has."""
        rows_of: dict[str, tuple[Adapter, list[int]]] = {}
        for row, adapter in enumerate(adapters):
            if adapter is not None:
                rows_of.setdefault(adapter.name, (adapter, []))[1].append(row)
        self._active = [(adapter, torch.tensor(rows)) for adapter, rows in rows_of.values()]

    def change(self, path: str, x: Tensor, y: Tensor) -> Tensor:
        """The output of a module with the changes of the rows that have any."""
        for adapter, rows in self._active:
            change = adapter.changes.get(path)
            if change is not None:
                rows = rows.to(x.device)
                y = y.index_add(0, rows, ((x[rows] @ change.a.T) @ change.b.T).to(y.dtype))
        return y


class _Hook:
    def __init__(self, hooks: AdapterHooks, path: str) -> None:
        self._hooks = hooks
        self._path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        del module
        return self._hooks.change(self._path, args[0], output)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_NAME).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Expected an adapter's {CONFIG_NAME} in {folder}, found: {error}. Check the path."
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ConfigError(
            f"Expected an adapter of the type LORA, found {kind} in {folder}. Merge it into its model instead."
        )
    asked = {
        "bias": config.get("bias", "none") != "none",
        **{name: bool(config.get(name)) for name in ("use_dora", "modules_to_save", "layer_replication")},
    }
    wrong = [name for name, is_asked in asked.items() if is_asked]
    if wrong or not isinstance(config.get("lora_alpha"), int | float):
        raise ConfigError(
            f"Expected an adapter of low-rank matrices alone with a lora_alpha, found {', '.join(wrong) or 'no lora_alpha'} "
            f"in {folder}. Merge it into its model instead."
        )
    return config


def _scale(config: Mapping[str, Any], path: str, rank: int) -> float:
    # peft matches the end of a module's path, the pattern being a regular expression.
    patterns = config.get("alpha_pattern") or {}
    own = [alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", path)]
    alpha = float(own[0] if own else config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _sizes(module: nn.Module | None) -> tuple[int, int] | None:
    """Columns and rows of a linear module's matrix."""
    if module is None:
        return None
    if isinstance(module, nn.Linear | PackedLinear):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if hasattr(module, "nf") and isinstance(weight, Tensor):
        # transformers' Conv1D of GPT-2 has its matrix the other way round.
        return weight.shape[0], weight.shape[1]
    return None
