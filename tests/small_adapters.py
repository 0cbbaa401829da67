"""Adapters of small models, random and seeded."""

from __future__ import annotations

import copy
import json

import torch
from safetensors.torch import save_file

from aifactory.engine.adapters import CONFIG_NAME, WEIGHTS_NAME


def write_adapter(folder, model, names, *, rank, alpha, seed, **config):
    """As peft writes one, and the model into which it is merged."""
    torch.manual_seed(seed)
    merged, tensors = copy.deepcopy(model), {}
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    for path, module in merged.named_modules():
        if path.rsplit(".", 1)[-1] not in names:
            continue
        turned = hasattr(module, "nf")
        rows, columns = module.weight.shape[::-1] if turned else module.weight.shape
        a, b = torch.randn(rank, columns) / columns**0.5, torch.randn(rows, rank)
        tensors[f"base_model.model.{path}.lora_A.weight"] = a
        tensors[f"base_model.model.{path}.lora_B.weight"] = b
        with torch.no_grad():
            module.weight += ((b @ a).T if turned else b @ a) * scale
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS_NAME)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", "target_modules": list(names)}
    (folder / CONFIG_NAME).write_text(json.dumps(settings | config))
    return merged
