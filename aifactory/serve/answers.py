"""Answers: a question's way through the engine, and the form in which it goes out: whole, or streamed.

    Question ─submit─▶ engine ─deltas─▶ Choice (one for each answer to each prompt) ─▶ log ─▶ body | events

An answer is on disk before its last byte is sent, so feedback on it is never about something unknown. Whoever stops
reading stops the engine's work on all of its choices.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from aifactory.engine.protocol import Delta, Engine, Sampling
from aifactory.errors import BadRequestError
from aifactory.observe import tracing
from aifactory.observe.events import logger
from aifactory.records.feedback import Completion, FeedbackLog
from aifactory.serve.admission import Admission
from aifactory.serve.answer_cache import AnswerCache, Kept
from aifactory.serve.answer_meter import AnswerMeter
from aifactory.serve.event_stream import DONE, EventStream, watch_client
from aifactory.serve.guards import Guards, Mask
from aifactory.serve.progress import Told
from aifactory.serve.questions import Prompt, Question
from aifactory.serve.token_scores import CompletionScores, chat_scores
from aifactory.serve.tool_calls import MessageReader
from aifactory.serve.wire import ENGINE_FAILED, StatusError, error_body, event, json_response, usage
from aifactory.text.tokenizer import IncrementalDecoder


@dataclass(slots=True)
class Choice:
    """One of a question's answers, as far as it has come."""

    question: Question
    index: int
    text: str = ""
    """With echo, the prompt's text and the answer's."""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    reader: MessageReader | None = None
    opened: bool = False
    """Of a chat that is streamed: whether its role was sent."""
    ended: bool = False
    """Whether it was kept and, of a stream, its reason sent."""
    refused: bool = False
    """Whether a guard has kept its text back."""
    _scores: CompletionScores | None = None
    _goes_on: bool = False

    def __post_init__(self) -> None:
        tokenizer = self.question.served.tokenizer
        if self.question.tools:
            self.reader = MessageReader(tokenizer, prompt=self.prompt.text, tools=self.question.tools)
        if not self.question.chat and self.question.sampling.logprobs is not None:
            self._scores = CompletionScores(tokenizer, echo=self.question.sampling.echo)
        progress = self.question.progress
        if progress is not None and self.index in progress.told:
            self._take_up(progress.told[self.index])

    def _take_up(self, told: Told) -> None:
        """Be where the client has come to."""
        self.text, self.token_ids, self.opened, self.ended = told.text, list(told.token_ids), told.opened, told.ended
        self._goes_on = bool(told.text or told.token_ids)
        if self.reader is not None:
            self.reader.feed(told.token_ids)
        if self._scores is not None and told.text and self.question.sampling.echo:
            self._scores.pass_over(self.prompt.ids)
        if self._scores is not None:
            self._scores.pass_over(told.token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self.token_ids)

    @property
    def prompt(self) -> Prompt:
        """What it answers."""
        return self.question.prompts[self.index // self.question.sampling.n]

    def was_told(self, delta: Delta) -> bool:
        """Whether nothing of it but the reason is new to a client who has a part of the answer already."""
        return self._goes_on and not delta.token_ids

    def take(self, delta: Delta) -> dict[str, Any] | None:
        """Go on by a delta; its scores in the form of the interface."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.finish_reason = delta.finish_reason or self.finish_reason
        scores = (*delta.prompt_scores, *delta.scores)
        if self.question.sampling.logprobs is None or not scores:
            return None
        if self._scores is not None:
            return self._scores.columns(scores)
        return chat_scores(self.question.served.tokenizer, scores)

    @property
    def said_reason(self) -> str | None:
        """The finish reason as the interface names it."""
        if self.refused:
            return _REFUSED
        calls = self.finish_reason == "stop" and self.reader is not None and self.reader.has_calls
        return "tool_calls" if calls else self.finish_reason

    def completion(self) -> Completion:
        """What is kept of it."""
        question, sampling = self.question, self.question.sampling
        # A prompt that was echoed is no part of the answer.
        begin = len(_echoed(question, self.prompt)) if sampling.echo else 0
        asked = {
            "chat": question.chat,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "stop": list(sampling.stop),
        }
        further = {name: value for name in _FURTHER if (value := getattr(sampling, name)) != getattr(_PLAIN, name)}
        if "logit_bias" in further:
            further["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
        if sampling.grammar is not None:
            further["grammar"] = {"kind": sampling.grammar.kind, "text": sampling.grammar.text}
        if question.adapter is not None:
            adapter = question.adapter
            further["adapter"] = {"name": adapter.name, "digest": adapter.digest, "origin": adapter.origin}
        return Completion(
            id=question.answer_id(self.index),
            release=question.served.release.number,
            prompt=self.prompt.text,
            messages=self.prompt.messages,
            answer=self.text[begin:],
            request=json.dumps(asked | further),
            finish_reason=_REFUSED if self.refused else self.finish_reason or "stop",
            prompt_tokens=len(self.prompt.ids),
            answer_tokens=self.num_tokens,
            user=question.user,
            key_id=question.key_id,
        )


_REFUSED = "content_filter"
_PLAIN = Sampling()
_FURTHER = (
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "stop_token_ids",
    "grammar",
    "n",
)
"""What is kept of a request where it was asked for."""


Count = Callable[[Sequence[Completion]], None]
"""What is told of answers that were kept."""


class Answering:
    """Puts questions to the engines of releases, and keeps what they answer."""

    def __init__(
        self,
        log: FeedbackLog,
        admission: Admission,
        *,
        make_way: Callable[[], None] = lambda: None,
        count: Count = lambda _: None,
        guards: Guards | None = None,
        cache: AnswerCache | None = None,
    ) -> None:
        """`make_way` is called when somebody has to wait; `count` with what was kept."""
        self._log = log
        self._guards = guards or Guards()
        self._cache = cache
        self._count = count
        self._admission = admission
        self._make_way = make_way
        self._streams: set[str] = set()

    @property
    def num_streams(self) -> int:
        """Streams that have begun and whose readers have not read, or left, their ends."""
        return len(self._streams)

    async def answer(self, request: Request, question: Question, *, stream: bool) -> Response | dict[str, Any]:
        """The answer: its body, or a response that streams it.

        Raises   BadRequestError, CapacityError, StatusError before the first byte.
        """
        choices = [Choice(question, index) for index in range(question.num_choices)]
        name = None if self._cache is None or stream else self._cache.name(question)
        if self._cache is not None and name is not None and (kept := self._cache.find(name)) is not None:
            return await self._repeated(question, kept)
        deltas = self._generate(request, question)
        if self._guards.hold_answers:
            deltas = self._guards.held(deltas, question, choices)
        if stream:
            # The first delta is awaited here, so that a request that is refused gets its status, not a broken stream.
            first = await anext(deltas)
            self._streams.add(question.id)
            return EventStream(self._stream(question, choices, first, deltas), question, choices, source=deltas)
        scores: dict[int, list[dict[str, Any]]] = {}
        async with aclosing(deltas):
            async for index, delta in deltas:
                part = choices[index].take(delta)
                if part is not None:
                    scores.setdefault(index, []).append(part)
                if (reader := choices[index].reader) is not None and not choices[index].refused:
                    reader.feed(delta.token_ids)
        for choice in choices:
            if choice.reader is not None:
                choice.reader.finish()
        entries = await self._keep(*choices)
        _copy(question)
        body = {
            "choices": [
                {
                    "index": choice.index,
                    "finish_reason": choice.said_reason,
                    "logprobs": _joined_scores(scores.get(choice.index)),
                    **_whole(choice),
                }
                for choice in choices
            ],
            "usage": _usage(question, choices),
        }
        if self._cache is not None and name is not None:
            self._cache.keep(name, body, entries)
        return question.head() | body

    async def _repeated(self, question: Question, kept: Kept) -> Response:
        """An answer that was given before, as one of its own."""
        entries = [
            replace(each, id=question.answer_id(index), user=question.user, key_id=question.key_id)
            for index, each in enumerate(kept.completions)
        ]
        await asyncio.to_thread(self._log.log_completion, *entries)
        if question.grant is not None:
            await question.grant.end()
        response = json_response({**question.head(), **kept.body})
        response.headers["X-Cache"] = "hit"
        return response

    async def embed(self, request: Request, question: Question) -> list[tuple[float, ...]]:
        """The embedding of each of its prompts, as the engine gives it. Raises as `answer`."""
        found: dict[int, tuple[float, ...]] = {}
        deltas = self._generate(request, question)
        async with aclosing(deltas):
            async for index, delta in deltas:
                found[index] = delta.embedding
        return [found[index] for index in range(len(question.prompts))]

    async def _stream(
        self,
        question: Question,
        choices: Sequence[Choice],
        first: tuple[int, Delta],
        deltas: AsyncGenerator[tuple[int, Delta], None],
    ) -> AsyncGenerator[bytes, None]:
        head = question.head(chunk=True) | ({"usage": None} if question.include_usage else {})

        def chunk(index: int, part: Mapping[str, Any], finish_reason: str | None = None, logprobs: Any = None) -> bytes:
            choice = {"index": index, "finish_reason": finish_reason, "logprobs": logprobs, **part}
            return event(head | {"choices": [choice]})

        def said(content: str) -> dict[str, Any]:
            return {"delta": {"content": content}} if question.chat else {"text": content}

        # Chunks of text differ in it alone: the rest is put into JSON once. No other value holds a NUL.
        frames: dict[int, list[bytes]] = {}

        async with aclosing(deltas):
            try:
                if question.chat:
                    for choice in choices:
                        if choice.opened:
                            continue
                        choice.opened = True
                        yield chunk(choice.index, {"delta": {"role": "assistant", "content": "", "refusal": None}})
                following: tuple[int, Delta] | None = first
                while following is not None:
                    index, delta = following
                    choice = choices[index]
                    told_before = choice.was_told(delta)
                    if told_before:
                        delta = replace(delta, text="", prompt_scores=())
                    logprobs = choice.take(delta)
                    if choice.reader is not None:
                        parts = [] if choice.refused else choice.reader.feed(delta.token_ids)
                        parts += choice.reader.finish() if delta.finish_reason is not None else []
                        # Calls come where they end: scores belong to tokens, which come as they come.
                        parts = parts or ([{}] if logprobs is not None else [])
                        if parts and not told_before:
                            # At once: what was told of these tokens is told as a whole.
                            scores = [logprobs, *[None] * (len(parts) - 1)]
                            pairs = zip(parts, scores, strict=True)
                            yield b"".join(chunk(index, {"delta": part}, logprobs=each) for part, each in pairs)
                    elif logprobs is not None:
                        yield chunk(index, said(delta.text), logprobs=logprobs)
                    elif delta.text:
                        if index not in frames:
                            frames[index] = chunk(index, said("\0")).split(json.dumps("\0").encode())
                        before, after = frames[index]
                        yield before + json.dumps(delta.text).encode() + after
                    if delta.finish_reason is not None and not choice.ended:
                        await self._keep(choice)
                        choice.ended = True
                        # Alone, as OpenAI's: there are clients that read no text where they read a reason.
                        yield chunk(index, {"delta": {}} if question.chat else {"text": ""}, choice.said_reason)
                    following = await anext(deltas, None)
                _copy(question)
                end = DONE
                if question.include_usage:
                    end = event(head | {"choices": [], "usage": _usage(question, choices)}) + DONE
                yield end
            except StatusError as error:
                yield event(error_body(str(error), kind=error.kind, code=error.code))
            except BadRequestError as error:
                yield event(error_body(str(error), kind="invalid_request_error", field=error.field))
            except Exception:
                logger.exception("failed completion=%s", question.id)
                yield event(error_body("The server failed; its log says why.", kind="server_error"))

    async def _generate(self, request: Request, question: Question) -> AsyncGenerator[tuple[int, Delta], None]:
        """Deltas with the index of their choice; what they took is told when they end, however they do."""
        began, tokens = False, 0
        if question.progress is not None:  # what another replica had come to before it was lost
            tokens = sum(len(told.token_ids) for told in question.progress.told.values())
        try:
            async with aclosing(self._deltas(request, question)) as deltas:
                async for index, delta in deltas:
                    began = True
                    tokens += len(delta.token_ids)
                    yield index, delta
        finally:
            if question.grant is not None:
                prompt_tokens = question.prompt_tokens if began else 0
                await question.grant.end(prompt_tokens=prompt_tokens, answer_tokens=tokens)

    async def _deltas(self, request: Request, question: Question) -> AsyncGenerator[tuple[int, Delta], None]:
        """The same; if whoever reads them goes away, or the client does, the engine stops."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        engine, num_answers = question.served.engine, question.sampling.n
        submitted: list[str] = []
        entry = self._admission.enter(question.who, question.num_choices, behind=question.behind)
        late = stopped = False
        meter = AnswerMeter(question.served.release.name, question.prompt_tokens, asked=loop.time())

        def arrive(index: int, delta: Delta) -> None:
            # Here, not where it is read: a client that reads slowly holds up no other.
            meter.arrived(index, len(delta.token_ids), loop.time())
            if delta.finish_reason is not None:
                meter.ended(delta.finish_reason)
                entry.free()
            arrived.put_nowait((index, delta))

        def submit(number: int) -> None:
            def deliver(delta: Delta) -> None:
                loop.call_soon_threadsafe(arrive, number * num_answers + delta.index, delta)

            asked = question.request_of(number, generating.parent)
            try:
                engine.submit(asked, deliver)
            except BadRequestError as error:
                raise _renamed(error, question.fields) from error
            submitted.append(asked.id)
            if stopped:  # while its grammar was compiled
                engine.cancel(asked.id)

        def stop(why: Exception | None = None) -> None:
            nonlocal stopped
            stopped = True
            if entry.waits:
                entry.leave(why)
            for request_id in submitted:
                engine.cancel(request_id)

        def expire() -> None:
            nonlocal late
            late = True
            stop(_too_late(question.timeout_s))

        watch = asyncio.create_task(watch_client(request, stop))
        alarm = None if question.timeout_s is None else loop.call_later(question.timeout_s, expire)
        unfinished, tokens, trial = question.num_choices, 0, question.watch
        waiting = tracing.begin("admission", question.trace)
        generating = tracing.OpenSpan()
        try:
            if entry.waits and not question.behind:
                self._make_way()
            await entry.admitted
            meter.admitted(loop.time())
            waiting.end()
            generating = tracing.begin("generate", question.trace, completion=question.id, release=question.model)
            # An engine of a small model may be done before the alarm is heard; what is late already is not begun.
            if alarm is not None and loop.time() >= alarm.when():
                raise _too_late(question.timeout_s)
            if trial is not None:
                trial.begin()
            for number in range(len(question.prompts)):
                if question.sampling.grammar is None:
                    submit(number)
                else:  # compiled there, which may take a while
                    await asyncio.to_thread(submit, number)
            while unfinished:
                together = dict([await arrived.get()])
                # What came while the reader was behind goes on together: each message has its price.
                while not arrived.empty():
                    index, delta = arrived.get_nowait()
                    together[index] = together[index].then(delta) if index in together else delta
                for index, delta in together.items():
                    tokens += len(delta.token_ids)
                    if trial is not None and delta.token_ids:
                        trial.take()
                    if delta.finish_reason == "cancelled" and late:
                        raise _too_late(question.timeout_s)
                    if delta.fault is not None:
                        refused = BadRequestError(f"{delta.fault}: {delta.error}. Simplify it.", field=delta.fault)
                        raise _renamed(refused, question.fields)
                    if delta.finish_reason in ("error", "cancelled"):
                        raise _ended_by_server(delta, engine)
                    unfinished -= delta.finish_reason is not None
                    if trial is not None and not unfinished:
                        trial.end(tokens=tokens)
                    yield index, delta
        except StatusError as error:
            if trial is not None and (error.status in _BY_THE_RELEASE or error.code == ENGINE_FAILED):
                trial.end(tokens=tokens, failed=True)
            raise
        finally:
            waiting.end()
            generating.end(tokens=tokens, error="the answer did not come to its end" if unfinished else None)
            watch.cancel()
            if alarm is not None:
                alarm.cancel()
            if unfinished:
                stop()
            entry.leave()
            self._streams.discard(question.id)

    async def _keep(self, *choices: Choice) -> Sequence[Completion]:
        entries = [choice.completion() for choice in choices]
        if (mask := self._guards.mask_log) is not None:
            entries = await asyncio.to_thread(lambda: [_masked(each, mask) for each in entries])
        question = choices[0].question
        again = question.behind or (question.progress is not None and question.progress.attempt > 0)
        await asyncio.to_thread(self._log.log_completion, *entries, again=again)
        self._count(entries)
        return entries


def _masked(entry: Completion, mask: Mask) -> Completion:
    prompt, messages, answer = (mask(text) if text else text for text in (entry.prompt, entry.messages, entry.answer))
    return replace(entry, prompt=prompt, messages=messages, answer=answer)


_BY_THE_RELEASE = (500, 504)
"""What comes of a release that fails or hangs: it speaks against one on trial."""


def _ended_by_server(delta: Delta, engine: Engine) -> StatusError:
    """One answer that failed is an error of the server; one that failed with all others is asked again elsewhere."""
    ended = f"The answer was ended by the server: {delta.error or 'it is shutting down'}."
    if delta.finish_reason == "error" and engine.failure is not None:
        again = "Another replica takes its place: ask again later."
        return StatusError(503, f"{ended} {again}", kind="server_error", code=ENGINE_FAILED)
    return StatusError(500 if delta.finish_reason == "error" else 503, f"{ended} Ask again.", kind="server_error")


def _copy(question: Question) -> None:
    if question.watch is not None and question.watch.copy is not None:
        question.watch.copy(question)


def _too_late(seconds: float | None) -> StatusError:
    return StatusError(
        504,
        f"Expected the answer within {seconds:g} s, found the time up. Ask for less, or give it more time.",
        kind="timeout_error",
        code="deadline_exceeded",
    )


def _renamed(error: BadRequestError, fields: Mapping[str, str]) -> BadRequestError:
    """The engine's error, under the name that the request has for the field."""
    name = fields.get(error.field or "")
    if name is None:
        return error
    message = str(error).replace(str(error.field), name)
    return BadRequestError(message if name in message else f"{name}: {message}", field=name)


def _joined_scores(parts: Sequence[Mapping[str, Any]] | None) -> dict[str, Any] | None:
    """The scores of all deltas: their columns, one after another."""
    if not parts:
        return None
    columns = {name for name, value in parts[0].items() if isinstance(value, list)}
    return {name: [each for part in parts for each in part[name]] if name in columns else None for name in parts[0]}


def _whole(choice: Choice) -> dict[str, Any]:
    if not choice.question.chat:
        return {"text": choice.text}
    message = {"content": choice.text} if choice.reader is None else choice.reader.message
    return {"message": {"role": "assistant", "refusal": None, **message}}


def _usage(question: Question, choices: Sequence[Choice]) -> dict[str, int]:
    return usage(question.prompt_tokens, sum(choice.num_tokens for choice in choices))


def _echoed(question: Question, prompt: Prompt) -> str:
    """What the engine has put before the answer: the whole characters of the prompt."""
    decoder = IncrementalDecoder(question.served.tokenizer)
    return "".join([decoder.feed(token_id) for token_id in prompt.ids])
