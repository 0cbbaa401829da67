"""The wire: OpenAI's bodies as they come in and go out, and its envelope for errors.

What is not supported is refused by name, never ignored: the bodies are closed. A value that asks for nothing
(`"tools": null`, `"echo": false`) is let pass, since clients send such values unasked.
Source   OpenAI API reference, "Completions", "Chat" and "Errors" (2026-11).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from aifactory.engine.protocol import Sampling
from aifactory.errors import BadRequestError

_ASKS_NOTHING: Mapping[str, Sequence[Any]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0, 0.0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "presence_penalty": (None, 0, 0.0),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
}
"""OpenAI's options that are not supported, and their values that change no answer."""


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class StreamOptions(_Body):
    """What a stream carries beside the text."""

    include_usage: bool = False


class _Generation(_Body):
    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=256)

    @field_validator("user")
    @classmethod
    def _refuse_nul(cls, user: str | None) -> str | None:
        # It is kept with the answer, where PostgreSQL takes none: refused before there is an answer.
        if user is not None and "\0" in user:
            raise ValueError("Input should be a string without NUL")
        return user

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with what was read and written."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def length_field(self) -> str:
        """The field that says how long the answer may be."""
        return "max_tokens"

    def sampling(self, *, default: int, limit: int) -> Sampling:
        """The engine's form.

        default   longest answer where the request names none, tokens
        limit     longest answer that a request may name
        Raises    BadRequestError naming the field.
        """
        if self.n not in (None, 1):
            raise BadRequestError(
                f"Expected n of 1, the only number of answers that is supported, found {self.n}.", field="n"
            )
        if self.stream_options is not None and not self.stream:
            raise BadRequestError("Expected stream_options with stream only.", field="stream_options")
        wanted = getattr(self, self.length_field)
        if wanted is not None and not 1 <= wanted <= limit:
            raise BadRequestError(
                f"Expected {self.length_field} from 1 to {limit}, found {wanted}.", field=self.length_field
            )
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            max_tokens=max(1, min(default, limit)) if wanted is None else wanted,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=stop,
        )


class CompletionBody(_Generation):
    """POST /v1/completions."""

    prompt: str | list[int]
    """One text, or its token ids with their bos. A list of one of them is the one."""

    @field_validator("prompt", mode="before")
    @classmethod
    def _unwrap(cls, prompt: Any) -> Any:
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            if len(prompt) > 1:
                raise ValueError("Input should be one prompt a request")
            return prompt[0]
        return prompt


class ChatBody(_Generation):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = None

    @property
    def length_field(self) -> str:
        """The newer of OpenAI's two names where it is used."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"


class FeedbackBody(_Body):
    """POST /v1/feedback: what somebody says of an answer."""

    completion: str = Field(max_length=64)
    """The id of the answer."""
    score: float | None = Field(default=None, ge=0, le=1)
    """0 is worst, 1 is best."""
    correction: str | None = Field(default=None, min_length=1)
    """The answer as it should have been."""
    comment: str | None = None
    user: str | None = Field(default=None, max_length=256)
    idempotency_key: str | None = Field(default=None, min_length=1, max_length=128)
    """The same key is counted once. Without one, the same feedback on the same answer is."""


Body = TypeVar("Body", bound=_Body)


def parse(kind: type[Body], data: bytes) -> Body:
    """The body as a value.

    Raises   BadRequestError that names the field that is wrong, unknown or missing.
    """
    try:
        text = data.decode()
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"Expected a body in JSON, found: {error}.") from error
    if not isinstance(values, dict):
        raise BadRequestError(f"Expected a JSON object as the body, found {_form(values)}.")
    if "\\ud" in text.lower():
        _require_whole_characters(values)
    try:
        return kind.model_validate({name: value for name, value in values.items() if not _asks_nothing(name, value)})
    except ValidationError as error:
        raise _explain(error, kind) from error


def error_body(message: str, *, kind: str, field: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's envelope for errors."""
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


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
        except (UnicodeEncodeError, RecursionError) as error:
            raise BadRequestError(f"Expected text in {name!r}, found half a surrogate pair.", field=name) from error


def _asks_nothing(name: str, value: Any) -> bool:
    # By type too: to Python, False is 0 and True is 1.
    return any(type(value) is type(nothing) and value == nothing for nothing in _ASKS_NOTHING.get(name, ()))


_UNION_MARKS = ("str", "list[int]", "list[str]")
"""What pydantic puts into a location to say which member of a union was tried."""


def _explain(error: ValidationError, kind: type[_Body]) -> BadRequestError:
    problems = error.errors(include_url=False)
    # Of a union's members the one that was followed furthest is what was meant.
    problem = max((p for p in problems if p["loc"][0] == problems[0]["loc"][0]), key=lambda p: len(_path(p["loc"])))
    path = _path(problem["loc"])
    field = path[0] + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path[1:])
    if problem["type"] == "extra_forbidden":
        owner = kind if len(path) == 1 else StreamOptions
        return BadRequestError(
            f"Expected only options that are supported ({', '.join(sorted(owner.model_fields))}), found {field!r}; "
            "leave it out.",
            field=field,
        )
    if problem["type"] == "missing":
        return BadRequestError(f"Expected {field} in the body, found none.", field=field)
    same = [p["msg"] for p in problems if _path(p["loc"]) == path]
    expected = " or ".join(msg.removeprefix("Value error, ").removeprefix("Input should be ") for msg in same)
    return BadRequestError(f"Expected in {field}: {expected}; found {_form(problem['input'])}.", field=field)


def _path(location: Sequence[int | str]) -> list[Any]:
    return [location[0], *(part for part in location[1:] if part not in _UNION_MARKS)]


def _form(value: Any) -> str:
    # Not the whole of it: it may be large, or too deep for repr.
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
