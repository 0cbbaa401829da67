"""TorchEngine: one worker thread that serves many requests at once on one model.

    any thread    submit ─▶ _waiting (bounded)            cancel ─▶ a flag on the answer
    its thread    _run:  admit to free slots ─▶ Scheduler.step() ─▶ deltas to the callbacks, again and again

Law      no request can end or hold up another: what fails is answered alone, and the loop goes on.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from aifactory.engine.adapters import Adapter, load_adapter
from aifactory.engine.answer import Answer
from aifactory.engine.cache import SlotCache, require_full_attention
from aifactory.engine.compiled import CompiledForward
from aifactory.engine.fused import FusedForward
from aifactory.engine.fused_layers import FusedLayers, why_not_fused
from aifactory.engine.fused_prompts import FusedPrompts
from aifactory.engine.limits import Limits
from aifactory.engine.load import load_model, read_context_length, read_eos_ids
from aifactory.engine.own_forward import OwnForward
from aifactory.engine.packed import WeightKind, pack_model, why_not_packed
from aifactory.engine.parity import check_cached_forward, check_packed, plain_logits
from aifactory.engine.prompts import OwnPrompts, PromptReader
from aifactory.engine.protocol import CacheUse, GenerationRequest, OnDelta
from aifactory.engine.scheduler import Scheduler
from aifactory.engine.steps import DecodeForward, DecodeSteps
from aifactory.engine.team import ThreadTeam
from aifactory.errors import BadRequestError, CapacityError, ConfigError, TokenizerMismatchError
from aifactory.text.tokenizer import TextTokenizer, load_tokenizer

if TYPE_CHECKING:
    from aifactory.engine.grammar import Grammars, Matcher

_log = logging.getLogger(__name__)

_PREFILL_CHUNK = 256
_FUSED_PREFILL_CHUNK = 2048


class TorchEngine:
    """The `Engine` protocol over a Hugging Face model's own forward."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: TextTokenizer,
        *,
        num_slots: int = 16,
        max_queued: int = 256,
        prefill_chunk: int | None = None,
        device: str = "cpu",
        num_threads: int | None = None,
        context_length: int | None = None,
        cache_tokens: int | None = None,
        prefix_tokens: int | None = None,
        batch_invariant: bool = False,
        adapters: Mapping[str, Path] | None = None,
        compiled: bool | None = None,
        weights: WeightKind | None = None,
        graphs: bool | None = None,
        tiles: bool = True,
        reuses_answers: bool = True,
    ) -> None:
        """Check the model, allocate the cache, start the thread. The model belongs to the engine from here on.

        num_slots       requests that decode at once; each has a row of `context_length` in the cache
        max_queued      answers that wait for a slot; one more raises CapacityError
        prefill_chunk   most prompt tokens between two tokens of the others, while no more wait than decode. None: 256, and
                        2,048 where the kernels for CUDA read prompts, which takes them a few milliseconds.
        num_threads     torch threads of the worker; None leaves the process's setting. One per CPU of the replica:
                        more of them on a shared machine cost a factor.
        context_length  None: the model's own
        cache_tokens    most tokens of all slots together, prompts and longest answers; what does not fit beside the
                        others waits, and on a CPU rows give their memory back. None: num_slots times context_length.
        prefix_tokens   tokens of former prompts and answers that are kept for those that begin alike, 0 for none.
                        None: a quarter of cache_tokens.
        batch_invariant whether an answer must have the same bits whatever else is in the batch and was before. With the
                        kernels what is in the batch never changes them, and this turns `reuses_answers` off. Without them
                        each row is then computed by itself, and no beginning is reused: a step of B rows takes as long as
                        B steps of one.
        adapters        folders of low-rank adapters in peft's form, by the names that requests choose them by
        compiled        whether the engine's own kernels compute the model: on a CPU all of it (`why_not_packed` says which
                        ones they can), on CUDA decode steps and prompts (`why_not_fused`). Its weights are then laid out anew, in
                        place. None: wherever they can. They are compiled once on a machine, which takes ten seconds or so.
        weights         with the kernels on a CPU: what weights are kept and read as, with bfloat16 also what is multiplied by
                        them, and keys and values. None: as the model has them.
        graphs          whether decode steps are CUDA graphs. None: on CUDA, unless `batch_invariant`. On a CPU there is none, but
                        the same is done in the same memory.
        tiles           with the kernels on a CPU: whether longer prompts are multiplied by the processor's matrix unit, where it
                        has one: as exactly, but not to the same bits as what is generated. With weights of bfloat16 all is, steps
                        included, to the same bits.
        reuses_answers  with tiles and other weights: whether a prompt that goes on from a former answer has what was generated
                        there. Else that answer is read again, and has the bits that it has wherever it is read.
        Raises          ConfigError, ParityError if this engine can't serve the architecture; TokenizerMismatchError.
        """
        for name, value, least in (
            ("num_slots", num_slots, 1),
            ("max_queued", max_queued, 1),
            ("prefill_chunk", prefill_chunk, 1),
            ("cache_tokens", cache_tokens, 2),
            ("prefix_tokens", prefix_tokens, 0),
        ):
            if value is not None and value < least:
                raise ConfigError(f"Expected {name} of at least {least}, found {value}.")
        require_full_attention(model)
        self._context_length = context_length = read_context_length(model.config, context_length)
        embedding = model.get_input_embeddings().weight
        assert isinstance(embedding, torch.Tensor)
        self._vocab_size = vocab_size = embedding.shape[0]
        if tokenizer.vocab_size > self._vocab_size:
            raise TokenizerMismatchError(
                f"Expected a tokenizer of at most {self._vocab_size} tokens, the rows of the model's embedding, found "
                f"{tokenizer.vocab_size}. Load the tokenizer that was saved with this model."
            )
        self._tokenizer = tokenizer
        self._eos_ids = read_eos_ids(model) | {tokenizer.eos_id}
        # Built for the first request that has one.
        self._grammars: Grammars | None = None
        self._grammars_lock = threading.Lock()
        self._max_queued = max_queued
        self._num_threads = num_threads

        model = model.to(torch.device(device)).eval()  # type: ignore[arg-type]
        kind = _kind_of_weights(model, compiled, weights)
        self._team = ThreadTeam(num_threads or torch.get_num_threads()) if kind is not None else None
        try:
            with torch.inference_mode():
                packed = None
                if self._team is not None and kind is not None:
                    before_V = plain_logits(model, vocab_size=vocab_size, context_length=context_length)
                    packed = pack_model(model, kind, self._team)
                    check_packed(model, before_V, kind, context_length=context_length)
                with_steps = _takes_steps(
                    graphs, device=device, batch_invariant=batch_invariant, is_packed=kind is not None
                )
                cache = SlotCache(
                    num_layers=model.config.get_text_config(decoder=True).num_hidden_layers,
                    num_slots=num_slots,
                    context_length=context_length,
                    dtype=model.dtype,
                    device=device,
                    has_spare_row=with_steps,
                    kept_dtype=torch.bfloat16 if kind == "bfloat16" else None,
                )
                check = partial(
                    check_cached_forward, model, cache, vocab_size=vocab_size, context_length=context_length
                )
                check()
                forward = steps = None
                prompts: PromptReader | None = None
                is_fused = False
                if self._team is not None and packed is not None:
                    forward = prompts = CompiledForward(model, packed, cache, self._team, with_tiles=tiles)
                    check(compiled=forward)
                    check(prompts=prompts)
                    if forward.has_tiles:
                        check(prompts=prompts, as_long=True)
                if with_steps:
                    is_fused = compiled is not False and model.device.type == "cuda" and why_not_fused(model) is None
                    decode, prompts = _fused(model, cache) if is_fused else _unfused(model, cache)
                    steps = DecodeSteps(decode, cache, device=device)
                    check(steps=steps)
                    check(prompts=prompts)
        except BaseException:
            if self._team is not None:
                self._team.close()
            raise
        self._cache_tokens = num_slots * context_length if cache_tokens is None else cache_tokens
        self._limits = Limits(
            context_length=context_length,
            cache_tokens=self._cache_tokens,
            vocab_size=vocab_size,
            max_queued=max_queued,
        )
        self._prefix_tokens = self._cache_tokens // 4 if prefix_tokens is None else prefix_tokens
        if batch_invariant and forward is None:
            self._prefix_tokens = 0
        # Of a model with tied weights the embedding is the head; else its rows are looked up one by one.
        self._weight_bytes = packed.num_bytes if packed is not None else _matrix_bytes(model)
        self._bytes_per_token = cache.bytes_per_token
        self._scheduler: Scheduler | None = Scheduler(
            model,
            cache,
            vocab_size=vocab_size,
            prefill_chunk=prefill_chunk or (_FUSED_PREFILL_CHUNK if is_fused else _PREFILL_CHUNK),
            device=device,
            on_finished=self._forget,
            cache_tokens=self._cache_tokens,
            prefix_tokens=self._prefix_tokens,
            batch_invariant=batch_invariant,
            reuses_answers=reuses_answers and not batch_invariant,
            compiled=forward,
            steps=steps,
            prompts=prompts,
        )

        self._model: PreTrainedModel | None = model
        self._adapter_names: set[str] = set()
        self._new_adapters: deque[tuple[Adapter, Future[None]]] = deque()
        try:
            for name, folder in (adapters or {}).items():
                self._scheduler.add_adapter(load_adapter(name, folder, model))
                self._adapter_names.add(name)
        except BaseException:
            if self._team is not None:
                self._team.close()
            raise

        # Guards everything below; notified when there is work, when a request ends, and at close.
        self._changed = threading.Condition()
        self._waiting: deque[Answer] = deque()
        self._ended: list[Answer] = []
        """Those that had ended before they came."""
        self._unfinished: dict[str, list[Answer]] = {}
        self._cancels_waiting = False
        self._closing = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="torch-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        num_slots: int = 16,
        max_queued: int = 256,
        prefill_chunk: int | None = None,
        num_threads: int | None = None,
        context_length: int | None = None,
        cache_tokens: int | None = None,
        prefix_tokens: int | None = None,
        batch_invariant: bool = False,
        adapters: Mapping[str, Path] | None = None,
        compiled: bool | None = None,
        weights: WeightKind | None = None,
        graphs: bool | None = None,
        tiles: bool = True,
        reuses_answers: bool = True,
    ) -> TorchEngine:
        """The engine of a model folder with its tokenizer.

        Raises  UnsafeModelError, and as the constructor.
        """
        return cls(
            load_model(folder, device=device, dtype=dtype),
            load_tokenizer(folder),
            num_slots=num_slots,
            max_queued=max_queued,
            prefill_chunk=prefill_chunk,
            device=device,
            num_threads=num_threads,
            context_length=context_length,
            cache_tokens=cache_tokens,
            prefix_tokens=prefix_tokens,
            batch_invariant=batch_invariant,
            adapters=adapters,
            compiled=compiled,
            weights=weights,
            graphs=graphs,
            tiles=tiles,
            reuses_answers=reuses_answers,
        )

    @property
    def context_length(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return self._context_length

    @property
    def num_unfinished(self) -> int:
        """Requests that were accepted and have not ended."""
        with self._changed:
            return len(self._unfinished)

    @property
    def failure(self) -> str | None:
        """Why it will never answer again; see `Engine.failure`."""
        return None if self._closing or self._thread.is_alive() else "the engine's thread has ended"

    @property
    def cache_use(self) -> CacheUse:
        """What the memory for keys and values holds; of an engine that has stopped, nothing."""
        scheduler = self._scheduler
        return CacheUse(
            num_reserved=scheduler.num_reserved if scheduler else 0,
            num_used=scheduler.num_used if scheduler else 0,
            max_tokens=self._cache_tokens,
            num_kept=scheduler.prefixes.num_tokens if scheduler else 0,
            max_kept=self._prefix_tokens,
            num_reused=scheduler.prefixes.num_reused if scheduler else 0,
            bytes_per_token=self._bytes_per_token,
        )

    @property
    def weight_bytes(self) -> int:
        """What a decode step reads of the weights, however many requests share it; bytes."""
        return self._weight_bytes

    @property
    def adapters(self) -> frozenset[str]:
        """The names of adapters that a request may choose."""
        return frozenset(self._adapter_names)

    def add_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter beside the others, while requests go on; it is there when this returns.

        Not from a callback. Raises  UnsafeModelError, ConfigError, CapacityError if the engine is closing.
        """
        model = self._model
        if name in self._adapter_names:
            raise ConfigError(f"Expected a name of no adapter, found {name!r} in use. Choose another one.")
        if model is None:
            raise CapacityError("The engine is closing and takes no adapter.")
        adapter, added = load_adapter(name, folder, model), Future[None]()
        with self._changed:
            if self._closing:
                raise CapacityError("The engine is closing and takes no adapter.")
            self._new_adapters.append((adapter, added))
            self._changed.notify_all()
        added.result()

    def submit(self, request: GenerationRequest, on_delta: OnDelta) -> None:
        """Accept a request and return; see `Engine.submit`."""
        self._limits.check(request, self._adapter_names)
        matcher = self._compile_grammar(request)
        answers = [
            Answer(
                request,
                on_delta,
                self._tokenizer,
                self._eos_ids,
                index=index,
                matcher=matcher.copy() if matcher is not None else None,
            )
            for index in range(request.num_answers)
        ]
        with self._changed:
            if self._closing:
                raise CapacityError("The engine is closing and accepts no more requests. Send it again.")
            if request.id in self._unfinished:
                raise BadRequestError(f"Expected an id not in use, found {request.id!r} in flight.", field="id")
            if len(self._waiting) + len(answers) > self._max_queued:
                raise CapacityError(
                    f"Expected room for {len(answers)} in the queue of {self._max_queued} answers, found "
                    f"{len(self._waiting)} waiting. Send it again later."
                )
            self._unfinished[request.id] = answers
            self._waiting.extend(answer for answer in answers if answer.ended_before is None)
            self._ended.extend(answer for answer in answers if answer.ended_before is not None)
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        """End a request soon; see `Engine.cancel`."""
        with self._changed:
            for answer in self._unfinished.get(request_id, ()):
                answer.cancelled = True
                self._cancels_waiting = True
                self._changed.notify_all()

    def close(self, drain_timeout_s: float) -> None:
        """Drain, cancel what is left, stop the thread, free model and cache. A second call does nothing more."""
        is_worker = threading.current_thread() is self._thread
        with self._changed:
            self._closing = True
            if not is_worker:
                self._changed.wait_for(lambda: not self._unfinished, timeout=max(drain_timeout_s, 0.0))
            for answers in self._unfinished.values():
                for answer in answers:
                    answer.cancelled = True
            self._cancels_waiting = True
            self._stopping = True
            self._changed.notify_all()
        # From a callback: the thread frees everything itself when the callback has returned.
        if not is_worker:
            self._thread.join()

    def _compile_grammar(self, request: GenerationRequest) -> Matcher | None:
        if request.sampling.grammar is None or request.pooling is not None:
            return None
        with self._grammars_lock:
            if self._grammars is None:
                from aifactory.engine.grammar import Grammars

                self._grammars = Grammars(self._tokenizer, vocab_size=self._vocab_size, eos_ids=self._eos_ids)
        return self._grammars.compile(request.sampling.grammar)

    def _run(self) -> None:
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        scheduler = self._scheduler
        assert scheduler is not None
        # inference_mode belongs to a thread.
        with torch.inference_mode():
            while self._admit(scheduler):
                try:
                    scheduler.step()
                except Exception as error:
                    _log.exception("step failed")
                    scheduler.fail_all(f"{type(error).__name__}: {error}")
        # The cache and, unless its owner keeps it, the model go with the scheduler.
        self._scheduler = self._model = None
        for _, added in self._new_adapters:
            added.set_exception(CapacityError("The engine is closing and takes no adapter."))
        if self._team is not None:
            self._team.close()

    def _admit(self, scheduler: Scheduler) -> bool:
        """Wait for work and put waiting requests into free slots; False when the engine has stopped."""
        cancelled: list[Answer] = []
        with self._changed:
            while scheduler.is_idle and not self._waiting and not self._ended and not self._new_adapters:
                if self._stopping:
                    return False
                self._changed.wait()
            if self._cancels_waiting:
                self._cancels_waiting = False
                cancelled = [answer for answer in self._waiting if answer.cancelled]
                self._waiting = deque(answer for answer in self._waiting if not answer.cancelled)
            # In their order: a large one that waits for room is not overtaken for ever.
            while self._waiting and scheduler.has_room_for(self._waiting[0]):
                scheduler.add(self._waiting.popleft())
            new_adapters, self._new_adapters = self._new_adapters, deque()
            ended, self._ended = self._ended, []
        # Outside the lock: a callback may submit.
        for adapter, added in new_adapters:
            try:
                scheduler.add_adapter(adapter)
                self._adapter_names.add(adapter.name)
                added.set_result(None)
            except ConfigError as error:
                added.set_exception(error)
        for answer in cancelled:
            self._forget(answer)
            answer.deliver(answer.end("cancelled"))
        for answer in ended:
            self._forget(answer)
            answer.deliver(answer.end(answer.ended_before or "stop"))
        return True

    def _forget(self, answer: Answer) -> None:
        with self._changed:
            answers = self._unfinished[answer.request.id]
            answers.remove(answer)
            if not answers:
                del self._unfinished[answer.request.id]
            self._changed.notify_all()


def _matrix_bytes(model: PreTrainedModel) -> int:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[no-untyped-call]
    tied = head is not None and head.weight is embedding.weight
    looked_up = [] if tied else [id(embedding.weight)]
    return sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in looked_up)


def _takes_steps(graphs: bool | None, *, device: str, batch_invariant: bool, is_packed: bool) -> bool:
    if graphs and (batch_invariant or is_packed):
        other = "batch_invariant" if batch_invariant else "the compiled kernels of a CPU"
        raise ConfigError(f"Expected graphs or {other}, found both. Leave one of them out.")
    if graphs is None:
        return torch.device(device).type == "cuda" and not batch_invariant
    return graphs


def _fused(model: PreTrainedModel, cache: SlotCache) -> tuple[DecodeForward, PromptReader]:
    layers = FusedLayers(model, num_positions=cache.num_positions)
    return FusedForward(layers, cache, most_rows=cache.num_slots), FusedPrompts(layers, cache)


def _unfused(model: PreTrainedModel, cache: SlotCache) -> tuple[DecodeForward, PromptReader]:
    return OwnForward(model, cache), OwnPrompts(model, cache)


def _kind_of_weights(model: PreTrainedModel, compiled: bool | None, weights: WeightKind | None) -> WeightKind | None:
    """What the kernels keep the weights as; None where the model's own forward is to compute everything."""
    if compiled is False and weights is not None:
        raise ConfigError(f"Expected weights only with the compiled kernels, found {weights!r} and compiled off.")
    on_cuda = model.device.type == "cuda" and weights is None
    reason = why_not_fused(model) if on_cuda else why_not_packed(model)
    if reason is not None and (compiled or weights is not None):
        raise ConfigError(
            f"Expected a model for the compiled kernels, found that {reason}. Leave `compiled` and `weights` out."
        )
    if compiled is False or reason is not None or on_cuda:
        return None
    own: dict[torch.dtype, WeightKind] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    return weights or own.get(model.dtype, "float32")
