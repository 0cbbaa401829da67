"""Preparation: a model is changed to compute its step as an `Execution` says. Pure torch and transformers.

Order    activations -> compilation -> sharding (`parallel.share`), each around what is before it.
Law      No choice here changes a loss or a gradient but for rounding: before it is made, a model's loss on a small packed row is
         computed as transformers would and compared. Where `auto` finds a difference or no way, it says so and leaves the
         model as it is; where a choice was asked for by name, that is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import nn

from aifactory.errors import TrainingError
from aifactory.observe.events import log_event
from aifactory.train.attention import NAME, alone, document_arguments, has_kernel, why_not_alone
from aifactory.train.cross_entropy import summed_cross_entropy
from aifactory.train.execution import Execution
from aifactory.train.flops import head_width
from aifactory.train.memory import blocks, compile_blocks, keep_activations
from aifactory.train.step import Precision, autocast, summed_loss

_PROBE_LENGTHS = (5, 2, 9)
_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


def prepare(model: nn.Module, execution: Execution, device: torch.device, precision: Precision) -> Execution:
    """Change, in place, how a model of transformers computes; what was chosen where `auto` was asked for.

    The model is on its device and not yet shared.

    Raises   TrainingError where something that was asked for can't be had.
    """
    inner = _without_adapters(model)
    attention = _choice(
        "attention", execution.attention, "varlen", "mask", _attention_objection(inner, device, precision)
    )
    loss = _choice("loss", execution.loss, "pieces", "plain", _loss_objection(inner))
    if attention == "varlen" or loss == "pieces":
        plain = _probe(inner, device, precision)
        before = inner.config._attn_implementation  # type: ignore[union-attr]
        if attention == "varlen":
            inner.set_attn_implementation(NAME)  # type: ignore[operator]
        _end_in_loss(inner, _Forward(attention=attention, loss=loss, compile=execution.compile))
        found = _probe(inner, device, precision)
        if not abs(found - plain) <= _TOLERANCE[precision] * abs(plain):
            why = f"the loss of a packed row is {found:.6g}, as transformers computes it {plain:.6g}"
            named = [name for name in ("attention", "loss") if getattr(execution, name) in ("varlen", "pieces")]
            if named:
                raise TrainingError(_unavailable(named[0], getattr(execution, named[0]), why))
            log_event("execution", attention="mask", loss="plain", because=why)
            inner.set_attn_implementation(before)  # type: ignore[operator]
            del inner.forward, inner.ends_in_loss
            attention, loss = "mask", "plain"
    if execution.activations != "none" or execution.compile:
        if not blocks(inner):
            name = "compile" if execution.activations == "none" else "activations"
            raise TrainingError(_unavailable(name, getattr(execution, name), "the model names no blocks"))
        keep_activations(inner, execution.activations)
        if execution.compile:
            compile_blocks(inner)
    return replace(execution, attention=attention, loss=loss)


def _choice(name: str, asked: str, better: str, plain: str, objection: str) -> str:
    if asked == plain or (asked == "auto" and objection):
        return plain
    if objection:
        raise TrainingError(_unavailable(name, asked, objection))
    return better


def _unavailable(name: str, asked: object, why: str) -> str:
    return f"expected a model and a device for runtime.execution.{name}: {asked}, found that they can't: {why}. Leave it out."


def _attention_objection(model: nn.Module, device: torch.device, precision: Precision) -> str:
    if not has_kernel(device):
        return f"torch {torch.__version__} has no kernel for it on {device}"
    if device.type == "cuda" and precision == "fp32":
        return "its kernels compute in bf16, not in fp32"
    if device.type == "cuda" and (width := head_width(model.config)) % 8:  # type: ignore[arg-type]
        return f"its kernels want heads whose width is a multiple of 8, and these are {width} wide"
    return why_not_alone(model, model.config)  # type: ignore[arg-type]


def _loss_objection(model: nn.Module) -> str:
    head = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear or head.bias is not None:
        return f"its head is no linear layer without bias but {head}"
    if not hasattr(model, "base_model_prefix") or model.base_model is model:
        return "its head can't be told from the rest of it"
    return ""


def _without_adapters(model: nn.Module) -> nn.Module:
    found = getattr(model, "get_base_model", None)
    return model if found is None else found()


def _end_in_loss(model: nn.Module, forward: _Forward) -> None:
    """Give the model a forward pass that ends in the summed loss where it is asked for one (`loss_mask`)."""
    model.forward = MethodType(forward, model)
    model.ends_in_loss = True  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class _Forward:
    """Called with the model, so that a copy of the model calls it with the copy."""

    attention: str
    loss: str
    compile: bool

    def __call__(self, model: Any, *args: Any, loss_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if loss_mask is None:
            return type(model).forward(model, *args, **kwargs)
        ids_BT, positions_BT = kwargs["input_ids"], kwargs["position_ids"]
        # Both wait for the device, so both come before the work is queued.
        documents = document_arguments(positions_BT) if self.attention == "varlen" else {}
        at_N, targets_N = predicted(ids_BT, loss_mask)
        inputs = {"input_ids": ids_BT, "position_ids": positions_BT, "use_cache": False, **documents}
        if self.attention == "varlen":
            with alone():
                return self._loss(model, inputs, at_N, targets_N)
        return self._loss(model, inputs, at_N, targets_N)

    def _loss(self, model: Any, inputs: dict[str, Any], at_N: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        if self.loss == "pieces":
            hidden_BTH = model.base_model(**inputs).last_hidden_state
            weight_VH = model.get_output_embeddings().weight
            return summed_cross_entropy(hidden_BTH.flatten(0, 1), weight_VH, at_N, targets_N, is_compiled=self.compile)
        logits_BTV = type(model).forward(model, **inputs).logits
        logits_NV = logits_BTV.flatten(0, 1)[at_N].float()
        return nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum")


def predicted(ids_BT: torch.Tensor, loss_mask_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of all tokens, rows end to end, predict one that carries loss, and what they are to predict."""
    length = ids_BT.shape[1]
    at_N = loss_mask_BT[:, 1:].flatten().nonzero().squeeze(1)
    at_N = at_N + at_N // (length - 1)  # the last token of a row predicts nothing
    return at_N, ids_BT.flatten()[at_N + 1]


@torch.no_grad()
def _probe(model: nn.Module, device: torch.device, precision: Precision) -> float:
    """The loss of a row of three documents, without dropout."""
    was_training = model.training
    model.eval()
    vocab_size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids_BT = torch.arange(sum(_PROBE_LENGTHS), device=device)[None] * 7919 % vocab_size
    positions_BT = torch.cat([torch.arange(each, device=device) for each in _PROBE_LENGTHS])[None]
    with autocast(precision, device):
        loss = summed_loss(model, ids_BT, positions_BT, (positions_BT > 0).long(), precision=precision)
    model.train(was_training)
    return float(loss)
