"""Chat: messages -> the text, or the tokens, of a prompt.

Templates are data from a model folder: they run in jinja2's immutable sandbox, without clock, files or network.
`bos_token` is empty inside a template, because the bos id is put before every prompt by `aifactory.text.documents`.
Raises   BadRequestError naming the field (`messages[2].role`), ConfigError for a template that can't run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from aifactory.errors import BadRequestError, ConfigError
from aifactory.text.tokenizer import TextTokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")
"""The roles that a message may have; a model's own template may refuse some of them."""

# The header ends in a newline, so that the answer begins a line: encoded apart from the prompt, it needs no space first.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}:\n{{ message.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
"""The template `plain`, for a base model that has none of its own."""

_TURN = ("role", "content")
_FALLBACKS = {"plain": PLAIN_TEMPLATE, "none": None}


class _RefusedError(Exception):
    """A template called raise_exception: it refuses the messages."""


def render_chat(
    messages: Sequence[Mapping[str, object]],
    *,
    template: str | None,
    fallback: str,
    eos_token: str = "",
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, object]] = (),
) -> str:
    """The prompt that asks for the next message of the assistant.

    messages   each {"role": one of ROLES, "content": str or a list of {"type": "text", "text": str}}; other keys pass.
               The assistant's may hold `tool_calls` in place of content; arguments in JSON reach the template parsed.
    tools      what the model may call, as the template writes them (OpenAI's form).
    template   the tokenizer's own; None if it has none, and then
    fallback   names one: "plain" (PLAIN_TEMPLATE) or "none" (chat is refused).
    Raises     BadRequestError for a bad message or a template that refuses them; ConfigError.
    """
    checked = _check(messages)
    if template is None:
        if fallback not in _FALLBACKS:
            raise ConfigError(
                f"Expected the fallback chat template to be one of {sorted(_FALLBACKS)}, found {fallback!r}."
            )
        template = _FALLBACKS[fallback]
    if template is None:
        raise BadRequestError(
            "Expected a model with a chat template, found none in its tokenizer. Send plain text to /v1/completions, "
            "or configure the chat template `plain`.",
            field="messages",
        )
    try:
        return _compile(template).render(
            messages=checked,
            tools=list(tools) or None,
            add_generation_prompt=add_generation_prompt,
            bos_token="",
            eos_token=eos_token,
        )
    except _RefusedError as error:
        raise BadRequestError(f"The model's chat template refuses the messages: {error}.", field="messages") from error
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise BadRequestError(
            f"The model's chat template can't render these messages: {type(error).__name__}: {error}.", field="messages"
        ) from error


def turns_of(messages: Sequence[Mapping[str, object]]) -> str:
    """A chat as JSON [{"role": ..., "content": ...}], which gives the same prompt again; "" where roles and texts are not
    all of it: a row has no place for calls and names.

    Raises   BadRequestError, as `render_chat`.
    """
    checked = _check(messages)
    if any(value is not None for message in checked for name, value in message.items() if name not in _TURN):
        return ""
    return json.dumps([{name: message[name] for name in _TURN} for message in checked], ensure_ascii=False)


def chat_tokens(
    tokenizer: TextTokenizer,
    messages: Sequence[Mapping[str, object]],
    *,
    fallback: str,
    tools: Sequence[Mapping[str, object]] = (),
    add_generation_prompt: bool = True,
) -> list[int]:
    """The prompt's token ids, without bos: control tokens where the template writes them, never from a message.

    Invariant  for messages without special-token strings these are the ids of the rendered text; a special-token
               string in a message is encoded as the plain text that it is.
    Raises     as `render_chat`.
    """
    checked = _check(messages)
    if tokenizer.chat_template is None:
        rendered = render_chat(checked, template=None, fallback=fallback, add_generation_prompt=add_generation_prompt)
        return tokenizer.encode(rendered)
    # Each special string in a message rides through the template as a mark of private-use characters.
    mark = _unused_character(repr(checked) + repr(tools) + tokenizer.chat_template)
    marks = {token: f"{mark}{index}{mark}" for index, token in enumerate(tokenizer.special_tokens)}
    marked = [_replace(message, marks) for message in checked]
    rendered = render_chat(
        marked,
        template=tokenizer.chat_template,
        fallback=fallback,
        eos_token=tokenizer.eos_token,
        add_generation_prompt=add_generation_prompt,
        tools=_replace(tools, marks),
    )
    ids: list[int] = []
    # Between two marks stands the index of a special token; all else is the template's output.
    for index, piece in enumerate(rendered.split(mark)):
        if index % 2:
            ids += tokenizer.encode(tokenizer.special_tokens[int(piece)])
        elif piece:
            ids += tokenizer.encode_template(piece)
    return ids


