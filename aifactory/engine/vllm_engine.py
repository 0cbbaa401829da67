"""VllmEngine: the `Engine` protocol over vLLM's asynchronous engine, where vLLM is installed.

    any thread    submit ─▶ what can't be is refused        cancel ─▶ a flag on the answer, and its task is woken
    its thread    an event loop, one task for each answer:  vLLM's process ─▶ tokens and scores ─▶ Answer ─▶ deltas

vLLM computes in a process of its own. Another release is another engine with another process beside the first, until the
first has given its last answer; so there must be memory for two (`memory_share` on a GPU).

Law      no request can end or hold up another: what fails is answered alone. If vLLM's process ends, all that it was
         answering ends with an error, and `failure` says so.
Source   vllm 0.32, `v1/engine/async_llm.py`. vLLM is imported when an engine is made.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import threading
from concurrent.futures import Future
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from aifactory.engine.adapters import load_adapter
from aifactory.engine.answer import Answer
from aifactory.engine.limits import Limits
from aifactory.engine.load import read_context_length, read_eos_ids, require_safe_folder
from aifactory.engine.protocol import MAX_LOGPROBS, Delta, GenerationRequest, OnDelta, TokenScore
from aifactory.engine.vllm_process import Keeper, adapter_options, cache_bytes, require_vllm, start_llm, write_tokenizer
from aifactory.engine.vllm_sampling import require_possible, sampling_params, score
from aifactory.errors import BadRequestError, CapacityError, ConfigError, TokenizerMismatchError
from aifactory.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from vllm import RequestOutput

    from aifactory.engine.grammar import Grammars, Matcher

_log = logging.getLogger(__name__)
_END_S = 20.0
"""How long vLLM's processes may take to end by themselves."""


