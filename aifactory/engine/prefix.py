"""PrefixStore: keys and values of texts that were read before, so that requests that begin alike are read once.

    text   [ block of 64 tokens ][ block ][ block ] rest        a block is found by its tokens and the block before it

Law      tokens are compared, not hashes of them: what is found was computed from exactly that text, with that adapter.
Bound    at most `max_tokens` tokens; the blocks used longest ago go first, ends of texts before their beginnings.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from aifactory.engine.cache import READ_MULTIPLE, SlotCache

BLOCK = READ_MULTIPLE
"""Tokens of a block."""

_Key = tuple[int | str | None, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Block:
    number: int
    states: Tensor
    """(2, layers, heads_kv, BLOCK, head dim): keys and values."""


class PrefixStore:
    """Blocks by text. Used by the engine's thread alone."""

    def __init__(self, max_tokens: int) -> None:
        """`max_tokens` below BLOCK keeps nothing."""
        self._max_blocks = max_tokens // BLOCK
        self._blocks: OrderedDict[_Key, _Block] = OrderedDict()
        self._next_number = 0
        self.num_reused = 0
        """Tokens that were found and not read again, since the start."""

    @property
    def keeps_any(self) -> bool:
        """Whether there is room for a block at all."""
        return self._max_blocks > 0

    @property
    def num_tokens(self) -> int:
        """Tokens kept now."""
        return len(self._blocks) * BLOCK

    @property
    def num_bytes(self) -> int:
        """Memory of what is kept now."""
        return sum(block.states.nbytes for block in self._blocks.values())

    def restore(self, cache: SlotCache, row: int, ids: Sequence[int], adapter: str | None) -> int:
        """Write the longest known beginning of a text into a row; how many tokens it has. One at least is left to read."""
        found = self._find(ids, adapter, (len(ids) - 1) // BLOCK)
        for index, (_, block) in enumerate(found):
            cache.write_states(row, index * BLOCK, block.states)
        self._touch([key for key, _ in found])
        self.num_reused += len(found) * BLOCK
        return len(found) * BLOCK

    def keep(self, cache: SlotCache, row: int, ids: Sequence[int], adapter: str | None) -> None:
        """Copy the whole blocks of a text that a row holds, those that aren't known yet."""
        num_blocks = min(len(ids) // BLOCK, self._max_blocks)
        found = self._find(ids, adapter, num_blocks)
        keys = [key for key, _ in found]
        self._touch(keys)
        parent: int | str | None = found[-1][1].number if found else adapter
        for index in range(len(found), num_blocks):
            begin = index * BLOCK
            key = (parent, tuple(ids[begin : begin + BLOCK]))
            if len(self._blocks) >= self._max_blocks:
                self._blocks.popitem(last=False)
            self._blocks[key] = _Block(self._next_number, cache.read_states(row, begin, begin + BLOCK))
            parent = self._next_number
            self._next_number += 1
            keys.append(key)
        self._touch(keys)

    def _find(self, ids: Sequence[int], adapter: str | None, num_blocks: int) -> list[tuple[_Key, _Block]]:
        found: list[tuple[_Key, _Block]] = []
        parent: int | str | None = adapter
        for index in range(num_blocks):
            key = (parent, tuple(ids[index * BLOCK : (index + 1) * BLOCK]))
            block = self._blocks.get(key)
            if block is None:
                break
            found.append((key, block))
            parent = block.number
        return found

    def _touch(self, keys: Sequence[_Key]) -> None:
        # A beginning is used later than its ends, so that no end is left that nothing leads to.
        for key in reversed(keys):
            self._blocks.move_to_end(key)
