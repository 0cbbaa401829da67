"""FP8: products of linear layers in 8-bit floating point, by torchao. Weights, sums and all else stay as they are.

Source   Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv:2209.05433; torchao.float8, recipe `tensorwise`: one
         scale a tensor, taken from the tensor as it is (dynamic scaling).
Needs    torchao, and a CUDA device of compute capability 8.9 or above (Ada, Hopper, Blackwell). Pays only with compiled blocks.
"""

from __future__ import annotations

import torch
from torch import nn

from aifactory.errors import TrainingError

_LEAST_CAPABILITY = (8, 9)
_MULTIPLE = 16
"""Both sides of a product in FP8 are multiples of it."""


def convert_to_float8(model: nn.Module, device: torch.device) -> int:
    """Have the linear layers of a model compute in FP8, all but its head; how many do.

    Raises   TrainingError where the device or the libraries can't.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        found = f"a {device.type} device"
        if device.type == "cuda":
            found = f"{torch.cuda.get_device_name(device)} of {torch.cuda.get_device_capability(device)}"
        raise TrainingError(
            f"expected a CUDA device of compute capability 8.9 or above for train.precision: fp8, found {found}; take bf16."
        )
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise TrainingError(
            "expected torchao for train.precision: fp8, found none; install aifactory[fp8] or take bf16."
        ) from error
    names = float8_layers(model)
    convert_to_float8_training(
        model,
        config=Float8LinearConfig.from_recipe_name("tensorwise"),
        module_filter_fn=lambda _, name: name in names,
    )
    return len(names)


def float8_layers(model: nn.Module) -> set[str]:
    """The names of the linear layers that can compute in FP8: all whose sides are multiples of 16, but for the head, whose
    rounding the loss would see at once."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return {
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module is not head
        and module.in_features % _MULTIPLE == 0
        and module.out_features % _MULTIPLE == 0
    }
