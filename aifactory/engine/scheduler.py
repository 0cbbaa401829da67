"""Scheduler: which request advances, tick by tick, in one thread. No threads, locks or queues here.

    step():  end what was cancelled ─▶ prefill up to `prefill_chunk` tokens ─▶ one token for every decoding row

A prompt is prefilled in chunks and others decode between them, so a long prompt delays each token of others by at most
one chunk. Where more requests wait to be read than decode, a step reads so many times more, up to MOST_CHUNKS: those who wait
lose more by a step of few rows than those few by waiting. A forward that raises ends the requests that were in it, and no others.

Shapes   B rows that decode, Q tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aifactory.engine.adapters import Adapter, AdapterHooks
from aifactory.engine.answer import Answer
from aifactory.engine.cache import SlotCache
from aifactory.engine.choice import Choice
from aifactory.engine.compiled import CompiledForward
from aifactory.engine.logprobs import score_tokens
from aifactory.engine.prefix import BLOCK, PrefixStore
from aifactory.engine.prompts import PromptChunk, PromptReader, last_only
from aifactory.engine.protocol import FinishReason, TokenScore
from aifactory.engine.sampling import NOT_FINITE, Draws
from aifactory.engine.steps import DecodeSteps
from aifactory.observe import metrics, tracing

_log = logging.getLogger(__name__)

_NOT_FINITE_ERROR = "the model's logits are not finite numbers"

_PREFILL_SECONDS = metrics.ENGINE_STEP_SECONDS.of(phase="prefill")
_DECODE_SECONDS = metrics.ENGINE_STEP_SECONDS.of(phase="decode")
_PREFILL_TOKENS = metrics.ENGINE_TOKENS.of(phase="prefill")
_DECODE_TOKENS = metrics.ENGINE_TOKENS.of(phase="decode")

MOST_CHUNKS = 4
"""Chunks of prompts that others wait for at most, between two of their tokens."""
_MOST_PROMPT_LOGITS = 2**24
"""64 MB in fp32: a prompt whose tokens are scored is read in chunks of so few tokens."""


class _Slot:
    """A request with a row of the cache. While it decodes, the row is its place in `Scheduler._decoding`."""

    __slots__ = ("adapter", "answer", "draws", "is_sound", "length", "next_id", "pooled_H", "prompt_scores", "row")

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.adapter = answer.request.adapter
        self.draws = Draws(answer.request.sampling.seed, answer.index, num_drawn=len(answer.begun))
        self.prompt_scores: list[TokenScore] = []
        self.pooled_H: Tensor | None = None
        """Of a request for an embedding: the sum of the hidden states so far, or the last one."""
        self.length = 0
        """Positions of the row that are written."""
        self.row = -1
        """-1 until its prefill begins."""
        self.is_sound = True
        """Whether what the row holds may be used for others."""
        self.next_id = -1
        """The last sampled token, which the next step feeds."""


class Scheduler:
    """Requests in slots, and the step that advances all of them."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: SlotCache,
        *,
        vocab_size: int,
        prefill_chunk: int,
        device: torch.device | str,
        on_finished: Callable[[Answer], None],
        cache_tokens: int,
        prefix_tokens: int,
        batch_invariant: bool = False,
        reuses_answers: bool = True,
        compiled: CompiledForward | None = None,
        steps: DecodeSteps | None = None,
        prompts: PromptReader | None = None,
    ) -> None:
        """`on_finished` hears of each request that leaves, just before its last delta is delivered.

        batch_invariant   with the model's own forward: rows never share one, and prompts are always cut at the same
                          places, for what a kernel computes depends on the shape of what it is given
        reuses_answers    whether what was generated may take the place of what would be read to other bits
        compiled   computes steps in place of the model's own forward, over the same cache
        steps      takes those of rows without adapters in its place
        prompts    reads in its place those without adapters of which no scores are asked, several at once
        """
        self._model = model
        self._compiled = compiled
        self._steps = steps
        self._prompts = prompts
        # The kernels give the same bits however rows and prompts are put together.
        self._rows_alone = batch_invariant and compiled is None
        # Then what had been generated is read as it was generated.
        self._reads_otherwise = compiled is not None and compiled.has_tiles
        self._keeps_answers = reuses_answers or not self._reads_otherwise
        self._cache = cache
        self._prefill_chunk = prefill_chunk
        self._device = device
        self._on_finished = on_finished
        self._cache_tokens = cache_tokens
        self._releases_rows = cache_tokens < cache.num_slots * cache.num_positions
        self.prefixes = PrefixStore(prefix_tokens)
        self.num_reserved = 0
        """Tokens that the requests in slots may come to, with their prompts."""
        self.num_used = 0
        """Tokens in the slots after the last step."""
        self._decoding: list[_Slot] = []
        self._prefilling: deque[_Slot] = deque()
        # What the next decode step is fed; None when rows came or went since the last one.
        self._choice: Choice | None = None
        self._ids_B1: Tensor | None = None
        self._positions_B: Tensor | None = None
        self._takes_steps = False
        self._adapters: dict[str, Adapter] = {}
        self._hooks = AdapterHooks(model)
        self._last_only = last_only(model)
        self._vocab_size = vocab_size

    def add_adapter(self, adapter: Adapter) -> None:
        """Make an adapter known, between two steps or before the first."""
        adapters = {**self._adapters, adapter.name: adapter}
        if self._compiled is not None:
            self._compiled.set_adapters(list(adapters.values()))
        else:
            self._hooks.add(adapter)
        self._adapters = adapters

    def has_room_for(self, answer: Answer) -> bool:
        """Whether `add` may take it now: a slot is free, and the tokens that it may come to fit beside all others'."""
        is_slot_free = len(self._decoding) + len(self._prefilling) < self._cache.num_slots
        return is_slot_free and self.num_reserved + answer.request.num_tokens <= self._cache_tokens

    @property
    def is_idle(self) -> bool:
        """Whether no request is in a slot."""
        return not self._decoding and not self._prefilling

    def add(self, answer: Answer) -> None:
        """Take a request into a free slot."""
        assert self.has_room_for(answer), "no room"
        self.num_reserved += answer.request.num_tokens
        self._prefilling.append(_Slot(answer))

    def step(self) -> None:
        """Advance: a chunk of prompts, or more where many wait, and one token of every decoding request."""
        self._end_cancelled()
        began = perf_counter()
        read = self._prefill()
        decoding = perf_counter()
        if read:
            _PREFILL_SECONDS.observe(decoding - began)
            _PREFILL_TOKENS.add(read)
        if rows := len(self._decoding):
            traced = [slot.answer for slot in self._decoding if slot.answer.request.trace is not None]
            began_ns = tracing.now() if traced else 0
            self._decode()
            for answer in traced:
                tracing.record("engine.step", answer.request.trace, began_ns=began_ns, rows=rows, index=answer.index)
            _DECODE_SECONDS.observe(perf_counter() - decoding)
            _DECODE_TOKENS.add(rows)
        self.num_used = sum([slot.length for slot in (*self._decoding, *self._prefilling)])

    def fail_all(self, error: str) -> None:
        """End every request in a slot, after a failure that can't be laid at the door of one of them."""
        slots = [*self._decoding, *self._prefilling]
        self._decoding.clear()
        self._prefilling.clear()
        self._choice = None
        self._cache.clear(range(self._cache.num_slots))
        for slot in slots:
            self._end(slot, "error", error)

    def _prefill(self) -> int:
        """Tokens that were read."""
        read = 0
        while self._prefilling and (budget := self._budget() - read) > 0:
            if read:
                self._end_cancelled()
            chunks = self._next_chunks(min(budget, self._prefill_chunk))
            if not chunks:
                break
            began_ns = tracing.now() if any(slot.answer.request.trace is not None for slot, _, _ in chunks) else 0
            try:
                firsts = self._prefill_chunks(chunks)
            except Exception as error:
                _log.exception("prefill failed requests=%s", [slot.answer.request.id for slot, _, _ in chunks])
                for slot, _, _ in chunks:
                    self._fail_prefill(slot, error)
                continue
            for (slot, begin, end), first in zip(chunks, firsts, strict=True):
                read += end - begin
                slot.length = end
                tracing.record(
                    "engine.prefill",
                    slot.answer.request.trace,
                    began_ns=began_ns,
                    begin=begin,
                    end=end,
                    prompts=len(chunks),
                )
                if end == len(slot.answer.read_ids):
                    self._end_prefill(slot, first)
        return read

    def _budget(self) -> int:
        """Tokens of prompts for a step, as it is now: what is read begins to decode."""
        return self._prefill_chunk * max(1, min(MOST_CHUNKS, len(self._prefilling) // max(1, len(self._decoding))))

    def _next_chunks(self, budget: int) -> list[tuple[_Slot, int, int]]:
        """Who reads which tokens [begin, end) of its prompt now: the first in the queue, and with it those that may share its forward.

        They get the rows after the decoding ones, in their order, since they join them in that order.
        """
        chunks: list[tuple[_Slot, int, int]] = []
        for slot in list(self._prefilling):
            if budget <= 0 or (chunks and not self._may_join(slot, chunks)):
                break
            if self._rows_alone and budget < self._chunk_of(slot, self._prefill_chunk):
                # A chunk is whole or isn't begun. A budget that nothing has used is large enough.
                break
            read_ids = slot.answer.read_ids
            try:
                if slot.row < 0:
                    slot.row = len(self._decoding) + len(chunks)
                if slot.length == 0 and not slot.answer.reads_whole_prompt:
                    slot.length = self.prefixes.restore(self._cache, slot.row, self._known(slot), slot.adapter)
            except Exception as error:
                _log.exception("prefix failed request=%s", slot.answer.request.id)
                self._fail_prefill(slot, error)
                break
            if chunks and self._is_read_already(slot, chunks):
                break
            begin, end = slot.length, min(slot.length + self._chunk_of(slot, budget), len(read_ids))
            prompt_end = len(slot.answer.request.prompt_ids)
            if self._reads_otherwise and begin < prompt_end:
                end = min(end, prompt_end)
            chunks.append((slot, begin, end))
            budget -= end - begin
            # Who has not read all keeps its place, and may have a row that another would get.
            if (
                end < len(read_ids)
                or not self._shares_forward(slot)
                or slot.row != len(self._decoding) + len(chunks) - 1
            ):
                break
        return chunks

    def _known(self, slot: _Slot) -> Sequence[int]:
        """What of a text is kept for others, and had from them, before it goes on."""
        return slot.answer.read_ids if self._keeps_answers else slot.answer.request.prompt_ids

    def _may_join(self, slot: _Slot, chunks: Sequence[tuple[_Slot, int, int]]) -> bool:
        assert self._prompts is not None
        length = self._told_length(slot, slot.length)
        return (
            sum(end - begin for _, begin, end in chunks) < self._prompts.tokens_together(length)
            and self._shares_forward(slot)
            and self._prompts.reads_alike(length, self._told_length(*chunks[0][:2]))
        )

    def _told_length(self, slot: _Slot, begin: int) -> int:
        """As `PromptChunk.length`, of a chunk that begins there."""
        answer = slot.answer
        if not self._reads_otherwise:
            return len(answer.read_ids)
        return len(answer.request.prompt_ids) if begin < len(answer.request.prompt_ids) else 0

    def _shares_forward(self, slot: _Slot) -> bool:
        answer = slot.answer
        return (
            self._prompts is not None
            and slot.adapter is None
            and answer.request.pooling is None
            and not answer.scores_prompt
        )

    def _is_read_already(self, slot: _Slot, chunks: Sequence[tuple[_Slot, int, int]]) -> bool:
        """Whether another of these reads what this one could have from `prefixes` a moment later."""
        end = slot.length + BLOCK
        if slot.answer.reads_whole_prompt or not self.prefixes.keeps_any or len(slot.answer.read_ids) <= end:
            return False
        return any(slot.answer.read_ids[:end] == other.answer.read_ids[:end] for other, _, _ in chunks)

    def _prefill_chunks(
        self, chunks: Sequence[tuple[_Slot, int, int]]
    ) -> Sequence[tuple[int, TokenScore | None] | None]:
        """Read chunks of prompts; of each the next token, where its prompt is at its end and wants one."""
        if not self._shares_forward(chunks[0][0]):
            ((slot, begin, end),) = chunks
            return [self._prefill_chunk_of(slot, begin, end)]
        assert self._prompts is not None
        self._hooks.use([])
        logits_CV = self._prompts.read(
            [
                PromptChunk(slot.answer.read_ids[begin:end], slot.row, begin, self._told_length(slot, begin))
                for slot, begin, end in chunks
            ]
        )
        firsts: list[tuple[int, TokenScore | None] | None] = [None] * len(chunks)
        telling = [
            index
            for index, (slot, _, end) in enumerate(chunks)
            if end == len(slot.answer.read_ids) and slot.answer.request.sampling.max_tokens > 0
        ]
        if telling:
            slots = [chunks[index][0] for index in telling]
            choice = self._choice_of(slots)
            _, token_ids, scores = choice.choose(logits_CV if len(telling) == len(chunks) else logits_CV[telling])
            for index, token_id, score in zip(telling, token_ids, scores, strict=True):
                firsts[index] = token_id, score
        return firsts

    def _end_prefill(self, slot: _Slot, first: tuple[int, TokenScore | None] | None) -> None:
        """A prompt is read: tell what comes next, and let it decode."""
        self._prefilling.popleft()
        slot.answer.take_prompt_scores(tuple(slot.prompt_scores))
        if slot.pooled_H is not None:
            self._embed(slot, slot.pooled_H)
        elif first is None:
            self._end(slot, "length")
        else:
            self._take(slot, *first)
        if slot.is_sound:
            self.prefixes.keep(self._cache, slot.row, self._known(slot), slot.adapter)
        if slot.answer.finished:
            self._release(slot.row)
        else:
            self._join_decoding(slot)

    def _fail_prefill(self, slot: _Slot, error: Exception) -> None:
        self._prefilling.remove(slot)
        self._cache.clear([slot.row])
        self._end(slot, "error", _describe(error))
        self._release(slot.row)

    def _chunk_of(self, slot: _Slot, budget: int) -> int:
        """How many tokens of a prompt are read at once."""
        if slot.answer.scores_prompt:
            return max(1, min(budget, _MOST_PROMPT_LOGITS // self._vocab_size))
        return budget

    def _prefill_chunk_of(self, slot: _Slot, begin: int, end: int) -> tuple[int, TokenScore | None] | None:
        """Read the tokens [begin, end) of a prompt and of what an answer has already; after the last, the next token, if any."""
        request, read_ids = slot.answer.request, slot.answer.read_ids
        ids_1Q = torch.tensor([read_ids[begin:end]], device=self._device)
        if request.pooling is not None:
            self._pool(slot, ids_1Q, begin, end)
            return None
        logits_QV = self._read(slot, ids_1Q, begin, end, last_only=not slot.answer.scores_prompt)
        if slot.answer.scores_prompt:
            if begin == 0:
                slot.prompt_scores.append(TokenScore(token_id=read_ids[0], logprob=None))
            following = read_ids[begin + 1 : end + 1]
            num_top = [request.sampling.logprobs or 0] * len(following)
            slot.prompt_scores += score_tokens(logits_QV[: len(following)], following, num_top) if following else []
        if end < len(read_ids) or request.sampling.max_tokens == 0:
            return None
        _, (token_id,), (score,) = self._choice_of([slot]).choose(logits_QV[-1:])
        return token_id, score

    def _read(self, slot: _Slot, ids_1Q: Tensor, begin: int, end: int, *, last_only: bool) -> Tensor:
        """Logits (Q, V) after the tokens [begin, end) of a prompt; of the last at least."""
        if self._compiled is not None:
            self._cache.touch(end)
            length = self._told_length(slot, begin)
            return self._compiled.prefill(
                ids_1Q, slot.row, begin, length=length, last_only=last_only, adapter=slot.adapter
            )
        positions_1Q, mask_11QL = self._cache.plan_prefill(slot.row, begin, end)
        return self._forward([slot], ids_1Q, positions_1Q, mask_11QL, last_only=last_only)[0]

    def _pool(self, slot: _Slot, ids_1Q: Tensor, begin: int, end: int) -> None:
        if self._compiled is not None:
            self._cache.touch(end)
            length = self._told_length(slot, begin)
            hidden_QH = self._compiled.hidden(ids_1Q, slot.row, begin, length=length, adapter=slot.adapter)
        else:
            positions_1Q, mask_11QL = self._cache.plan_prefill(slot.row, begin, end)
            self._hooks.use([self._adapter_of(slot)])
            # The model without its head.
            output = self._model.base_model(
                input_ids=ids_1Q,
                position_ids=positions_1Q,
                attention_mask=mask_11QL,
                past_key_values=self._cache,
                use_cache=True,
            )
            hidden_QH = output.last_hidden_state[0].float()
        if slot.answer.request.pooling == "last":
            slot.pooled_H = hidden_QH[-1]
            return
        # In double precision, so that chunks make no difference that fp32 shows.
        total_H = hidden_QH.double().sum(dim=0)
        slot.pooled_H = total_H if slot.pooled_H is None else slot.pooled_H + total_H

    def _embed(self, slot: _Slot, pooled_H: Tensor) -> None:
        if slot.answer.request.pooling == "mean":
            pooled_H = (pooled_H / len(slot.answer.request.prompt_ids)).float()
        if not bool(torch.isfinite(pooled_H).all()):
            slot.is_sound = False
            self._cache.clear([slot.row])
            self._end(slot, "error", "the model's hidden states are not finite numbers")
            return
        delta = slot.answer.embed(tuple(pooled_H.tolist()))
        self._leave(slot)
        slot.answer.deliver(delta)

    def _adapter_of(self, slot: _Slot) -> Adapter | None:
        return None if slot.adapter is None else self._adapters[slot.adapter]

    def _join_decoding(self, slot: _Slot) -> None:
        row = len(self._decoding)
        if slot.row != row:
            self._cache.move(slot.row, row, slot.length)
            self._release(slot.row)
            slot.row = row
        else:
            self._cache.open_row(row, slot.length)
        self._decoding.append(slot)
        self._choice = None

    def _decode(self) -> None:
        if not self._decoding:
            return
        try:
            if self._choice is None:
                self._choice = self._gather()
            token_ids, scores = self._next_tokens(self._choice)
        except Exception as error:
            _log.exception("decode failed requests=%d", len(self._decoding))
            slots, self._decoding, self._choice = self._decoding, [], None
            self._cache.clear(range(len(slots)))
            for slot in slots:
                self._end(slot, "error", _describe(error))
                self._release(slot.row)
            return
        for slot, token_id, score in zip(self._decoding, token_ids, scores, strict=True):
            slot.length += 1
            self._take(slot, token_id, score)
        self._drop_finished()

    def _next_tokens(self, choice: Choice) -> tuple[list[int], list[TokenScore | None]]:
        """One more token of every decoding row, and its score."""
        longest = 1 + max([slot.length for slot in self._decoding])
        if self._takes_steps:
            assert self._steps is not None
            self._hooks.use([])  # of a prompt that was read since
            logits_BV = self._steps.step(longest)
            if choice.is_likeliest:
                token_ids = self._steps.likeliest()
                # While these are told. In vain if a row ends with its token.
                self._steps.begin_next(longest + 1)
                return token_ids, [None] * len(token_ids)
            ids_B, token_ids, scores = choice.choose(logits_BV)
            self._steps.put(ids_B)
            return token_ids, scores
        assert self._ids_B1 is not None and self._positions_B is not None
        if self._compiled is not None:
            self._cache.touch(longest)
            adapters = [slot.adapter for slot in self._decoding]
            logits_BV = self._compiled.step(self._ids_B1, self._positions_B, adapters)
        elif self._rows_alone:
            logits_BV = torch.cat([self._forward_alone(slot) for slot in self._decoding])
        else:
            mask_B11L = self._cache.plan_decode(self._positions_B, longest=longest)
            logits_BV = self._forward(self._decoding, self._ids_B1, self._positions_B[:, None], mask_B11L)[:, -1]
        ids_B, token_ids, scores = choice.choose(logits_BV)
        self._ids_B1 = ids_B[:, None]
        self._positions_B += 1
        return token_ids, scores

    def _gather(self) -> Choice:
        slots = self._decoding
        self._ids_B1 = torch.tensor([[slot.next_id] for slot in slots], device=self._device)
        self._positions_B = torch.tensor([slot.length for slot in slots], device=self._device)
        self._takes_steps = self._steps is not None and all(slot.adapter is None for slot in slots)
        if self._takes_steps:
            assert self._steps is not None
            self._steps.feed(self._ids_B1[:, 0], self._positions_B)
        return self._choice_of(slots)

    def _choice_of(self, slots: Sequence[_Slot]) -> Choice:
        return Choice(
            [slot.answer for slot in slots],
            [slot.draws for slot in slots],
            vocab_size=self._vocab_size,
            device=self._device,
        )

    def _forward_alone(self, slot: _Slot) -> Tensor:
        """Logits (1, V) after one row's last token, in a forward of its own."""
        ids_11 = torch.tensor([[slot.next_id]], device=self._device)
        positions_11, mask_111L = self._cache.plan_prefill(slot.row, slot.length, slot.length + 1)
        return self._forward([slot], ids_11, positions_11, mask_111L)[:, -1]

    def _forward(
        self, slots: Sequence[_Slot], ids_BQ: Tensor, positions_BQ: Tensor, mask_B1QL: Tensor, *, last_only: bool = True
    ) -> Tensor:
        """Logits (B, Q, V) after each token; of the last at least, where no others are wanted."""
        self._hooks.use([self._adapter_of(slot) for slot in slots])
        output = self._model(
            input_ids=ids_BQ,
            position_ids=positions_BQ,
            attention_mask=mask_B1QL,
            past_key_values=self._cache,
            use_cache=True,
            **(self._last_only if last_only else {}),
        )
        logits_BQV: Tensor = output.logits
        return logits_BQV

    def _take(self, slot: _Slot, token_id: int, score: TokenScore | None) -> None:
        if token_id == NOT_FINITE:
            # A nan that stays in the row would reach its next owner through the masked positions.
            self._cache.clear([slot.row])
            slot.is_sound = False
            matcher = slot.answer.matcher
            if matcher is not None and matcher.error is not None:
                self._end(slot, "error", matcher.error, fault="grammar")
            else:
                self._end(slot, "error", _NOT_FINITE_ERROR)
            return
        slot.next_id = token_id
        delta = slot.answer.push(token_id, score)
        if delta is None:
            return
        if slot.answer.finished:
            self._leave(slot)
        slot.answer.deliver(delta)

    def _end(self, slot: _Slot, reason: FinishReason, error: str | None = None, *, fault: str | None = None) -> None:
        delta = slot.answer.end(reason, error, fault=fault)
        self._leave(slot)
        slot.answer.deliver(delta)

    def _leave(self, slot: _Slot) -> None:
        self.num_reserved -= slot.answer.request.num_tokens
        self._on_finished(slot.answer)

    def _release(self, row: int) -> None:
        if self._releases_rows:
            self._cache.release(row)

    def _end_cancelled(self) -> None:
        cancelled = [slot for slot in (*self._decoding, *self._prefilling) if slot.answer.cancelled]
        if not cancelled:
            return
        for slot in cancelled:
            self._end(slot, "cancelled")
        for slot in self._prefilling:
            if slot.answer.finished and slot.row >= 0:
                self._release(slot.row)
        self._prefilling = deque(slot for slot in self._prefilling if not slot.answer.finished)
        self._drop_finished()

    def _drop_finished(self) -> None:
        # From the last row down, so that the row that fills a hole is one that stays.
        for row in range(len(self._decoding) - 1, -1, -1):
            finished = self._decoding[row]
            if not finished.answer.finished:
                continue
            if finished.is_sound and self._keeps_answers:
                # What comes next in a conversation begins with this prompt and its answer. The last token was not fed.
                ids = [*finished.answer.request.prompt_ids, *finished.answer.token_ids[:-1]]
                self.prefixes.keep(self._cache, row, ids[: finished.length], finished.adapter)
            last = self._decoding.pop()
            if row < len(self._decoding):
                self._cache.move(last.row, row, last.length)
                last.row = row
                self._decoding[row] = last
            self._release(len(self._decoding))
            self._choice = None


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]
