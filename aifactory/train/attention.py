"""Attention: documents that share a row, each by itself. Pure torch and transformers.

mask     transformers builds one block-diagonal mask a micro-batch, and every layer computes all T x T products
varlen   each document is attended to alone: by the flash kernels of `torch.nn.attention.varlen` on CUDA, by one call of
         scaled_dot_product_attention a document on a CPU

Law      Both give the same but for rounding, and no gradient passes between documents. What is asked for without documents
         (generation, scoring) is computed as transformers would.
How      transformers hands what `document_arguments` gives through to its attention interface, by the names that flash
         attention has there. Only within `alone` is no mask built.

Legend   B rows of a micro-batch, T tokens of a row, D documents and paddings of all rows end to end, H heads, W width of one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "documents_alone"
"""By which transformers knows it."""
_NOT_KNOWN = ("sliding_window", "softcap", "s_aux", "position_bias")
_FEWEST_BOUNDS = 16
_within: ContextVar[bool] = ContextVar("documents_alone", default=False)


def why_not_alone(model: nn.Module, config: PretrainedConfig) -> str:
    """What keeps a model from attending to documents alone; "" where nothing does."""
    text = config.get_text_config(decoder=True)
    if not getattr(model, "_supports_attention_backend", False):
        return f"a {text.model_type} model does not use transformers' attention interface"
    if not getattr(model, "_supports_sdpa", True):
        return f"a {text.model_type} model does more in its attention than scaled_dot_product_attention"
    dropout = max(float(getattr(text, name, 0.0) or 0.0) for name in ("attention_dropout", "attn_pdrop"))
    if dropout > 0:
        return f"its attention weights have a dropout of {dropout:g}"
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if kinds or (getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)):
        return f"its layers are not all full attention: {sorted(kinds) or 'sliding_window'}"
    return ""


def document_arguments(positions_BT: torch.Tensor) -> dict[str, Any]:
    """Where each document begins in the rows end to end, from positions that restart with each.

    Bounds are padded with empty documents to 16, 32, 64... of them, and the longest length is rounded up likewise, so that
    a compiled block meets few shapes.
    """
    length = positions_BT.shape[1]
    starts_BT = positions_BT == 0
    starts_BT[:, 0] = True  # a row that goes on with a document begins a piece of its own
    starts_D = starts_BT.flatten().nonzero().squeeze(1)
    total = positions_BT.numel()
    room = max(_FEWEST_BOUNDS, 1 << len(starts_D).bit_length())
    bounds = functional.pad(starts_D, (0, room - len(starts_D)), value=total).to(torch.int32)
    longest = int(bounds.diff().max())
    longest = min(length, 1 << (longest - 1).bit_length())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


@contextmanager
def alone() -> Iterator[None]:
    """Around a forward pass that is given `document_arguments`: no mask is built."""
    token = _within.set(True)
    try:
        yield
    finally:
        _within.reset(token)


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    return None if _within.get() else sdpa_mask(*args, **kwargs)


def _forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query, key, value: B x H x T x W, fewer heads of the latter two where they are shared. Returns B x T x H x W."""
    if cu_seq_lens_q is None:
        kwargs = {name: value for name, value in kwargs.items() if name not in ("cu_seq_lens_k", "max_length_k")}
        plain: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return plain
    assert attention_mask is None, "documents are told by their bounds, not by a mask"
    assert not dropout, "the kernels have no dropout"
    assert not [name for name in _NOT_KNOWN if kwargs.get(name) is not None], kwargs.keys()
    if query.device.type == "cuda":
        assert max_length_q is not None
        return _flash(query, key, value, cu_seq_lens_q, max_length_q, scaling), None
    return _one_by_one(query, key, value, cu_seq_lens_q, scaling), None


def _one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds_D1: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    rows, _, length, _ = query.shape
    groups = query.shape[1] // key.shape[1]
    lengths = [each for each in bounds_D1.diff().tolist() if each]
    options: dict[str, Any] = {"is_causal": True, "scale": scaling, "enable_gqa": groups > 1}
    if lengths == [length] * rows:  # all rows at once
        whole = functional.scaled_dot_product_attention(query, key, value, **options)
        return whole.transpose(1, 2).contiguous()
    # One split and one concatenation: a slice for each document would have a gradient as large as the whole.
    documents = zip(
        *(torch.split(each.transpose(1, 2).flatten(0, 1), lengths) for each in (query, key, value)), strict=True
    )
    made = [
        functional.scaled_dot_product_attention(*(each.transpose(0, 1)[None] for each in document), **options)[0]
        for document in documents
    ]
    return torch.cat([each.transpose(0, 1) for each in made]).view(rows, length, *made[0].shape[::2])


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds_D1: torch.Tensor,
    longest: int,
    scaling: float | None,
) -> torch.Tensor:
    rows, heads, length, width = query.shape
    groups = heads // key.shape[1]
    if groups > 1 and "enable_gqa" not in _KERNEL_OPTIONS:
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    q, k, v = (each.transpose(1, 2).flatten(0, 1) for each in (query, key, value))
    if torch.is_autocast_enabled("cuda"):
        # Autocast does not know this kernel, and rotary angles have made fp32 of queries and keys again.
        q, k, v = (each.to(torch.get_autocast_dtype("cuda")) for each in (q, k, v))
    if scaling is not None and "scale" not in _VARLEN_OPTIONS:
        q = q * (scaling * width**0.5)
    options = dict(_KERNEL_OPTIONS) | ({"scale": scaling} if "scale" in _VARLEN_OPTIONS else {})
    assert _varlen_attn is not None, "has_kernel said so"
    out = _varlen_attn(q, k, v, bounds_D1, bounds_D1, longest, longest, **options)
    assert isinstance(out, torch.Tensor), "the log-sum-exp is not asked for"
    return out.view(rows, length, heads, width)


try:
    from torch.nn.attention.varlen import varlen_attn

    _varlen_attn: Callable[..., Any] | None = varlen_attn
except ImportError:  # torch before 2.10; there `auto` is the mask
    _varlen_attn = None
_VARLEN_OPTIONS = frozenset(inspect.signature(_varlen_attn).parameters) if _varlen_attn else frozenset[str]()
# torch 2.10 said is_causal; window_size came with 2.11, enable_gqa with 2.12.
_KERNEL_OPTIONS: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in _VARLEN_OPTIONS else {"is_causal": True}
if "enable_gqa" in _VARLEN_OPTIONS:
    _KERNEL_OPTIONS["enable_gqa"] = True

AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, _mask)


def has_kernel(device: torch.device) -> bool:
    """Whether `varlen` can be computed: everywhere but on a CUDA device that the kernels do not know."""
    if device.type != "cuda":
        return device.type == "cpu"
    return _varlen_attn is not None and torch.cuda.get_device_capability(device) >= (8, 0)
