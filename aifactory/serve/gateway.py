"""The gateway: OpenAI's interface over the releases of one replica. Plain ASGI: it knows no Ray.

    GET  /healthz  /readyz  /v1/models  /v1/models/{model}  /openapi.json  /docs
    POST /v1/completions  /v1/chat/completions  /v1/embeddings  /tokenize  /detokenize
    and /v1/feedback: see feedback_routes.py; /v1/files, /v1/batches: see batch_routes.py; /v1/retrains: see retrain_routes.py

An answer is on disk before its last byte is sent, so feedback on it is never about something unknown. A client that
goes away stops the engine's work on its answer.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from aifactory.config import Serve
from aifactory.errors import AIFactoryError, BadRequestError, CapacityError
from aifactory.observe import metrics, tracing
from aifactory.observe.events import logger
from aifactory.records.books import Books
from aifactory.records.journal import ANONYMOUS
from aifactory.records.keys import Scope
from aifactory.serve.access import CALLER, Access
from aifactory.serve.admission import Admission
from aifactory.serve.answer_cache import AnswerCache
from aifactory.serve.answer_meter import NO_RELEASE, NO_ROUTE, QUEUE_FULL
from aifactory.serve.answer_routes import AnswerRoutes
from aifactory.serve.answers import Answering, Count
from aifactory.serve.asking import BEHIND, RELEASE, holding
from aifactory.serve.batch_routes import BatchRoutes
from aifactory.serve.batches import Batches
from aifactory.serve.bodies import (
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
from aifactory.serve.event_stream import EventStream, until_its_end
from aifactory.serve.feedback_routes import FeedbackRoutes
from aifactory.serve.guards import Guards, Mask
from aifactory.serve.limiting import Limiter
from aifactory.serve.openapi import Operation, describe, page
from aifactory.serve.releases import Releases, Served
from aifactory.serve.retrain_routes import ACCEPTED, RETRAIN, RETRAINS, RetrainBody, RetrainRoutes
from aifactory.serve.trials import Outcomes, Shadows
from aifactory.serve.wire import (
    ALWAYS,
    ClosedBody,
    Incoming,
    NoQuery,
    StatusError,
    error_body,
    json_response,
    parse_query,
    path_of,
    shutting_down,
)

_RETRY_AFTER_S = "1"
_ANY_MODEL = "/v1/models/{model}"
_OPEN = (*ALWAYS, "/openapi.json", "/docs")
"""What tells nothing of anybody, and is told to all."""
_SCOPES: Mapping[str, Scope] = {"/v1/feedback": "feedback", RETRAINS: "operate", RETRAIN: "operate"}
"""What a key must be good for; `infer` everywhere else."""
Handler = Callable[[Request], Awaitable[Response]]


class Gateway:
    """Answers requests with the release in production."""

    def __init__(
        self,
        books: Books,
        releases: Releases,
        recipe: Serve,
        *,
        replica: str = "",
        count: Count = lambda _: None,
        mask: Mask | None = None,
    ) -> None:
        """`replica` is what /readyz calls this one, where there are several; `count` is called with answers that were kept.

        mask     takes personal data out of a text, where `runtime.gateway` wants that
        Raises   ConfigError where a guard can't be loaded.
        """
        self.books = books
        self.is_draining = False
        """Whether it takes no more requests; those that it has go on."""
        self._replica = replica
        self._handling = 0
        self.releases = releases
        self.recipe = recipe
        endpoint = books.config.runtime.endpoint
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
        gateway = books.config.runtime.gateway
        self._access = Access(books.keys, gateway)
        guards = Guards.of(gateway, mask)
        cache = AnswerCache(max_bytes=gateway.cache_bytes, max_age_s=gateway.cache_max_age_s)
        self._answering = Answering(
            books.feedback,
            self.admission,
            make_way=self.shadows.make_way,
            count=count,
            guards=guards,
            cache=cache if gateway.cache_bytes else None,
        )
        self.limiter = Limiter(books.allowances, gateway, holder=f"{replica}-{secrets.token_hex(8)}"[-64:])
        self._answers = AnswerRoutes(
            books.config,
            releases,
            self._answering,
            limiter=self.limiter,
            guards=guards,
            outcomes=self.outcomes,
            shadows=self.shadows,
            read=self._read,
        )
        self._routes: dict[tuple[str, str], Handler] = {
            **BatchRoutes(books.batches, read=self._read, max_file_bytes=recipe.max_file_bytes).handlers,
            **FeedbackRoutes(books.feedback, limiter=self.limiter, read=self._read).handlers,
            **RetrainRoutes(
                books.retrain_requests, has_release=lambda: releases.current is not None, read=self._read
            ).handlers,
            ("GET", "/healthz"): self._health,
            ("GET", "/readyz"): self._ready,
            ("GET", "/openapi.json"): self._openapi,
            ("GET", "/docs"): self._docs,
            ("GET", "/v1/models"): self._models,
            ("GET", _ANY_MODEL): self._model,
            **self._answers.handlers,
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

    async def close(self) -> None:
        """Close what it holds open elsewhere."""
        await self._answers.close()

    async def handle(self, request: Request) -> Response:
        """Answer one request; whatever is wrong with it comes back in OpenAI's envelope."""
        incoming = Incoming(request.receive)
        self._handling += 1
        began = time.monotonic()
        path = path_of(request.scope)
        span = tracing.begin_request(
            request.headers, "request", **{"http.request.method": request.method, "url.path": path}
        )
        try:
            with span.here():
                response = await self._answer(Request(request.scope, incoming))
            self._measure(request, response.status_code, time.monotonic() - began)
            traced = {
                "http.response.status_code": response.status_code,
                "release": request.scope.get(RELEASE, NO_RELEASE),
            }
            if isinstance(response, EventStream) and span.parent is not None:
                response.events = until_its_end(response.events, partial(span.end, **traced))
            else:
                span.end(error="failed" if response.status_code >= 500 else None, **traced)
            if response.status_code >= 400:
                await incoming.read_on()
            return response
        except BaseException as error:
            span.end(error=type(error).__name__)
            raise
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
                if route not in _OPEN and CALLER not in request.scope:
                    request.scope[CALLER] = await self._access.caller(request.headers, _SCOPES.get(route, "infer"))
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
            metrics.SERVE_REFUSED.add(code=QUEUE_FULL)
            response = _error(429, str(error), kind="rate_limit_error", code=QUEUE_FULL)
            response.headers["Retry-After"] = _RETRY_AFTER_S
            return response
        except StatusError as error:
            metrics.SERVE_REFUSED.add(code=error.code or str(error.status))
            response = _error(error.status, str(error), kind=error.kind, code=error.code, field=error.field)
            response.headers.update(error.headers)
            return response
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception:
            logger.exception("failed request=%s", path)
            return _error(500, "The server failed; its log says why.", kind="server_error")

    def _measure(self, request: Request, status: int, seconds: float) -> None:
        route = self._route_of(path_of(request.scope))
        known = route if any(route == each for _, each in self._routes) else NO_ROUTE
        release = request.scope.get(RELEASE, NO_RELEASE)
        metrics.SERVE_REQUESTS.add(route=known, status=str(status), release=release)
        metrics.SERVE_REQUEST_SECONDS.observe(seconds, route=known)

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

    async def ask_behind(self, path: str, body: bytes, identity: str, key_id: str = ANONYMOUS) -> tuple[int, Any]:
        """Status and answer of a request that came with no connection: in the background, under an id of its own, for whoever
        has this key."""
        try:
            caller = await self._access.owner(key_id)
        except StatusError as error:
            return error.status, error_body(str(error), kind=error.kind, code=error.code)
        if json.loads(body).get("stream"):
            return 400, error_body("Expected no stream in a batch.", kind="invalid_request_error", field="stream")
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            # It has no client that could go away.
            return messages.pop() if messages else await asyncio.Event().wait()

        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
        scope |= {BEHIND: identity, CALLER: caller}
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
                scope=None if path in _OPEN else _SCOPES.get(path, "infer"),
                status=ACCEPTED if (method, path) == ("POST", RETRAINS) else 200,
            )
            for (method, path), handler in self._routes.items()
        ]
        needs_key = self.books.config.runtime.gateway.keys == "required"
        return describe(operations, title=self.books.config.name, needs_key=needs_key)

    async def _models(self, _: Request) -> Response:
        """What can be asked: the factory, its release in production, the adapters beside it, and a canary by its name."""
        with holding(self.releases) as served, self.releases.hold_tried() as tried:
            cards = {name: self._model_card(name, served) for name in served.names}
            if tried is not None and tried[0].kind == "canary":
                cards = {name: self._model_card(name, tried[1]) for name in tried[1].names} | cards
                cards = {name: cards[name] for name in dict.fromkeys([*served.names, *cards])}
            routed = dict.fromkeys(route.model for route in self.books.config.runtime.gateway.routes)
            cards |= {name: self._card(name, served) for name in routed if name not in cards}
            return json_response({"object": "list", "data": list(cards.values())})

    async def _model(self, request: Request) -> Response:
        """One of them."""
        name = path_of(request.scope).removeprefix("/v1/models/")
        if any(route.model == name for route in self.books.config.runtime.gateway.routes):
            with holding(self.releases) as served:
                return json_response(self._card(name, served))
        with holding(self.releases, name) as served:
            return json_response(self._model_card(name, served))

    def _card(self, name: str, served: Served) -> dict[str, Any]:
        created = int(served.release.created_at)
        return {"id": name, "object": "model", "created": created, "owned_by": self.books.config.name}

    def _model_card(self, name: str, served: Served) -> dict[str, Any]:
        card = self._card(name, served)
        # As vLLM says what an adapter stands beside.
        return card if served.names[name] is None else card | {"parent": served.release.name}

    # ── how ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _read(self, request: Request) -> bytes:
        """The body, as far as it is not too large."""
        limit = self.recipe.max_file_bytes if BEHIND in request.scope else self.recipe.max_body_bytes
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


def _error(status: int, message: str, *, kind: str, field: str | None = None, code: str | None = None) -> Response:
    return json_response(error_body(message, kind=kind, field=field, code=code), status=status)
