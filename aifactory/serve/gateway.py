"""The gateway: OpenAI's interface over the releases of one replica. Plain ASGI: it knows no Ray.

    GET  /healthz  /readyz  /v1/models  /v1/models/{model}  /openapi.json  /docs
    POST /v1/completions  /v1/chat/completions  /v1/embeddings  /tokenize  /detokenize
    and /v1/feedback: see feedback_routes.py; /v1/files, /v1/batches: see batch_routes.py; /v1/retrains: see retrain_routes.py

An answer is on disk before its last byte is sent, so feedback on it is never about something unknown. A client that
goes away stops the engine's work on its answer.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from aifactory.config import Serve
from aifactory.engine.protocol import Pooling, Sampling
from aifactory.errors import AIFactoryError, BadRequestError, CapacityError
from aifactory.observe.events import logger
from aifactory.records.books import Books
from aifactory.records.identity import hash_parts, hash_text
from aifactory.records.trials import ShareOf
from aifactory.serve.admission import Admission
from aifactory.serve.answers import Answering, Count, Prompt, Question
from aifactory.serve.batch_routes import BatchRoutes
from aifactory.serve.batches import Batches
from aifactory.serve.bodies import (
    MOST_SECONDS,
    BatchBody,
    BatchesQuery,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    FeedbackBody,
    FilesQuery,
    TokenizeBody,
)
from aifactory.serve.feedback_routes import FeedbackRoutes
from aifactory.serve.openapi import Operation, describe, page
from aifactory.serve.progress import PROGRESS, Progress
from aifactory.serve.prompts import read_messages, read_prompts, require_known, tokens_of
from aifactory.serve.proxy import LOST
from aifactory.serve.releases import Releases, Served
from aifactory.serve.retrain_routes import RETRAINS, RetrainBody, RetrainRoutes
from aifactory.serve.tool_calls import require_tools
from aifactory.serve.trials import Outcomes, ReadPrompts, Shadows, Watch
from aifactory.serve.wire import (
    ALWAYS,
    ENGINE_FAILED,
    ClosedBody,
    Incoming,
    NoQuery,
    StatusError,
    error_body,
    json_response,
    parse,
    parse_query,
    path_of,
    shutting_down,
)
from aifactory.text.chat import takes_tools

_RETRY_AFTER_S = "1"
_DEFAULT_COMPLETION_TOKENS = 16
_SHOWN_NAMES = 12
_ANY_MODEL = "/v1/models/{model}"
_POOLING: Pooling = "mean"
_LONGEST_BEHIND_S = 30.0
"""How long a replica that has not loaded a new release yet is waited for, where another one has answered by it."""
_TIMEOUT_HEADER = "X-Request-Timeout"
_BEHIND = "aifactory.behind"
"""In the scope of a request in the background: the id of its answer."""
_IDENTITY = "aifactory.identity"
"""In the scope of any other: the id of its answer, once that was asked for."""
Handler = Callable[[Request], Awaitable[Response]]


class Gateway:
    """Answers requests with the release in production."""

    def __init__(
        self, books: Books, releases: Releases, recipe: Serve, *, replica: str = "", count: Count = lambda _: None
    ) -> None:
        """`replica` is what /readyz calls this one, where there are several; `count` is called with answers that were kept."""
        self.books = books
        self.is_draining = False
        """Whether it takes no more requests; those that it has go on."""
        self._replica = replica
        self._handling = 0
        self.releases = releases
        self.recipe = recipe
        endpoint = books.config.runtime.endpoint
        self._longest_s = endpoint.request_timeout_s
        # More than decode at once, so that the next are there when a few end together; so few that turns mean something.
        self.admission = Admission(
            max_running=endpoint.slots + max(1, endpoint.slots // 4), max_waiting=endpoint.max_queued
        )
        self.outcomes = Outcomes(books.registry.trial_log)
        self.shadows = Shadows(
            releases,
            self.outcomes,
            books.registry.trial_log,
            most=endpoint.shadow_slots,
            timeout_s=endpoint.request_timeout_s,
            is_busy=lambda: self.is_draining or self.admission.waiting > 0,
        )
        self._answering = Answering(books.feedback, self.admission, make_way=self.shadows.make_way, count=count)
        self._routes: dict[tuple[str, str], Handler] = {
            **BatchRoutes(books.batches, read=self._read, max_file_bytes=recipe.max_file_bytes).handlers,
            **FeedbackRoutes(books.feedback, read=self._read).handlers,
            **RetrainRoutes(
                books.retrain_requests, has_release=lambda: releases.current is not None, read=self._read
            ).handlers,
            ("GET", "/healthz"): self._health,
            ("GET", "/readyz"): self._ready,
            ("GET", "/openapi.json"): self._openapi,
            ("GET", "/docs"): self._docs,
            ("GET", "/v1/models"): self._models,
            ("GET", _ANY_MODEL): self._model,
            ("POST", "/v1/completions"): self._complete,
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/v1/embeddings"): self._embed,
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/detokenize"): self._detokenize,
        }
        self.batches = Batches(books.batches, self.ask_behind, concurrency=endpoint.slots)

    @property
    def num_open(self) -> int:
        """Requests whose answers have not been sent to their ends."""
        return self._handling + self._answering.num_streams

    @property
    def held(self) -> Mapping[str, int]:
        """What requests hold: of the gateway, of the queue, and of the engines of all releases that are here."""
        admission = self.admission
        return {"open": self.num_open, "waiting": admission.waiting, "running": admission.running, **self.releases.held}

    async def handle(self, request: Request) -> Response:
        """Answer one request; whatever is wrong with it comes back in OpenAI's envelope."""
        incoming = Incoming(request.receive)
        self._handling += 1
        try:
            response = await self._answer(Request(request.scope, incoming))
            if response.status_code >= 400:
                await incoming.read_on()
            return response
        finally:
            self._handling -= 1

    async def _answer(self, request: Request) -> Response:
        path = path_of(request.scope)
        route = self._route_of(path)
        try:
            # The server sends the head of a GET's answer alone.
            method = "GET" if request.method == "HEAD" else request.method
            handler = self._routes.get((method, route))
            if handler is not None:
                if route not in ALWAYS:
                    self._require_room()
                if route.startswith("/v1/") and (method, route) not in _QUERIES:
                    parse_query(NoQuery, request.query_params.multi_items())
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
        except StatusError as error:
            response = _error(error.status, str(error), kind=error.kind, code=error.code, field=error.field)
            if error.status == 503:
                response.headers["Retry-After"] = _RETRY_AFTER_S
            return response
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception:
            logger.exception("failed request=%s", path)
            return _error(500, "The server failed; its log says why.", kind="server_error")

    def _require_room(self) -> None:
        """Raises StatusError while it shuts down, CapacityError where more are open than anybody could be answering."""
        if self.is_draining:
            raise shutting_down()
        most = self.books.config.runtime.endpoint.most_open
        if self.num_open > most:
            raise CapacityError(f"Expected at most {most} open requests, found that many. Send it again later.")

    async def tell_outcomes(self, poll_s: float) -> None:
        """Tell the registry how requests go while a release is on trial, for ever."""
        while True:
            await asyncio.sleep(poll_s)
            with suppress(AIFactoryError):  # a database that is away is told later
                await asyncio.to_thread(self.outcomes.tell)

    async def ask_behind(self, path: str, body: bytes, identity: str) -> tuple[int, Any]:
        """Status and answer of a request that came with no connection: in the background, under an id of its own."""
        streams = False
        with suppress(RecursionError):  # too deep for here: said of it below, as of any other
            streams = json.loads(body).get("stream")
        if streams:
            return 400, error_body("Expected no stream in a batch.", kind="invalid_request_error", field="stream")
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            # It has no client that could go away.
            return messages.pop() if messages else await asyncio.Event().wait()

        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", _BEHIND: identity}
        response = await self.handle(Request(scope, receive))
        return response.status_code, json.loads(bytes(response.body))

    def _route_of(self, path: str) -> str:
        """The route that a path belongs to, of which a part in braces stands for any name; itself if there is none."""
        parts = path.split("/")
        for _, route in self._routes:
            asked = route.split("/")
            named = "{" in route and len(asked) == len(parts)
            if named and all(k == part or (k[:1] == "{" and part) for k, part in zip(asked, parts, strict=True)):
                return route
        return path

    # ── what is there ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _health(self, _: Request) -> Response:
        """Whether the replica is alive."""
        return json_response({"status": "ok"})

    async def _ready(self, _: Request) -> Response:
        """Whether it can answer: 503 before the first release, after the engine has failed, and while it shuts down."""
        served, tried = self.releases.current, self.releases.tried
        name = {"replica": self._replica} if self._replica else {}
        name |= {tried[0].kind: tried[1].release.name} if tried is not None else {}
        failure = None if served is None else served.engine.failure
        if served is None or failure is not None or self.is_draining:
            status = "shutting down" if self.is_draining else failure or "no release in production yet"
            return json_response({"status": status, **name}, status=503)
        return json_response({"status": "ok", "model": served.release.name, **name})

    async def _openapi(self, _: Request) -> Response:
        """This description, as OpenAPI 3.1."""
        return json_response(self._description())

    async def _docs(self, _: Request) -> Response:
        """This description, to read."""
        return Response(page(self._description()), media_type="text/html")

    def _description(self) -> dict[str, Any]:
        operations = [
            Operation(
                method=method,
                path=path,
                body=_BODIES.get(path) if method == "POST" else None,
                query=_QUERIES.get((method, path)),
                summary=(handler.__doc__ or "").strip(),
            )
            for (method, path), handler in self._routes.items()
        ]
        return describe(operations, title=self.books.config.name)

    async def _models(self, _: Request) -> Response:
        """What can be asked: the factory, its release in production, the adapters beside it, and a canary by its name."""
        with self._served() as served, self.releases.hold_tried() as tried:
            cards = {name: self._model_card(name, served) for name in served.names}
            if tried is not None and tried[0].kind == "canary":
                cards = {name: self._model_card(name, tried[1]) for name in tried[1].names} | cards
                cards = {name: cards[name] for name in dict.fromkeys([*served.names, *cards])}
            return json_response({"object": "list", "data": list(cards.values())})

    async def _model(self, request: Request) -> Response:
        """One of them."""
        name = path_of(request.scope).removeprefix("/v1/models/")
        with self._served(name) as served:
            return json_response(self._model_card(name, served))

    def _model_card(self, name: str, served: Served) -> dict[str, Any]:
        card = {
            "id": name,
            "object": "model",
            "created": int(served.release.created_at),
            "owned_by": self.books.config.name,
        }
        # As vLLM says what an adapter stands beside.
        return card if served.names[name] is None else card | {"parent": served.release.name}

    # ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _complete(self, request: Request) -> Response:
        """Go on from a text, or from several."""
        body = parse(CompletionBody, await self._read(request))
        sampling = body.sampling(default=_DEFAULT_COMPLETION_TOKENS, limit=self.recipe.max_answer_tokens)
        asked = body.prompts
        await self._come_to(request)
        with self._served(body.model, request, asker=_asker(request, body.user)) as served:
            prompts = await asyncio.to_thread(read_prompts, served, asked)
            question = self._question(
                request, served, body, sampling, prompts, read=lambda other: read_prompts(other, asked)
            )
            return _response(await self._answering.answer(request, question, stream=bool(body.stream)))

    async def _chat(self, request: Request) -> Response:
        """The next message of a conversation."""
        body = parse(ChatBody, await self._read(request))
        sampling = body.sampling(default=self.recipe.max_answer_tokens, limit=self.recipe.max_answer_tokens)
        fallback, tools = self.recipe.chat_fallback, body.shown_tools
        if tools and sampling.stop:
            raise BadRequestError("Expected stop without tools: a call is read to its end.", field="stop")
        if tools and sampling.grammar is not None:
            raise BadRequestError(
                f"Expected {body.grammar_field} without tools: an answer that matches it calls none.",
                field=body.grammar_field,
            )
        await self._come_to(request)
        read = partial(read_messages, messages=body.messages, fallback=fallback, tools=tools)
        with self._served(body.model, request, asker=_asker(request, body.user)) as served:
            if tools:
                require_tools(served.tokenizer, tools)
            prompt = await asyncio.to_thread(read, served)
            question = self._question(
                request, served, body, sampling, [prompt], read=lambda other: [read(other)], tools=tools
            )
            return _response(await self._answering.answer(request, question, stream=bool(body.stream)))

    def _question(
        self,
        request: Request,
        served: Served,
        body: CompletionBody | ChatBody,
        sampling: Sampling,
        prompts: Sequence[Prompt],
        *,
        read: ReadPrompts,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Question:
        """The request as the engine takes it; `read` gives its prompts in the tokens of another release.

        Raises   StatusError if the context is too short for it.
        """
        chat = isinstance(body, ChatBody)
        context, wanted = served.engine.context_length, body.wanted_length
        longest = max(len(prompt.ids) for prompt in prompts)
        room, least = context - longest, min(1, sampling.max_tokens)
        if room < least or (wanted is not None and wanted > room):
            raise StatusError(
                400,
                f"Expected prompt and answer within the context of {context} tokens, found a prompt of {longest} and "
                f"{body.length_field} of {1 if wanted is None else wanted}. Shorten the prompt or lower "
                f"{body.length_field}.",
                kind="invalid_request_error",
                code="context_length_exceeded",
                field=body.length_field if room >= 1 else "messages" if chat else "prompt",
            )
        behind = request.scope.get(_BEHIND)
        progress: Progress | None = request.scope.get(PROGRESS)
        question = Question(
            id=("chatcmpl-" if chat else "cmpl-") + _identity(request),
            created=int(time.time() if progress is None else progress.created),
            served=served,
            prompts=prompts,
            sampling=replace(sampling, max_tokens=min(sampling.max_tokens, room)),
            user=body.user,
            chat=chat,
            include_usage=body.include_usage,
            fields={"grammar": body.grammar_field, "prompt_ids": "messages" if chat else "prompt"},
            tools=tools,
            who=_who(request, body.user),
            behind=behind is not None,
            timeout_s=self._timeout(request, body.timeout),
            adapter=served.names[body.model],
            progress=progress,
            watch=self._watch(request, served, body, sampling, read),
        )
        if progress is not None and progress.release is not None and progress.fingerprint != question.fingerprint:
            raise _gone(question.model)
        return question

    def _watch(
        self, request: Request, served: Served, body: CompletionBody | ChatBody, sampling: Sampling, read: ReadPrompts
    ) -> Watch | None:
        """What the trial that is on wants to know of a request that asks for whatever is in production."""
        tried = self.releases.tried
        if tried is None or _BEHIND in request.scope or body.model != served.release.factory:
            return None
        trial, _ = tried
        watch = Watch(trial=trial.number, release=served.release.number, outcomes=self.outcomes)
        if trial.kind == "shadow" and sampling.max_tokens and trial.takes(_identity(request)):
            watch.copy = lambda question: self.shadows.copy(question, read)
        return watch

    def _timeout(self, request: Request, asked: float | None) -> float | None:
        """How long a request may take: what it asks for, in its body or its header, and the endpoint's at most.

        In the background it may wait for as long as others come.
        """
        if _BEHIND in request.scope:
            return None
        header = request.headers.get(_TIMEOUT_HEADER)
        if asked is None and header is not None:
            try:
                asked = float(header)
            except ValueError:
                asked = -1.0
            if not 0 < asked <= MOST_SECONDS:
                raise BadRequestError(
                    f"Expected a number of seconds up to {MOST_SECONDS:g} in {_TIMEOUT_HEADER}, found {header[:40]!r}.",
                    field="timeout",
                )
        allowed = min((each for each in (asked, self._longest_s) if each is not None), default=None)
        progress: Progress | None = request.scope.get(PROGRESS)
        if allowed is None or progress is None:
            return allowed
        return max(0.0, allowed - progress.spent_s)

    async def _embed(self, request: Request) -> Response:
        """The embeddings of texts: vectors of length 1, of which the dot product is the cosine."""
        body = parse(EmbeddingBody, await self._read(request))
        asked = body.inputs
        with self._served(body.model) as served:
            prompts = await asyncio.to_thread(read_prompts, served, asked, field="input")
            longest, context = max(len(prompt.ids) for prompt in prompts), served.engine.context_length
            if longest > context:
                raise StatusError(
                    400,
                    f"Expected texts within the context of {context} tokens, found one of {longest}. Shorten it.",
                    kind="invalid_request_error",
                    code="context_length_exceeded",
                    field="input",
                )
            question = Question(
                id="embd-" + secrets.token_hex(12),
                created=int(time.time()),
                served=served,
                prompts=prompts,
                sampling=Sampling(),
                user=body.user,
                chat=False,
                pooling=_POOLING,
                fields={"prompt_ids": "input"},
                behind=_BEHIND in request.scope,
                who=_who(request, body.user),
                timeout_s=self._timeout(request, body.timeout),
                adapter=served.names[body.model],
            )
            found = await self._answering.embed(request, question)
            tokens = sum(len(prompt.ids) for prompt in prompts)
            data = [
                {"object": "embedding", "index": index, "embedding": _vector(each, body.encoding_format)}
                for index, each in enumerate(found)
            ]
            used = {"prompt_tokens": tokens, "total_tokens": tokens}
            return json_response({"object": "list", "data": data, "model": question.model, "usage": used})

    # ── tokens ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _tokenize(self, request: Request) -> Response:
        """The tokens that the model reads of a prompt or of messages."""
        body = parse(TokenizeBody, await self._read(request))
        if (body.prompt is None) == (body.messages is None):
            raise BadRequestError("Expected a prompt or messages, one of the two.", field="prompt")
        with self._served(body.model) as served:
            if body.tools and (body.messages is None or not takes_tools(served.tokenizer.chat_template)):
                raise BadRequestError(
                    "Expected tools with messages, and with a model whose chat template writes them.", field="tools"
                )
            ids = await asyncio.to_thread(tokens_of, served, body, fallback=self.recipe.chat_fallback)
            names = [served.tokenizer.name_of(token) for token in ids] if body.return_token_strs else None
            return json_response(
                {
                    "count": len(ids),
                    "max_model_len": served.engine.context_length,
                    "tokens": ids,
                    "token_strs": names,
                }
            )

    async def _detokenize(self, request: Request) -> Response:
        """The text of tokens."""
        body = parse(DetokenizeBody, await self._read(request))
        with self._served(body.model) as served:
            require_known(served, body.tokens, "tokens")
            return json_response({"prompt": await asyncio.to_thread(served.tokenizer.decode, body.tokens)})

    # ── how ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _come_to(self, request: Request) -> None:
        """Wait for the release by which the client has been told a part of its answer, where this replica is behind."""
        progress: Progress | None = request.scope.get(PROGRESS)
        if progress is not None and progress.release is not None:
            await self.releases.come_to(progress.release, _LONGEST_BEHIND_S)

    @contextmanager
    def _served(
        self,
        model: str | None = None,
        request: Request | None = None,
        *,
        asker: Mapping[ShareOf, str] | None = None,
    ) -> Iterator[Served]:
        """The release that takes requests, the one on trial for its share of `asker`s, or the one by which an answer was
        begun, held while the block runs. Raises StatusError if neither it nor an adapter beside it is `model`."""
        progress: Progress | None = None if request is None else request.scope.get(PROGRESS)
        number = None if progress is None else progress.release
        with self.releases.hold(number, model=model, asker=asker) as served:
            if served is None and number is not None:
                raise _gone(f"release {number}")
            if served is None:
                raise StatusError(503, "Expected a release in production, found none yet.", kind="server_error")
            failure = served.engine.failure
            if failure is not None:
                raise StatusError(
                    503,
                    f"Expected an engine that answers, found that {failure}. Another replica takes its place: ask again later.",
                    kind="server_error",
                    code=ENGINE_FAILED,
                )
            if model is not None and model not in served.names:
                shown = [*served.names][:_SHOWN_NAMES]
                known = " or ".join(map(repr, shown)) + (
                    " or another of /v1/models" if len(served.names) > len(shown) else ""
                )
                message = f"Expected the model {known}, found {model!r}."
                if model in served.refused:
                    message = (
                        f"Expected an adapter that fits the release {served.release.name}, found that {model!r} does "
                    )
                    message += "not; the journal says why. Ask another model, or mend runtime.endpoint.adapters."
                raise StatusError(404, message, kind="invalid_request_error", code="model_not_found", field="model")
            yield served

    async def _read(self, request: Request) -> bytes:
        """The body, as far as it is not too large."""
        limit = self.recipe.max_file_bytes if _BEHIND in request.scope else self.recipe.max_body_bytes
        data = bytearray()
        async for piece in request.stream():
            data += piece
            if len(data) > limit:
                raise StatusError(413, f"Expected a body of at most {limit} bytes.", kind="invalid_request_error")
        return bytes(data)


_BODIES: Mapping[str, type[ClosedBody]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/embeddings": EmbeddingBody,
    "/v1/feedback": FeedbackBody,
    "/v1/batches": BatchBody,
    RETRAINS: RetrainBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
"""What is posted where."""
_QUERIES: Mapping[tuple[str, str], type[ClosedBody]] = {
    ("GET", "/v1/files"): FilesQuery,
    ("GET", "/v1/batches"): BatchesQuery,
}
"""What may be asked after the question mark."""


def _gone(model: str) -> StatusError:
    return StatusError(
        503,
        f"The replica that answered was lost, and {model}, by which it had begun, is served no longer. What was said so far "
        "is all there is of it. Ask again.",
        kind="server_error",
        code=LOST,
    )


def _identity(request: Request) -> str:
    """The id of a request's answer, without what stands before it; the same whenever it is asked for."""
    progress: Progress | None = request.scope.get(PROGRESS)
    known = request.scope.get(_BEHIND) or (None if progress is None else progress.identity)
    return str(known or request.scope.setdefault(_IDENTITY, secrets.token_hex(12)))


def _asker(request: Request, user: str | None) -> Mapping[ShareOf, str] | None:
    """Of what a release on trial takes a share; None for work in the background, which production does."""
    if _BEHIND in request.scope:
        return None
    return {"key": hash_parts(*_who(request, user)), "request": _identity(request)}


def _who(request: Request, user: str | None) -> tuple[str, str]:
    """The key, which is kept nowhere, and the user."""
    return hash_text(request.headers.get("authorization", "")), user or ""


def _vector(embedding: Sequence[float], encoding: str | None) -> list[float] | str:
    vector = np.asarray(embedding, np.float32)
    # A length of 0 stays: there is no direction to keep.
    vector /= np.linalg.norm(vector) or np.float32(1)
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(each) for each in vector]


def _response(answer: Response | Mapping[str, Any]) -> Response:
    return answer if isinstance(answer, Response) else json_response(answer)


def _error(status: int, message: str, *, kind: str, field: str | None = None, code: str | None = None) -> Response:
    return json_response(error_body(message, kind=kind, field=field, code=code), status=status)
