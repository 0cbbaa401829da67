"""Asking: who asks a request, under which id it is answered, and the release that it is held to."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from starlette.requests import Request

from aifactory.records.identity import hash_parts
from aifactory.records.trials import ShareOf
from aifactory.serve.access import caller_of
from aifactory.serve.progress import PROGRESS, Progress
from aifactory.serve.proxy import LOST
from aifactory.serve.releases import Releases, Served
from aifactory.serve.wire import ENGINE_FAILED, StatusError

BEHIND = "aifactory.behind"
"""In the scope of a request in the background: the id of its answer."""
_IDENTITY = "aifactory.identity"
"""In the scope of any other: the id of its answer, once that was asked for."""
RELEASE = "aifactory.release"
"""In the scope of a request: the name of the release that answers it, once that is known."""
_SHOWN_NAMES = 12


def identity(request: Request) -> str:
    """The id of a request's answer, without what stands before it; the same whenever it is asked for."""
    progress: Progress | None = request.scope.get(PROGRESS)
    known = request.scope.get(BEHIND) or (None if progress is None else progress.identity)
    return str(known or request.scope.setdefault(_IDENTITY, secrets.token_hex(12)))


def who(request: Request, user: str | None) -> tuple[str, str]:
    """The key and the user."""
    return caller_of(request).who, user or ""


def asker(request: Request, user: str | None) -> Mapping[ShareOf, str] | None:
    """Of what a release on trial takes a share; None for work in the background, which production does."""
    if BEHIND in request.scope:
        return None
    return {"key": hash_parts(*who(request, user)), "request": identity(request)}


@contextmanager
def holding(
    releases: Releases,
    model: str | None = None,
    request: Request | None = None,
    *,
    asker: Mapping[ShareOf, str] | None = None,
) -> Iterator[Served]:
    """The release that takes requests, the one on trial for its share of `asker`s, or the one by which an answer was begun,
    held while the block runs.

    Raises   StatusError if neither it nor an adapter beside it is `model`.
    """
    progress: Progress | None = None if request is None else request.scope.get(PROGRESS)
    number = None if progress is None else progress.release
    with releases.hold(number, model=model, asker=asker) as served:
        if served is None and number is not None:
            raise gone(f"release {number}")
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
            raise _unknown(model, served)
        yield served


def gone(model: str) -> StatusError:
    """Nobody can go on with what was begun by this model."""
    return StatusError(
        503,
        f"The replica that answered was lost, and {model}, by which it had begun, is served no longer. What was said so far "
        "is all there is of it. Ask again.",
        kind="server_error",
        code=LOST,
    )


def _unknown(model: str, served: Served) -> StatusError:
    shown = [*served.names][:_SHOWN_NAMES]
    more = " or another of /v1/models" if len(served.names) > len(shown) else ""
    message = f"Expected the model {' or '.join(map(repr, shown))}{more}, found {model!r}."
    if model in served.refused:
        message = (
            f"Expected an adapter that fits the release {served.release.name}, found that {model!r} does not; the journal "
            "says why. Ask another model, or mend runtime.endpoint.adapters."
        )
    return StatusError(404, message, kind="invalid_request_error", code="model_not_found", field="model")
