"""SlotCache: keys and values of many requests in one block, handed to a Hugging Face forward as past_key_values.

    row      0   1   2 | 3        | 4 ... num_slots-1 | num_slots
             decoding  | prefill  | free              | spare, if asked for: written to by what fills up a batch

Decoding requests keep to the first rows, so a step reads a view `[:num_rows, :, :num_read]` and copies nothing; a row that
becomes free is filled by moving the last one (`move`), once a request instead of a gather in each step and layer.
Before each forward one states what it writes and reads (`plan_decode`, `plan_prefill`); both give its attention mask.

Shapes   keys_SHTD, values_SHTD: S rows, H heads_kv, T context (rounded up), D head dim
         B rows in a step, Q query tokens, L positions read in a step: the longest row, rounded up to READ_MULTIPLE
Layout   as above for the model's own forward and the kernels of CUDA. Those of a CPU keep the keys of sixteen positions together,
         (S, H, T / 16, D, 16), of bfloat16 (S, H, T / 16, D / 2, 16, 2), in the same memory, so whoever copies takes whole blocks of
         READ_MULTIPLE positions.
Law      what a row reads beyond its own length is masked; it must only be finite, since 0 * nan is nan (`clear`).
"""

from __future__ import annotations

import inspect
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from aifactory.errors import ConfigError

