"""The gateway: OpenAI's interface over the releases of one replica. Plain ASGI: it knows no Ray.

    GET  /healthz  /v1/models  /v1/models/{model}
    POST /v1/completions  /v1/chat/completions  /v1/feedback

An answer is on disk before its last byte is sent, so feedback on it is never about something unknown. A client that
goes away stops the engine's work on its answer.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from aifactory.config import Serve
from aifactory.engine.protocol import Delta, GenerationRequest, Sampling
from aifactory.errors import BadRequestError, CapacityError
from aifactory.observe.events import logger
from aifactory.records.books import Books
from aifactory.records.feedback import Completion, Feedback
from aifactory.records.identity import canonical_json, hash_text
from aifactory.serve.releases import Releases, Served
from aifactory.serve.wire import ChatBody, CompletionBody, FeedbackBody, error_body, event, parse, usage
from aifactory.text.chat import render_chat
from aifactory.text.documents import chat_prompt_tokens, prompt_tokens

_RETRY_AFTER_S = "1"
_DEFAULT_COMPLETION_TOKENS = 16
_ANY_MODEL = "/v1/models/{model}"
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A request on its way through the engine."""

    id: str
    created: int
    served: Served
    prompt: str
    """As the model sees it."""
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    user: str | None
    chat: bool
    include_usage: bool


