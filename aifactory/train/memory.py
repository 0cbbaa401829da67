"""Memory: which activations are kept for the backward pass, and which are computed a second time. Pure torch.

none        all are kept
selective   the results of matrix products and of attention are kept, all else is computed again: element-wise work, most of
            the memory and little of the time
full        of each block only what went in is kept; the forward pass is computed twice, about a third more work

Source   Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174; Korthikanti et al. 2022,
         "Reducing Activation Recomputation in Large Transformer Models", arXiv:2205.05198, section 5.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_KEPT_NAMES = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_flash_attention_forward",
    "torch_attn::_varlen_attn",
)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks of a model of transformers, in their order."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def keep_activations(model: nn.Module, how: str) -> None:
    """Have each block of `model` keep what `how` says. Names of weights and hooks stay as they are."""
    if how == "none":
        return
    options: dict[str, Any] = {"context_fn": _selective_contexts} if how == "selective" else {}

    def checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not (block.training and torch.is_grad_enabled()):
                return forward(block, *args, **kwargs)
            return checkpoint(forward, block, *args, use_reentrant=False, **options, **kwargs)

        return run

    _replace(model, checkpointed)


def compile_blocks(model: nn.Module, *, backend: str = "inductor") -> None:
    """Compile the forward pass of each block; all blocks of a shape share what is compiled. Hooks, as FSDP2 has them, stay
    outside."""
    _replace(model, lambda forward: torch.compile(forward, backend=backend))


def _replace(model: nn.Module, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """The forward pass of each block by what `change` makes of it: a function of the block and what it is called with, so
    that a copy of the model calls it with the copy."""
    changed: dict[Callable[..., Any], Callable[..., Any]] = {}
    for block in blocks(model):
        forward = getattr(block.forward, "__func__", type(block).forward)
        if forward not in changed:
            changed[forward] = change(forward)
        block.forward = MethodType(changed[forward], block)


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operation.name().split(".")[0] if hasattr(operation, "name") else str(operation)
    return CheckpointPolicy.MUST_SAVE if name in _KEPT_NAMES else CheckpointPolicy.PREFER_RECOMPUTE