READ_MULTIPLE = 64
"""A step reads whole blocks of so many positions: kernels want aligned masks, and the shapes change seldom."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """One token for each of the first rows."""

    rows_B: Tensor
    positions_B: Tensor
    num_rows: int
    num_read: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPlan:
    """The tokens [begin, end) of one row's prompt."""

    row: int
    begin: int
    end: int
    num_read: int


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer. Allocated at the first forward, which alone knows their shapes and dtypes."""

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, *, num_rows: int, num_positions: int, kept_dtype: torch.dtype | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept_dtype = kept_dtype
        self.num_rows = num_rows
        self.num_positions = num_positions
        self.plan: DecodePlan | PrefillPlan | None = None
        self._maps: list[mmap.mmap] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for states of shape (B, H, Q, D)."""
        self.keys = self._zeros_like(key_states.to(self._kept_dtype or key_states.dtype))
        self.values = self._zeros_like(value_states.to(self._kept_dtype or value_states.dtype))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (B, H, Q, D) where the plan says; return views (B, H, L, D) of what it reads."""
        plan = self.plan
        assert plan is not None, "a forward without a plan"
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        given, kept = key_states.dtype, self.keys.dtype
        key_states, value_states = key_states.to(kept), value_states.to(kept)
        if isinstance(plan, DecodePlan):
            self.keys[plan.rows_B, :, plan.positions_B] = key_states[:, :, 0]
            self.values[plan.rows_B, :, plan.positions_B] = value_states[:, :, 0]
            keys, values = (states[: plan.num_rows, :, : plan.num_read] for states in (self.keys, self.values))
            return keys.to(given), values.to(given)
        rows = slice(plan.row, plan.row + 1)
        self.keys[rows, :, plan.begin : plan.end] = key_states
        self.values[rows, :, plan.begin : plan.end] = value_states
        keys, values = (states[rows, :, : plan.num_read] for states in (self.keys, self.values))
        return keys.to(given), values.to(given)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what a forward reads. Unused where the mask is given, as here."""
        return (self.plan.num_read if self.plan else query_length), 0

    def get_seq_length(self) -> int:
        """Positions read; rows have lengths of their own. Unused where positions are given, as here."""
        return self.plan.num_read if self.plan else 0

    def get_max_length(self) -> int:
        """Positions of a row."""
        return self.num_positions

    def _zeros_like(self, states: Tensor) -> Tensor:
        shape = (self.num_rows, states.shape[1], self.num_positions, states.shape[3])
        if states.device.type != "cpu":
            return torch.zeros(shape, dtype=states.dtype, device=states.device)
        # The system commits a page when it is first written, so a long context costs nothing until it is used, and takes
        # it back when it is told to. torch.zeros would touch all of it.
        self._maps.append(
            mmap.mmap(-1, math.prod(shape) * states.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        )
        return torch.from_numpy(np.frombuffer(self._maps[-1], np.uint8)).view(states.dtype).view(shape)

    def release(self, row: int) -> None:
        """Give the memory of a row back to the system; it reads as zeros then. Nothing happens on a device."""
        for area in self._maps:
            size = len(area) // self.num_rows
            begin, end = row * size, (row + 1) * size
            begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
            if begin < end and hasattr(area, "madvise"):
                area.madvise(mmap.MADV_DONTNEED, begin, end - begin)


class SlotCache(Cache):
    """All layers' slots, and the mask of what each row may attend to."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        context_length: int,
        dtype: torch.dtype,
        device: torch.device | str,
        has_spare_row: bool = False,
        kept_dtype: torch.dtype | None = None,
    ) -> None:
        """`dtype` is the model's: its attention wants an additive mask of the same. Keys and values are kept in `kept_dtype`, which is
        the same unless it is given."""
        self.kept_dtype = dtype if kept_dtype is None else kept_dtype
        self.num_slots = self.spare_row = num_slots
        self._num_rows = num_slots + has_spare_row
        self.num_positions = _round_up(context_length)
        self.slot_layers = [
            SlotLayer(num_rows=self._num_rows, num_positions=self.num_positions, kept_dtype=kept_dtype)
            for _ in range(num_layers)
        ]
        super().__init__(layers=list(self.slot_layers))
        # 0 where a decoding row attends, -inf elsewhere; whoever writes a token in a step opens its element.
        self.mask_ST = torch.full((self._num_rows, self.num_positions), -torch.inf, dtype=dtype, device=device)
        self._zero = torch.zeros((), dtype=dtype, device=device)
        self._positions_T = torch.arange(self.num_positions, device=device)
        self._rows_S = torch.arange(self._num_rows, device=device)
        # No row was ever written beyond; `clear` must not commit the rest of the memory.
        self._num_touched = 0

    def plan_decode(self, positions_B: Tensor, *, longest: int, rows_B: Tensor | None = None) -> Tensor:
        """Let the next forward add one token to each of the first B rows, at `positions_B`; `longest` counts them in.

        rows_B     where the tokens are written, if not all of them to the first rows: the spare row takes what is not wanted
        Shapes     positions_B, rows_B (B,) int64; returns the mask (B, 1, 1, L).
        Invariant  each row was opened by `open_row` at its own position.
        """
        num_rows, num_read = positions_B.shape[0], _round_up(longest)
        if rows_B is None:
            rows_B = self._rows_S[:num_rows]
        # With a zero of the device: a graph can hold no copy from the CPU.
        self.mask_ST.index_put_((rows_B, positions_B), self._zero)
        self._set_plan(DecodePlan(rows_B=rows_B, positions_B=positions_B, num_rows=num_rows, num_read=num_read))
        return self.mask_ST[:num_rows, None, None, :num_read]

    def plan_prefill(self, row: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Let the next forward write the tokens [begin, end) of one row.

        Shapes  returns positions (1, Q) int64 and the causal mask (1, 1, Q, L), Q = end - begin.
        """
        num_read = _round_up(end)
        positions_Q = self._positions_T[begin:end]
        allowed_QL = self._positions_T[:num_read] <= positions_Q[:, None]
        mask_QL = torch.full(allowed_QL.shape, -torch.inf, dtype=self.mask_ST.dtype, device=self.mask_ST.device)
        mask_QL.masked_fill_(allowed_QL, 0.0)
        self._set_plan(PrefillPlan(row=row, begin=begin, end=end, num_read=num_read))
        return positions_Q[None], mask_QL[None, None]

    def touch(self, end: int) -> None:
        """Tell that positions up to `end` are written by whoever needs neither plan nor mask."""
        self._num_touched = max(self._num_touched, _round_up(end))

    def open_row(self, row: int, length: int) -> None:
        """Let a row of `length` written positions attend to them when it decodes."""
        self.mask_ST[row, :length] = 0.0
        self.mask_ST[row, length:] = -torch.inf

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row's first `length` positions over those of another row, and open that."""
        written = _round_up(length)  # the kernels of a CPU keep the keys of sixteen positions together
        for layer in self.slot_layers:
            if layer.is_initialized:
                assert layer.keys is not None and layer.values is not None
                layer.keys[target, :, :written] = layer.keys[source, :, :written]
                layer.values[target, :, :written] = layer.values[source, :, :written]
        self.open_row(target, length)

    def clear(self, rows: Sequence[int]) -> None:
        """Zero rows that may hold what isn't finite."""
        for layer in self.slot_layers:
            if layer.is_initialized:
                assert layer.keys is not None and layer.values is not None
                for row in rows:
                    layer.keys[row, :, : self._num_touched].zero_()
                    layer.values[row, :, : self._num_touched].zero_()

    def release(self, row: int) -> None:
        """Give back what a row's positions took of the memory; on a CPU only, where it was taken page by page."""
        for layer in self.slot_layers:
            layer.release(row)

    def read_states(self, row: int, begin: int, end: int) -> Tensor:
        """A copy of the keys and values at [begin, end) of a row, (2, L, H, end - begin, D)."""
        return torch.stack(
            [
                torch.stack([_data(states)[row, :, begin:end] for states in kind])
                for kind in zip(*((layer.keys, layer.values) for layer in self.slot_layers), strict=True)
            ]
        )

    def write_states(self, row: int, begin: int, states_2LHTD: Tensor) -> None:
        """Put what `read_states` gave into a row, from `begin` on."""
        end = begin + states_2LHTD.shape[3]
        for layer, keys_HTD, values_HTD in zip(self.slot_layers, *states_2LHTD, strict=True):
            _data(layer.keys)[row, :, begin:end] = keys_HTD
            _data(layer.values)[row, :, begin:end] = values_HTD
        self.touch(end)

    @property
    def bytes_per_token(self) -> int:
        """What the keys and values of one token take, over all layers."""
        states = [_data(states) for layer in self.slot_layers for states in (layer.keys, layer.values)]
        return sum(state.nbytes for state in states) // (self._num_rows * self.num_positions)

    def addresses(self) -> list[tuple[int, int]]:
        """Where each layer's keys and values begin, for kernels that read them in place. They stay there."""
        return [(_data(layer.keys).data_ptr(), _data(layer.values).data_ptr()) for layer in self.slot_layers]

    def _set_plan(self, plan: DecodePlan | PrefillPlan) -> None:
        self._num_touched = max(self._num_touched, plan.num_read)
        for layer in self.slot_layers:
            layer.plan = plan


def _data(states: Tensor | None) -> Tensor:
    assert states is not None, "a cache before its first forward"
    return states


def require_full_attention(model: PreTrainedModel) -> None:
    """Refuse what a row of keys and values, written once and read whole, doesn't describe.

    Raises  ConfigError for encoder-decoders, sliding-window, chunked, linear, hybrid and shared caches, ALiBi, and
            models that take no positions.
    """
    # get_text_config: of a model that also sees images, the part that writes text.
    config = model.config.get_text_config(decoder=True)
    expected = f"Expected a causal model with full attention in every layer, found {config.model_type} with"
    advice = "Serve it with another engine."
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError(f"{expected} an encoder. {advice}")
    kinds = sorted(set(get_layer_types_and_kwargs(config)[0]) - {"full_attention"})
    if kinds:
        raise ConfigError(f"{expected} {', '.join(kinds)} layers. {advice}")
    if getattr(config, "alibi", False):
        raise ConfigError(f"{expected} ALiBi, which reads its positions out of a two-dimensional mask. {advice}")
    parameters = inspect.signature(model.forward).parameters
    missing = sorted({"position_ids", "past_key_values", "attention_mask"} - set(parameters))
    if missing:
        raise ConfigError(f"{expected} a forward that takes no {', '.join(missing)}. {advice}")


def _round_up(length: int) -> int:
    return -(-length // READ_MULTIPLE) * READ_MULTIPLE
