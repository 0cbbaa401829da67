"""One optimiser step: loss, gradients, update. Pure torch: no Ray, no configuration library.

Legend   B rows of a micro-batch, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

if TYPE_CHECKING:
    from aifactory.config import Train

Precision = Literal["fp32", "bf16"]


def resolve_precision(asked: str, device: torch.device) -> Precision:
    """bf16 where the hardware computes in it, for `auto`; else what was asked for."""
    if asked in ("fp32", "bf16"):
        return asked  # type: ignore[return-value]
    if asked == "fp8":  # of all that float8.py leaves as it is
        return "bf16"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # torch 2.13: without AVX512-BF16 or AMX a bf16 product on CPU is emulated and slower than fp32.
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if probe() else "fp32"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Products in bf16, weights and sums in fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def summed_loss(
    model: Callable[..., Any],
    ids_BT: torch.Tensor,
    positions_BT: torch.Tensor,
    loss_mask_BT: torch.Tensor,
    *,
    precision: Precision,
) -> torch.Tensor:
    """The sum of the negative log-likelihoods (nats) of the tokens that carry loss.

    Documents that share a row do not see one another: transformers makes the block-diagonal mask from the positions
    that restart, and only as long as no `attention_mask` is given. A model that `execution.prepare` has changed computes
    the loss itself.
    """
    if getattr(getattr(model, "module", model), "ends_in_loss", False):
        with autocast(precision, ids_BT.device):
            loss: torch.Tensor = model(input_ids=ids_BT, position_ids=positions_BT, loss_mask=loss_mask_BT)
        return loss
    with autocast(precision, ids_BT.device):
        logits_BTV = model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits
    targets_BT = torch.where(loss_mask_BT[:, 1:].bool(), ids_BT[:, 1:], -100)
    return functional.cross_entropy(
        logits_BTV[:, :-1].float().flatten(0, 1), targets_BT.flatten(), ignore_index=-100, reduction="sum"
    )


def make_optimizer(model: nn.Module, recipe: Train) -> torch.optim.AdamW:
    """AdamW, fused; weight decay on matrices, none on vectors.

    Source  Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", arXiv:1711.05101, algorithm 2.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2), fused=True)


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Clip all gradients together to a norm; return what it was before, the same on every worker."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    if isinstance(norm, DTensor):  # each worker knows its part
        norm = norm.full_tensor()
    return float(norm)


def update(optimizer: torch.optim.Optimizer, *, rate: float) -> None:
    """Take a step, clear the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def dropout_seed(seed: int, step: int, slot: int) -> int:
    """The seed of the dropout of one micro-batch; it depends on its place in the global batch, on no worker."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + slot * 0x94D049BB133111EB) % 2**63


def count_parameters(parameters: Iterable[torch.Tensor]) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in parameters if p.requires_grad)