def takes_tools(template: str | None) -> bool:
    """Whether a chat template writes the tools that it is given."""
    return template is not None and "tools" in _names_asked(template)


def _check(messages: Sequence[Mapping[str, object]]) -> list[dict[str, Any]]:
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise BadRequestError("Expected a list of at least one message.", field="messages")
    checked = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise BadRequestError(f"Expected an object, found a {type(message).__name__}.", field=where)
        role = message.get("role")
        if role not in ROLES:
            raise BadRequestError(
                f"Expected a role of {', '.join(ROLES)}; found {role!r} in {where}.", field=f"{where}.role"
            )
        calls, content = message.get("tool_calls"), message.get("content")
        if role == "assistant" and calls:
            # The library's templates test `content` for truth; OpenAI's clients send null beside calls.
            content = "" if content is None else content
            message = {**message, "tool_calls": _tool_calls(calls, where=f"{where}.tool_calls")}
        checked.append({**message, "content": _content(content, where=f"{where}.content")})
    return checked


def _tool_calls(calls: object, *, where: str) -> list[dict[str, Any]]:
    """Calls with their arguments as objects, as templates write them: OpenAI's clients send them in JSON."""
    if not isinstance(calls, (list, tuple)):
        raise BadRequestError(f"Expected a list in {where}, found a {type(calls).__name__}.", field=where)
    checked = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRequestError(f"Expected a function with its name in {where}[{index}].", field=f"{where}[{index}]")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError) as error:
                raise BadRequestError(
                    f"Expected JSON in {where}[{index}].function.arguments, found: {error}.",
                    field=f"{where}[{index}].function.arguments",
                ) from error
        checked.append({**call, "function": {**function, "arguments": arguments}})
    return checked


def _content(content: object, *, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not content:
        raise BadRequestError(
            f"Expected a string or a list of text parts in {where}, found a {type(content).__name__}.", field=where
        )
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise BadRequestError(
                f"Expected a part of type 'text' in {where}[{index}], found {kind!r}; only text is served.",
                field=f"{where}[{index}].type",
            )
        text = part.get("text")
        if not isinstance(text, str):
            raise BadRequestError(
                f"Expected a string in {where}[{index}].text, found a {type(text).__name__}.",
                field=f"{where}[{index}].text",
            )
        texts.append(text)
    return "".join(texts)


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(message)


def _to_json(value: object, indent: int | None = None, **_: object) -> str:
    # jinja2's own filter escapes for HTML, which would change the text that the model reads.
    return json.dumps(value, ensure_ascii=False, indent=indent)


@lru_cache(maxsize=16)
def _names_asked(template: str) -> frozenset[str]:
    """The variables that a template reads and does not set."""
    _compile(template)  # says what is wrong with one that is no template
    return frozenset(find_undeclared_variables(_environment().parse(template)))


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment


@lru_cache(maxsize=16)
def _compile(template: str) -> Template:
    try:
        return _environment().from_string(template)
    except TemplateError as error:
        raise ConfigError(
            f"Expected a jinja2 chat template, found one that can't be compiled: {error}. Mend the tokenizer's "
            "chat_template, or remove it and configure `plain`."
        ) from error


def _unused_character(text: str) -> str:
    # `text` is a repr, in which these characters stand escaped where Python holds them unprintable: look for both.
    for code in range(0xE000, 0xF900):
        if chr(code) not in text and f"\\u{code:04x}" not in text:
            return chr(code)
    raise BadRequestError("Expected text, found every private-use character of Unicode.", field="messages")


def _replace(value: Any, marks: Mapping[str, str]) -> Any:
    """`value` with every special string in it replaced, however deep: names and tool calls reach the template too."""
    if isinstance(value, str):
        for token, mark in marks.items():
            value = value.replace(token, mark)
        return value
    if isinstance(value, Mapping):
        return {_replace(key, marks): _replace(item, marks) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace(item, marks) for item in value]
    return value