class _Running:
    """An answer and the task that follows it."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.task: asyncio.Task[None] | None = None
        self.reads = False
        """Whether the task waits for vLLM, so that it may be woken by cancelling it; once."""


class VllmEngine:
    """The `Engine` protocol over `vllm.v1.engine.async_llm.AsyncLLM`."""

    def __init__(
        self,
        folder: Path,
        tokenizer: TextTokenizer,
        *,
        num_slots: int = 16,
        max_queued: int = 256,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        num_threads: int | None = None,
        context_length: int | None = None,
        max_adapters: int = 0,
        max_adapter_rank: int = 64,
        memory_share: float = 0.4,
        eager: bool = False,
    ) -> None:
        """Start vLLM's process on the model of a folder; returns when it answers, which takes minutes on a CPU.

        num_slots         requests that decode at once
        max_queued        answers that wait beyond those; one more raises CapacityError
        dtype             in which weights are kept and read
        num_threads       threads on a CPU; None: one of each core that vLLM finds
        context_length    None: the model's own
        max_adapters      adapters that `add_adapter` may load; 0 for none
        max_adapter_rank  the largest rank of one
        memory_share      of a GPU's memory for weights and cache; of a CPU's free memory for the cache at most, which holds
                          num_slots times context_length tokens where that is less. What does not fit beside the others waits,
                          or is put back and read again. 0.4 leaves room for another release.
        eager             whether nothing is compiled: starts sooner, and is slower
        Raises            ConfigError if vLLM is not installed or can't serve the model, UnsafeModelError,
                          TokenizerMismatchError.
        """
        require_vllm()
        for name, value, least in (("num_slots", num_slots, 1), ("max_queued", max_queued, 1)):
            if value < least:
                raise ConfigError(f"Expected {name} of at least {least}, found {value}.")
        folder = Path(folder)
        require_safe_folder(folder)
        self._skeleton = skeleton = _skeleton(folder)
        context_length = read_context_length(skeleton.config, context_length)
        embedding = skeleton.get_input_embeddings().weight
        assert isinstance(embedding, torch.Tensor)
        if tokenizer.vocab_size > embedding.shape[0]:
            raise TokenizerMismatchError(
                f"Expected a tokenizer of at most {embedding.shape[0]} tokens, the rows of the model's embedding, found "
                f"{tokenizer.vocab_size}. Load the tokenizer that was saved with this model."
            )
        self._limits = Limits(
            context_length=context_length,
            # vLLM does not start with less, and makes room by putting others back.
            cache_tokens=context_length,
            vocab_size=embedding.shape[0],
            max_queued=max_queued,
        )
        self._tokenizer = tokenizer
        self._eos_ids = read_eos_ids(skeleton) | {tokenizer.eos_id}
        self._most_unfinished = num_slots + max_queued
        self._max_adapters = max_adapters
        self._max_adapter_rank = max_adapter_rank
        self._adapter_ids: dict[str, int] = {}
        self._adding = threading.Lock()
        # Built for the first request that has one.
        self._grammars: Grammars | None = None
        self._grammars_lock = threading.Lock()

        # Guards everything below; notified when a request ends.
        self._changed = threading.Condition()
        self._unfinished: dict[str, list[_Running]] = {}
        self._num_unfinished = 0
        self._closing = False
        self._failure: str | None = None
        # Of the loop's thread.
        self._llm: Any = None
        self._lora: dict[str, Any] = {}
        self._folder = folder
        self._count = 0
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        options: dict[str, Any] = {
            "model": str(folder),
            "dtype": str(dtype).removeprefix("torch."),
            "load_format": "safetensors",
            "trust_remote_code": False,
            # What a request leaves out is this project's default, not the model's.
            "generation_config": "vllm",
            "max_model_len": context_length,
            "max_num_seqs": num_slots,
            "max_logprobs": MAX_LOGPROBS,
            "logprobs_mode": "raw_logprobs",
            "enforce_eager": eager,
            "enable_prefix_caching": True,
            "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
            "disable_log_stats": True,
            **adapter_options(max_adapters, max_adapter_rank, device),
        }
        if device == "cpu":
            options["kv_cache_memory_bytes"] = cache_bytes(skeleton, dtype, num_slots, context_length, memory_share)
        else:
            options["gpu_memory_utilization"] = memory_share
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(options, device, num_threads, started), name="vllm-engine", daemon=True
        )
        self._thread.start()
        started.result()

    @property
    def context_length(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return self._limits.context_length

    @property
    def num_unfinished(self) -> int:
        """Requests that were accepted and have not ended."""
        with self._changed:
            return len(self._unfinished)

    @property
    def failure(self) -> str | None:
        """Why it will never answer again though nobody closed it; None while it serves."""
        llm = self._llm
        if not self._closing and llm is not None and llm.errored:
            # Kept: whoever is answered while the replica is already being put away is told of it too.
            self._failure = "vLLM's process has ended"
        return self._failure

    @property
    def adapters(self) -> frozenset[str]:
        """The names of adapters that a request may choose."""
        return frozenset(self._adapter_ids)

    def add_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter beside the others, while requests go on; it is there when this returns.

        Not from a callback. Raises  UnsafeModelError, ConfigError, CapacityError if the engine is closing.
        """
        from vllm.lora.request import LoRARequest

        with self._adding:
            if name in self._adapter_ids:
                raise ConfigError(f"Expected a name of no adapter, found {name!r} in use. Choose another one.")
            if self._closing:
                raise CapacityError("The engine is closing and takes no adapter.")
            # vLLM checks less: shapes against the model, and that nothing is asked for beyond low-rank matrices.
            adapter = load_adapter(name, folder, self._skeleton)
            if adapter.rank > self._max_adapter_rank:
                raise ConfigError(
                    f"Expected an adapter of rank {self._max_adapter_rank} at most, found {adapter.rank} in {folder}. Merge it "
                    "into its model instead."
                )
            if len(self._adapter_ids) >= self._max_adapters:
                raise ConfigError(f"Expected at most {self._max_adapters} adapters, found one more, {name!r}.")
            number = len(self._adapter_ids) + 1
            lora = LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(folder))
            try:
                with self._changed:
                    if self._closing:
                        raise CapacityError("The engine is closing and takes no adapter.")
                    added = asyncio.run_coroutine_threadsafe(self._llm.add_lora(lora), self._loop)
                is_added = added.result()
            except CapacityError:
                raise
            except Exception as error:
                raise ConfigError(f"Expected an adapter that vLLM can serve in {folder}, found: {error}") from error
            if not is_added:
                raise ConfigError(f"Expected an adapter that vLLM can serve in {folder}, found that it takes none.")
            self._lora[name] = lora
            self._adapter_ids[name] = number

    def submit(self, request: GenerationRequest, on_delta: OnDelta) -> None:
        """Accept a request and return; see `Engine.submit`."""
        require_possible(request)
        self._limits.check(request, self._adapter_ids)
        self._require_room_for_draw(request)
        matcher = self._compile_grammar(request)
        running = [
            _Running(
                Answer(
                    request,
                    on_delta,
                    self._tokenizer,
                    self._eos_ids,
                    index=index,
                    matcher=matcher.copy() if matcher is not None else None,
                )
            )
            for index in range(request.num_answers)
        ]
        failure = self.failure
        with self._changed:
            if self._closing:
                raise CapacityError("The engine is closing and accepts no more requests. Send it again.")
            if failure is not None:
                raise CapacityError(f"Expected an engine that answers, found that {failure}. Send it again later.")
            if request.id in self._unfinished:
                raise BadRequestError(f"Expected an id not in use, found {request.id!r} in flight.", field="id")
            if self._num_unfinished + len(running) > self._most_unfinished:
                raise CapacityError(
                    f"Expected room for {len(running)} among {self._most_unfinished} answers, found "
                    f"{self._num_unfinished} unfinished. Send it again later."
                )
            self._unfinished[request.id] = running
            self._num_unfinished += len(running)
            self._loop.call_soon_threadsafe(self._begin, list(running))

    def cancel(self, request_id: str) -> None:
        """End a request soon; see `Engine.cancel`."""
        with self._changed:
            self._cancel(self._unfinished.get(request_id, []))

    def close(self, drain_timeout_s: float) -> None:
        """Drain, cancel what is left, end vLLM's process and the thread. A second call does nothing more."""
        is_worker = threading.current_thread() is self._thread
        with self._changed:
            was_closing, self._closing = self._closing, True
            if not is_worker:
                self._changed.wait_for(lambda: not self._unfinished, timeout=max(drain_timeout_s, 0.0))
            for running in self._unfinished.values():
                self._cancel(running)
            if not was_closing or not self._loop.is_closed():
                self._in_loop(self._stopping.set)
        # From a callback: the thread frees everything itself when the callback has returned.
        if not is_worker:
            self._thread.join()

    # ── any thread, with the lock ─────────────────────────────────────────────────────────────────────────────────────

    def _cancel(self, running: list[_Running]) -> None:
        for each in running:
            each.answer.cancelled = True
        if running:
            self._in_loop(_wake, list(running))

    def _in_loop(self, call: Any, *args: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *args)

    def _require_room_for_draw(self, request: GenerationRequest) -> None:
        # vLLM scores a prompt only on the way to a token after it.
        if len(request.prompt_ids) >= self.context_length:
            raise BadRequestError(
                f"Expected a prompt of at most {self.context_length - 1} tokens, found {len(request.prompt_ids)}: the engine "
                "vllm wants room for one more. Shorten it.",
                field="prompt_ids",
            )

    def _compile_grammar(self, request: GenerationRequest) -> Matcher | None:
        """Where an answer stands in its grammar, which vLLM follows too; what is wrong with it is found before vLLM sees it."""
        if request.sampling.grammar is None:
            return None
        with self._grammars_lock:
            if self._grammars is None:
                from aifactory.engine.grammar import Grammars

                self._grammars = Grammars(self._tokenizer, vocab_size=self._limits.vocab_size, eos_ids=self._eos_ids)
        return self._grammars.compile(request.sampling.grammar)

    # ── its thread ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self, options: dict[str, Any], device: str, num_threads: int | None, started: Future[None]) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve(options, device, num_threads, started))
        finally:
            self._loop.close()

    async def _serve(
        self, options: dict[str, Any], device: str, num_threads: int | None, started: Future[None]
    ) -> None:
        with tempfile.TemporaryDirectory(prefix="aifactory-vllm-") as scratch:
            write_tokenizer(Path(scratch), self._tokenizer, self._skeleton)
            keeper = Keeper()
            try:
                self._llm = start_llm({**options, "tokenizer": scratch}, device, num_threads)
            except BaseException as error:
                keeper.close()
                _log.exception("vLLM did not start")
                cause = ConfigError(f"Expected a model that vLLM can serve in {self._folder}, found: {error}")
                cause.__cause__ = error
                started.set_exception(cause)
                return
            keeper.knows_all()
            started.set_result(None)
            try:
                await self._stopping.wait()
                tasks = [each.task for running in self._unfinished.values() for each in running if each.task]
                await asyncio.gather(*tasks, return_exceptions=True)
            finally:
                llm, self._llm = self._llm, None
                if llm.output_handler is not None:
                    # Before its process ends, which it would log as a failure.
                    llm.output_handler.cancel()
                await asyncio.to_thread(llm.shutdown, timeout=_END_S)
                others = asyncio.all_tasks() - {asyncio.current_task()}
                for task in others:
                    task.cancel()
                await asyncio.gather(*others, return_exceptions=True)
                keeper.close()

    def _begin(self, running: list[_Running]) -> None:
        for each in running:
            each.task = self._loop.create_task(self._follow(each))

    async def _follow(self, running: _Running) -> None:
        """From acceptance to the last delta."""
        answer = running.answer
        if answer.cancelled:
            self._finish(running, answer.end("cancelled"))
            return
        if answer.request.sampling.max_tokens == 0 and not answer.scores_prompt:
            self._finish(running, answer.end("length"))
            return
        last: Delta | None = None
        try:
            outputs = self._generate(answer)
        except Exception as error:
            self._finish(running, self._failed(answer, error))
            return
        # Leaving before the end tells vLLM to stop.
        async with aclosing(outputs):
            running.reads = True
            try:
                async for output in outputs:
                    last = self._take(answer, output)
                    if last is not None or answer.cancelled:
                        break
            except asyncio.CancelledError:
                pass
            except Exception as error:
                last = self._failed(answer, error)
            finally:
                running.reads = False
            if last is None:
                last = answer.end("cancelled") if answer.cancelled else answer.end("error", "vLLM ended the answer")
            self._finish(running, last)

    def _generate(self, answer: Answer) -> AsyncGenerator[RequestOutput]:
        """What vLLM answers; nothing is asked of it before the first is waited for."""
        request = answer.request
        self._count += 1
        outputs: AsyncGenerator[RequestOutput] = self._llm.generate(
            {"type": "token", "prompt_token_ids": list(request.prompt_ids)},
            sampling_params(request.sampling, answer.index, self._eos_ids),
            # Ids of requests may come again; vLLM forgets one a while after its end.
            request_id=f"{request.id}.{answer.index}.{self._count}",
            lora_request=None if request.adapter is None else self._lora[request.adapter],
        )
        return outputs

    def _take(self, answer: Answer, output: RequestOutput) -> Delta | None:
        """Deliver what has come; the last delta is handed back."""
        asked = answer.request.sampling
        if output.prompt_logprobs and answer.scores_prompt:
            answer.take_prompt_scores(
                tuple(
                    TokenScore(token_id=token_id, logprob=None)
                    if found is None
                    else score(token_id, found, asked.logprobs or 0)
                    for token_id, found in zip(answer.request.prompt_ids, output.prompt_logprobs, strict=True)
                )
            )
        if asked.max_tokens == 0:
            return answer.end("length")
        (completion,) = output.outputs
        for place, token_id in enumerate(completion.token_ids):
            found = None if asked.logprobs is None else completion.logprobs[place]
            delta = answer.push(token_id, None if found is None else score(token_id, found, asked.logprobs or 0))
            if answer.finished:
                return delta
            if delta is not None:
                answer.deliver(delta)
        return None

    def _finish(self, running: _Running, last: Delta) -> None:
        with self._changed:
            request_id = running.answer.request.id
            left = self._unfinished[request_id]
            left.remove(running)
            if not left:
                del self._unfinished[request_id]
            self._num_unfinished -= 1
            self._changed.notify_all()
        running.answer.deliver(last)

    def _failed(self, answer: Answer, error: Exception) -> Delta:
        """The last delta of an answer that vLLM did not give."""
        from vllm.exceptions import VLLMClientError

        cause = error.__cause__ or error
        if isinstance(cause, VLLMClientError) and answer.matcher is not None:
            # vLLM has limits of its own on what a schema may be.
            return answer.end("error", str(cause), fault="grammar")
        _log.error("an answer failed request=%s", answer.request.id, exc_info=error)
        return answer.end("error", f"{type(cause).__name__}: {cause}")


def _wake(running: list[_Running]) -> None:
    for each in running:
        # Once: a second time would interrupt what tells vLLM to stop.
        if each.reads and each.task is not None:
            each.reads = False
            each.task.cancel()


def _skeleton(folder: Path) -> PreTrainedModel:
    """The model of a folder without its weights, for what is known of it by names and shapes."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"Expected a causal language model in {folder}, found one that can't be loaded: {error}"
        ) from error
    return model
