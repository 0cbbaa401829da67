"""The wire: JSON bodies as they come in and go out, and OpenAI's envelope for errors.

What is not supported is refused by name, never ignored: the bodies are closed. A value that asks for nothing
(`"suffix": null`, `"store": false`) is let pass, since clients send such values unasked.
Source   OpenAI API reference, "Completions", "Chat" and "Errors" (2026-11).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.responses import Response
from starlette.types import Message, Receive, Scope

from aifactory.errors import BadRequestError

_ASKS_NOTHING: Mapping[str, Sequence[Any]] = {
    "audio": (None,),
    "function_call": (None, "none"),
    "functions": (None, []),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "verbosity": (None,),
    "web_search_options": (None,),
}
"""OpenAI's options that are not supported, and their values that change no answer."""
MOST_LEVELS = 100
"""Of objects and arrays in a body, the body itself being one. A schema has two for each of its own."""
_TOO_MANY_LEVELS = f"Expected JSON of at most {MOST_LEVELS} levels, one within the other, found more."
ALWAYS = ("/healthz", "/readyz")
"""What is answered whatever else there is to do."""
_MOST_UNREAD_BYTES = 16_000_000
_LONGEST_UNREAD_S = 2.0
"""As far as the body of a request that was refused is read on."""


class ClosedBody(BaseModel):
    """A JSON object without unknown fields, whose values have the types that they are said to have."""

    # The docstrings of fields are what the OpenAPI page says of them.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


Body = TypeVar("Body", bound=ClosedBody)


def read_json(data: bytes) -> Any:
    """What a text in JSON says, of at most MOST_LEVELS levels: templates, schemas and Python's own encoder go down them by recursion, and
    take more of a stack than the decoder does.

    Raises   BadRequestError.
    """
    try:
        values = json.loads(data.decode())
    except ValueError as error:
        raise BadRequestError(f"Expected JSON, found: {error}.") from error
    except RecursionError as error:
        raise BadRequestError(_TOO_MANY_LEVELS) from error
    if data.count(b"[") + data.count(b"{") > MOST_LEVELS and _levels(values) > MOST_LEVELS:
        raise BadRequestError(_TOO_MANY_LEVELS)
    return values


def _levels(values: Any) -> int:
    found, level = 0, [values]
    while level := [value for value in level if isinstance(value, (dict, list))]:
        found += 1
        level = [each for value in level for each in (value.values() if isinstance(value, dict) else value)]
    return found


def parse(kind: type[Body], data: bytes) -> Body:
    """The body as a value.

    Raises   BadRequestError that names the field that is wrong, unknown or missing.
    """
    values = read_json(data)
    if not isinstance(values, dict):
        raise BadRequestError(f"Expected a JSON object as the body, found {_form(values)}.")
    if b"\\ud" in data.lower():
        _require_whole_characters(values)
    try:
        return kind.model_validate({name: value for name, value in values.items() if not _asks_nothing(name, value)})
    except ValidationError as error:
        raise _explain(error, kind) from error


class NoQuery(ClosedBody):
    """What is asked for by the path alone."""


def parse_query(kind: type[Body], items: Iterable[tuple[str, str]]) -> Body:
    """The parameters after the question mark as a value. Numbers are written in digits there, so they are read from text.

    Raises   BadRequestError that names the parameter that is wrong, unknown or there twice.
    """
    values: dict[str, str] = {}
    for name, value in items:
        if name in values:
            raise BadRequestError(f"Expected {name} once in the query, found it twice.", field=name)
        values[name] = value
    try:
        return kind.model_validate_strings(values)
    except ValidationError as error:
        raise _explain(error, kind) from error


class Incoming:
    """The messages of a request, of which it is known whether its body was read to the end."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._ended = False

    async def __call__(self) -> Message:
        message = await self._receive()
        self._ended = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def read_on(self) -> None:
        """Drop the rest of the body, as far as it comes.

        A server that closes a connection of which something is unread resets it, and the client may never see the answer.
        """
        most_bytes = _MOST_UNREAD_BYTES
        with suppress(TimeoutError):
            async with asyncio.timeout(_LONGEST_UNREAD_S):
                while not self._ended and most_bytes > 0:
                    most_bytes -= len((await self()).get("body", b""))


class StatusError(Exception):
    """An error with a status of its own."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str,
        code: str | None = None,
        field: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.code, self.field = status, kind, code, field
        self.headers: dict[str, str] = {}
        """What goes out beside the message."""
        if retry_after_s is not None or status == 503:
            self.headers["Retry-After"] = str(1 if retry_after_s is None else retry_after_s)
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"


