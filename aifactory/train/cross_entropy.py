"""Cross-entropy of a linear head, in pieces: the logits of a batch never exist all at once.

A model's last product has as many columns as the vocabulary: of 16,384 tokens and a vocabulary of 128,256 the logits in fp32
are 8.4 GB, and so is their gradient. Here a piece of the tokens at a time gets its logits, its losses and at once its
gradients, so that the backward pass has nothing left to compute.

Source   the identity d loss / d logits = softmax - one-hot; done in pieces as in Hsu et al. 2024, "Liger Kernel",
         arXiv:2410.10989, section 3.2
Legend   N tokens with loss, H width of the model, V vocabulary, C tokens of a piece.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

_PIECE_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}
"""Logits of one piece, in fp32. On a CPU more would only leave the cache; on a GPU fewer would leave it idle, and the sum of
the pieces' gradients of the weight, V x H numbers, is read and written once for each."""


def summed_cross_entropy(
    hidden_MH: torch.Tensor,
    weight_VH: torch.Tensor,
    at_N: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    is_compiled: bool = False,
) -> torch.Tensor:
    """The sum of the negative log-likelihoods (nats) of `targets_N`, fp32, given the hidden states at `at_N`.

    hidden_MH  of all tokens; those that carry no loss cost nothing
    weight_VH  of a head without bias
    is_compiled  whether what is done with logits is compiled into one kernel: they are then read twice, not seven times
    Under autocast products are in its type; the losses and the sums of gradients over pieces are in fp32.
    """
    device = hidden_MH.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VH.dtype
    total: torch.Tensor = _SummedCrossEntropy.apply(hidden_MH, weight_VH, at_N, targets_N, dtype, is_compiled)  # type: ignore[no-untyped-call]
    return total


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: torch.Tensor,
        weight_VH: torch.Tensor,
        at_N: torch.Tensor,
        targets_N: torch.Tensor,
        dtype: torch.dtype,
        is_compiled: bool,
    ) -> torch.Tensor:
        losses_of = _compiled() if is_compiled else _losses
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float32, device=hidden_MH.device)
        hidden_grad_MH = torch.zeros_like(hidden_MH) if wants_hidden else None
        weight_grad_VH: torch.Tensor | None = None
        with torch.autocast(hidden_MH.device.type, enabled=False):
            head_VH = weight_VH.to(dtype)
            for at_C, targets_C in zip(*_pieces(at_N, targets_N, len(weight_VH)), strict=True):
                hidden_CH = hidden_MH.index_select(0, at_C).to(dtype)
                loss, gradient_CV = losses_of(hidden_CH @ head_VH.t(), targets_C)
                total += loss
                if not (wants_hidden or wants_weight):
                    continue
                if hidden_grad_MH is not None:
                    hidden_grad_MH.index_copy_(0, at_C, (gradient_CV @ head_VH).to(hidden_MH.dtype))
                if wants_weight:
                    weight_grad_VH = _added(weight_grad_VH, gradient_CV.t(), hidden_CH)
        if wants_weight:
            if weight_grad_VH is None:
                weight_grad_VH = torch.zeros_like(weight_VH)
            weight_grad_VH = weight_grad_VH.to(weight_VH.dtype)
        ctx.save_for_backward(hidden_grad_MH, weight_grad_VH)
        ctx.is_spent = False
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # They are handed on, not copied, so there is only one time.
        assert not ctx.is_spent, "expected one backward pass, found a second"
        ctx.is_spent = True
        hidden_grad_MH, weight_grad_VH = ctx.saved_tensors
        scaled = [None if each is None else each.mul_(grad) for each in (hidden_grad_MH, weight_grad_VH)]
        return (*scaled, None, None, None, None)


def _losses(logits_CV: torch.Tensor, targets_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the losses of a piece in fp32, and its gradient in the logits, in their type."""
    wide_CV = logits_CV.float()
    target_logits_C = wide_CV.gather(1, targets_C[:, None]).squeeze(1)
    largest_C = wide_CV.amax(1)
    softmax_CV = torch.softmax(wide_CV, 1)
    # log-sum-exp from the largest probability, which is at least 1 / V and so never rounded to 0.
    loss = (largest_C - softmax_CV.amax(1).log() - target_logits_C).sum()
    softmax_CV[torch.arange(len(targets_C), device=targets_C.device), targets_C] -= 1
    return loss, softmax_CV.to(logits_CV.dtype)


def _losses_in_one(logits_CV: torch.Tensor, targets_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in the form that a compiler makes one kernel of."""
    wide_CV = logits_CV.float()
    sums_C1 = torch.logsumexp(wide_CV, 1, keepdim=True)
    loss = (sums_C1 - wide_CV.gather(1, targets_C[:, None])).sum()
    is_target_CV = torch.arange(wide_CV.shape[1], device=wide_CV.device) == targets_C[:, None]
    return loss, ((wide_CV - sums_C1).exp() - is_target_CV.float()).to(logits_CV.dtype)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    # How many tokens carry loss differs from batch to batch.
    return torch.compile(_losses_in_one, dynamic=True)


def _pieces(at_N: torch.Tensor, targets_N: torch.Tensor, vocab_size: int) -> list[tuple[torch.Tensor, ...]]:
    """Both in as many pieces, of equal lengths but for one token."""
    most = max(1, _PIECE_BYTES.get(at_N.device.type, 64 * 2**20) // (4 * vocab_size))
    count = max(1, -(-len(at_N) // most))
    return [each.tensor_split(count) if len(at_N) else () for each in (at_N, targets_N)]


def _added(total_VH: torch.Tensor | None, left_VC: torch.Tensor, right_CH: torch.Tensor) -> torch.Tensor:
    """The product, added to a sum in fp32."""
    if total_VH is None:
        return (left_VC @ right_CH).float()
    if right_CH.dtype == torch.float32:
        return total_VH.addmm_(left_VC, right_CH)
    return total_VH.add_(left_VC @ right_CH)