class Gateway:
    """Answers requests with the release in production."""

    def __init__(self, books: Books, releases: Releases, recipe: Serve) -> None:
        self.books = books
        self.releases = releases
        self.recipe = recipe
        self._routes: dict[tuple[str, str], Handler] = {
            ("GET", "/healthz"): self._health,
            ("GET", "/v1/models"): self._models,
            ("GET", _ANY_MODEL): self._model,
            ("POST", "/v1/completions"): self._complete,
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/v1/feedback"): self._feedback,
        }

    async def handle(self, request: Request) -> Response:
        """Answer one request; whatever is wrong with it comes back in OpenAI's envelope."""
        path = _path(request.scope)
        route = _ANY_MODEL if path.startswith("/v1/models/") else path
        try:
            # The server sends the head of a GET's answer alone.
            handler = self._routes.get(("GET" if request.method == "HEAD" else request.method, route))
            if handler is not None:
                return await handler(request)
            allowed = [method for method, known in self._routes if known == route]
            if allowed:
                message = f"Expected {' or '.join(allowed)} for {path}, found {request.method}."
                response = _error(405, message, kind="invalid_request_error")
                response.headers["Allow"] = ", ".join(allowed)
                return response
            paths = ", ".join(known for _, known in self._routes)
            return _error(404, f"Expected one of {paths}, found {path}.", kind="invalid_request_error")
        except BadRequestError as error:
            return _error(400, str(error), kind="invalid_request_error", field=error.field)
        except CapacityError as error:
            response = _error(429, str(error), kind="rate_limit_error", code="queue_full")
            response.headers["Retry-After"] = _RETRY_AFTER_S
            return response
        except _StatusError as error:
            return _error(error.status, str(error), kind=error.kind, code=error.code, field=error.field)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception:
            logger.exception("failed request=%s", path)
            return _error(500, "The server failed; its log says why.", kind="server_error")

    # ── what is there ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _health(self, _: Request) -> Response:
        served = self.releases.current
        if served is None:
            return _json({"status": "no release in production yet"}, status=503)
        return _json({"status": "ok", "model": served.release.name})

    async def _models(self, _: Request) -> Response:
        with self._served() as served:
            names = (self.books.config.name, served.release.name)
            return _json({"object": "list", "data": [self._model_card(name, served) for name in names]})

    async def _model(self, request: Request) -> Response:
        name = _path(request.scope).removeprefix("/v1/models/")
        with self._served(name) as served:
            return _json(self._model_card(name, served))

    def _model_card(self, name: str, served: Served) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": int(served.release.created_at),
            "owned_by": self.books.config.name,
        }

    # ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _complete(self, request: Request) -> Response:
        body = parse(CompletionBody, await self._read(request))
        sampling = body.sampling(default=_DEFAULT_COMPLETION_TOKENS, limit=self.recipe.max_answer_tokens)
        with self._served(body.model) as served:
            prompt, ids = await asyncio.to_thread(_read_prompt, served, body.prompt)
            question = self._question(served, body, sampling, prompt=prompt, ids=ids)
            return await self._answer(request, question, stream=bool(body.stream))

    async def _chat(self, request: Request) -> Response:
        body = parse(ChatBody, await self._read(request))
        sampling = body.sampling(default=self.recipe.max_answer_tokens, limit=self.recipe.max_answer_tokens)
        fallback = self.recipe.chat_template or "none"
        with self._served(body.model) as served:
            prompt, ids = await asyncio.to_thread(_read_messages, served, body.messages, fallback=fallback)
            question = self._question(served, body, sampling, prompt=prompt, ids=ids)
            return await self._answer(request, question, stream=bool(body.stream))

    def _question(
        self, served: Served, body: CompletionBody | ChatBody, sampling: Sampling, *, prompt: str, ids: Sequence[int]
    ) -> Question:
        """The request as the engine takes it. Raises _StatusError if the context is too short for it."""
        chat = isinstance(body, ChatBody)
        context, wanted = served.engine.context_length, getattr(body, body.length_field)
        room = context - len(ids)
        if room < 1 or (wanted is not None and wanted > room):
            raise _StatusError(
                400,
                f"Expected prompt and answer within the context of {context} tokens, found a prompt of {len(ids)} and "
                f"{body.length_field} of {wanted or 1}. Shorten the prompt or lower {body.length_field}.",
                kind="invalid_request_error",
                code="context_length_exceeded",
                field=body.length_field if room >= 1 else "messages" if chat else "prompt",
            )
        return Question(
            id=("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            created=int(time.time()),
            served=served,
            prompt=prompt,
            prompt_ids=tuple(ids),
            sampling=replace(sampling, max_tokens=min(sampling.max_tokens, room)),
            user=body.user,
            chat=chat,
            include_usage=body.include_usage,
        )

    async def _answer(self, request: Request, question: Question, *, stream: bool) -> Response:
        deltas = self._generate(request, question)
        if stream:
            # The first delta is awaited here, so that a request that is refused gets its status, not a broken stream.
            first = await anext(deltas)
            return EventStream(self._stream(question, first, deltas))
        text, answer_tokens, finish_reason = "", 0, "stop"
        async with aclosing(deltas):
            async for delta in deltas:
                text += delta.text
                answer_tokens += len(delta.token_ids)
                finish_reason = delta.finish_reason or finish_reason
        await self._log(question, text, answer_tokens, finish_reason)
        choice = (
            {"message": {"role": "assistant", "content": text, "refusal": None}} if question.chat else {"text": text}
        )
        payload = self._head(question) | {
            "choices": [{"index": 0, "finish_reason": finish_reason, "logprobs": None, **choice}],
            "usage": usage(len(question.prompt_ids), answer_tokens),
        }
        return _json(payload)

    async def _stream(
        self, question: Question, first: Delta, deltas: AsyncGenerator[Delta, None]
    ) -> AsyncGenerator[bytes, None]:
        text, answer_tokens = "", 0
        head = self._head(question, chunk=True) | ({"usage": None} if question.include_usage else {})

        def chunk(part: Mapping[str, Any], finish_reason: str | None = None) -> bytes:
            choice = {"index": 0, "finish_reason": finish_reason, "logprobs": None, **part}
            return event(head | {"choices": [choice]})

        def part(content: str) -> dict[str, Any]:
            return {"delta": {"content": content}} if question.chat else {"text": content}

        # Chunks of text differ in it alone: the rest is put into JSON once. No other value holds a NUL.
        before, after = chunk(part("\0")).split(json.dumps("\0").encode())

        async with aclosing(deltas):
            try:
                if question.chat:
                    yield chunk({"delta": {"role": "assistant", "content": "", "refusal": None}})
                delta: Delta | None = first
                while delta is not None:
                    text += delta.text
                    answer_tokens += len(delta.token_ids)
                    if delta.text:
                        yield before + json.dumps(delta.text).encode() + after
                    if delta.finish_reason is not None:
                        await self._log(question, text, answer_tokens, delta.finish_reason)
                        # Alone, as OpenAI's: there are clients that read no text where they read a reason.
                        yield chunk({"delta": {}} if question.chat else {"text": ""}, delta.finish_reason)
                    delta = await anext(deltas, None)
                if question.include_usage:
                    yield event(head | {"choices": [], "usage": usage(len(question.prompt_ids), answer_tokens)})
                yield event("[DONE]")
            except _StatusError as error:
                yield event(error_body(str(error), kind=error.kind))
            except Exception:
                logger.exception("failed completion=%s", question.id)
                yield event(error_body("The server failed; its log says why.", kind="server_error"))

    async def _generate(self, request: Request, question: Question) -> AsyncGenerator[Delta, None]:
        """The engine's deltas; if whoever reads them goes away, or the client does, the engine stops."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Delta] = asyncio.Queue()
        engine = question.served.engine

        def deliver(delta: Delta) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, delta)

        engine.submit(
            GenerationRequest(id=question.id, prompt_ids=question.prompt_ids, sampling=question.sampling), deliver
        )
        watch = asyncio.create_task(_watch(request, question))
        finished = False
        try:
            while not finished:
                delta = await arrived.get()
                # What came while the reader was behind goes on together: each message has its price.
                while not arrived.empty():
                    delta = _joined(delta, arrived.get_nowait())
                finished = delta.finish_reason is not None
                if delta.finish_reason in ("error", "cancelled"):
                    raise _StatusError(
                        500 if delta.finish_reason == "error" else 503,
                        f"The answer was ended by the server: {delta.error or 'it is shutting down'}. Ask again.",
                        kind="server_error",
                    )
                yield delta
        finally:
            watch.cancel()
            if not finished:
                engine.cancel(question.id)

    async def _log(self, question: Question, text: str, answer_tokens: int, finish_reason: str) -> None:
        sampling = question.sampling
        completion = Completion(
            id=question.id,
            release=question.served.release.number,
            prompt=question.prompt,
            answer=text,
            request=json.dumps(
                {
                    "chat": question.chat,
                    "max_tokens": sampling.max_tokens,
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "seed": sampling.seed,
                    "stop": list(sampling.stop),
                }
            ),
            finish_reason=finish_reason,
            prompt_tokens=len(question.prompt_ids),
            answer_tokens=answer_tokens,
            user=question.user,
        )
        await asyncio.to_thread(self.books.feedback.log_completion, completion)

    # ── feedback ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _feedback(self, request: Request) -> Response:
        body = parse(FeedbackBody, await self._read(request))
        if body.score is None and body.correction is None and body.comment is None:
            raise BadRequestError("Expected a score, a correction or a comment, found none of them.", field="score")
        derived = hash_text(canonical_json(body.model_dump(exclude={"idempotency_key"})))
        key = request.headers.get("idempotency-key") or body.idempotency_key or derived
        entry = Feedback(
            completion=body.completion,
            idempotency_key=key,
            score=body.score,
            correction=body.correction,
            comment=body.comment,
            user=body.user,
        )
        counted = await asyncio.to_thread(self.books.feedback.record, entry)
        return _json({"object": "feedback", "idempotency_key": key, "counted": counted})

    # ── how ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def _served(self, model: str | None = None) -> Iterator[Served]:
        """The release that takes requests, held while the block runs. Raises _StatusError if it isn't `model`."""
        with self.releases.hold() as served:
            if served is None:
                raise _StatusError(503, "Expected a release in production, found none yet.", kind="server_error")
            if model is not None and model not in (self.books.config.name, served.release.name):
                raise _StatusError(
                    404,
                    f"Expected the model {self.books.config.name!r} or {served.release.name!r}, found {model!r}.",
                    kind="invalid_request_error",
                    code="model_not_found",
                    field="model",
                )
            yield served

    async def _read(self, request: Request) -> bytes:
        """The body, as far as it is not too large."""
        limit = self.recipe.max_body_bytes
        data = bytearray()
        async for piece in request.stream():
            data += piece
            if len(data) > limit:
                raise _StatusError(413, f"Expected a body of at most {limit} bytes.", kind="invalid_request_error")
        return bytes(data)

    def _head(self, question: Question, *, chunk: bool = False) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if question.chat else "text_completion"
        release = question.served.release
        return {
            "id": question.id,
            "object": kind,
            "created": question.created,
            "model": release.name,
            "system_fingerprint": release.fingerprint,
        }


class _StatusError(Exception):
    """An error with a status of its own."""

    def __init__(
        self, status: int, message: str, *, kind: str, code: str | None = None, field: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.code, self.field = status, kind, code, field


class EventStream(Response):
    """Server-sent events. Unlike Starlette's own, it closes where they come from however it ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["Content-Length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for data in events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _watch(request: Request, question: Question) -> None:
    """Stop the engine when the client goes away: servers say so here, and end no one's work themselves."""
    with suppress(Exception):  # a connection that can't be read is gone too
        while (await request.receive())["type"] != "http.disconnect":
            pass
    question.served.engine.cancel(question.id)


def _joined(first: Delta, second: Delta) -> Delta:
    return replace(second, text=first.text + second.text, token_ids=first.token_ids + second.token_ids)


def _read_prompt(served: Served, prompt: str | Sequence[int]) -> tuple[str, Sequence[int]]:
    tokenizer = served.tokenizer
    if isinstance(prompt, str):
        return prompt, prompt_tokens(tokenizer, prompt)
    if not prompt:
        raise BadRequestError("Expected a prompt of at least one token, found none.", field="prompt")
    unknown = [token for token in prompt if not 0 <= token < tokenizer.vocab_size]
    if unknown:
        raise BadRequestError(
            f"Expected token ids below {tokenizer.vocab_size} in prompt, found {unknown[0]}.", field="prompt"
        )
    return tokenizer.decode(prompt), prompt


def _read_messages(
    served: Served, messages: Sequence[Mapping[str, Any]], *, fallback: str
) -> tuple[str, Sequence[int]]:
    tokenizer = served.tokenizer
    try:
        ids = chat_prompt_tokens(tokenizer, messages, fallback=fallback)
        prompt = render_chat(
            messages, template=tokenizer.chat_template, fallback=fallback, eos_token=tokenizer.eos_token
        )
    except RecursionError as error:
        raise BadRequestError("Expected plain messages, found one nested too deeply.", field="messages") from error
    return prompt, ids


def _path(scope: Scope) -> str:
    """The path below where the gateway is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    if path == root or path.startswith(root + "/"):
        path = path[len(root) :]
    return path.rstrip("/") or "/"


def _json(payload: Mapping[str, Any], *, status: int = 200) -> Response:
    # In ASCII: what a client sent is quoted back in errors, and need not be text that UTF-8 can hold.
    return Response(json.dumps(payload), status_code=status, media_type="application/json")


def _error(status: int, message: str, *, kind: str, field: str | None = None, code: str | None = None) -> Response:
    return _json(error_body(message, kind=kind, field=field, code=code), status=status)