ENGINE_FAILED = "engine_failed"
"""The code of what a replica says whose engine will never answer again."""


def shutting_down() -> StatusError:
    """What comes while the endpoint ends is told."""
    return StatusError(
        503,
        "The endpoint is shutting down: it ends the answers that it has begun, and takes no more. Ask again later.",
        kind="server_error",
        code="shutting_down",
    )


def path_of(scope: Scope) -> str:
    """The path below where the gateway is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    if path == root or path.startswith(root + "/"):
        path = path[len(root) :]
    return path.rstrip("/") or "/"


def error_body(message: str, *, kind: str, field: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's envelope for errors."""
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def json_response(payload: Mapping[str, Any], *, status: int = 200) -> Response:
    """An answer as JSON, in ASCII: what a client sent is quoted back in errors, and need not be text that UTF-8 can hold."""
    return Response(json.dumps(payload), status_code=status, media_type="application/json")


def usage(prompt_tokens: int, answer_tokens: int) -> dict[str, int]:
    """What was read and written."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": answer_tokens,
        "total_tokens": prompt_tokens + answer_tokens,
    }


def event(payload: Mapping[str, Any] | str) -> bytes:
    """One server-sent event. In ASCII: some clients end a line at U+2028 and U+0085, which JSON lets stand."""
    text = payload if isinstance(payload, str) else json.dumps(payload)
    return f"data: {text}\n\n".encode()


def _require_whole_characters(values: Mapping[str, Any]) -> None:
    """JSON can write half a surrogate pair, which is no text: neither a tokenizer nor a database takes it."""
    for name, value in values.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise BadRequestError(f"Expected text in {name!r}, found half a surrogate pair.", field=name) from error


def _asks_nothing(name: str, value: Any) -> bool:
    # By type too: to Python, False is 0 and True is 1.
    return any(type(value) is type(nothing) and value == nothing for nothing in _ASKS_NOTHING.get(name, ()))


_UNION_MARKS = ("str", "int", "list[int]", "list[str]", "list[list[int]]")
"""What pydantic puts into a location to say which member of a union was tried."""


def _explain(error: ValidationError, kind: type[ClosedBody]) -> BadRequestError:
    problems = error.errors(include_url=False)
    # Of a union's members the one that was followed furthest is what was meant.
    problem = max((p for p in problems if p["loc"][0] == problems[0]["loc"][0]), key=lambda p: len(_path(p["loc"])))
    path = _path(problem["loc"])
    field = path[0] + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path[1:])
    if problem["type"] == "extra_forbidden":
        known = ", ".join(sorted(_owner(kind, path[:-1]).model_fields)) or "none here"
        return BadRequestError(
            f"Expected only options that are supported ({known}), found {field[:60]!r}; leave it out.",
            field=field,
        )
    if problem["type"] == "missing":
        return BadRequestError(f"Expected {field} in the body, found none.", field=field)
    same = [p["msg"] for p in problems if _path(p["loc"]) == path]
    expected = " or ".join(msg.removeprefix("Value error, ").removeprefix("Input should be ") for msg in same)
    return BadRequestError(f"Expected in {field}: {expected}; found {_form(problem['input'])}.", field=field)


def _owner(kind: type[BaseModel], path: Sequence[Any]) -> type[BaseModel]:
    """The body inside `kind` that holds what is at the path: the one that a field's type names."""
    for part in path:
        field = kind.model_fields.get(part)
        members = () if field is None else (field.annotation, *get_args(field.annotation))
        kind = next((each for each in members if isinstance(each, type) and issubclass(each, BaseModel)), kind)
    return kind


def _path(location: Sequence[int | str]) -> list[Any]:
    return [location[0], *(part for part in location[1:] if part not in _UNION_MARKS)]


def _form(value: Any) -> str:
    # Not the whole of it: it may be large, or too deep for repr.
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
