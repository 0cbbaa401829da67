"""The routes of retrains that somebody asks for: on disk before it is acknowledged, taken up by the evaluation actor.

POST /v1/retrains   GET /v1/retrains/{retrain}
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from aifactory.errors import BadRequestError, ConfigError
from aifactory.records.retrain_requests import RetrainRequest, RetrainRequests
from aifactory.serve.access import caller_of
from aifactory.serve.wire import ClosedBody, StatusError, json_response, parse, path_of

RETRAINS = "/v1/retrains"
RETRAIN = "/v1/retrains/{retrain}"
ACCEPTED = 202
Handler = Callable[[Request], Awaitable[Response]]


class RetrainBody(ClosedBody):
    """POST /v1/retrains: one retrain of the release in production."""

    reason: str = Field(default="asked for", min_length=1, max_length=500)
    """Why, for the audit and for the reasons of the decision."""
    despite_cooldown: bool = False
    """Whether it need not wait for a cool-down. The daily limit, the budget and the gate hold."""
    idempotency_key: str | None = Field(default=None, min_length=1, max_length=128)
    """Who repeats himself with the same key has asked once. Without one, each is another request."""


class RetrainRoutes:
    """Retrains over HTTP."""

    def __init__(
        self, requests: RetrainRequests, *, has_release: Callable[[], bool], read: Callable[[Request], Awaitable[bytes]]
    ) -> None:
        self._requests = requests
        self._has_release = has_release
        self._read = read
        self.handlers: Mapping[tuple[str, str], Handler] = {("POST", RETRAINS): self._ask, ("GET", RETRAIN): self._show}

    async def _ask(self, request: Request) -> Response:
        """Ask for one retrain of the release in production; the evaluation actor decides when."""
        body = parse(RetrainBody, await self._read(request))
        key = request.headers.get("idempotency-key") or body.idempotency_key
        return json_response(
            _told(await asyncio.to_thread(self._asked, body, key, caller_of(request).key_id)), status=202
        )

    def _asked(self, body: RetrainBody, key: str | None, key_id: str) -> RetrainRequest:
        if not self._has_release():
            raise StatusError(
                409, "Expected a release in production to retrain, found none.", kind="invalid_request_error"
            )
        try:
            return self._requests.ask(
                reason=body.reason, despite_cooldown=body.despite_cooldown, key=key, key_id=key_id
            )
        except ConfigError as error:
            raise BadRequestError(str(error), field="idempotency_key") from error

    async def _show(self, request: Request) -> Response:
        """What became of it: open, withdrawn, or the trigger of the cycle that took it up."""
        name = path_of(request.scope).removeprefix(f"{RETRAINS}/")
        found = await asyncio.to_thread(self._requests.all)
        for each in found:
            if each.id == name:
                return json_response(_told(each))
        raise StatusError(
            404, f"Expected the id of a retrain that was asked for, found {name!r}.", kind="invalid_request_error"
        )


def _told(request: RetrainRequest) -> dict[str, object]:
    return {
        "object": "retrain",
        "id": request.id,
        "created": int(request.at),
        "reason": request.reason,
        "despite_cooldown": request.despite_cooldown,
        "state": request.state,
    }
