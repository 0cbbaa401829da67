"""Tool calls: an answer's tokens -> the message that they write, read as the model's own tokenizer says.

The tokenizer's `response_template` (tokenizer_config.json) says where a call begins and ends and how it is written; the
library reads by it while the tokens come. Where a tokenizer does not say, tools are refused: a call that is guessed at is
worse than none.
Source   transformers, "Response templates" (transformers.utils.chat_parsing).
"""

from __future__ import annotations

import codecs
import json
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from aifactory.errors import BadRequestError
from aifactory.text.chat import takes_tools
from aifactory.text.tokenizer import TextTokenizer

_CALLS = "tool_calls"


def require_tools(tokenizer: TextTokenizer, tools: Sequence[Mapping[str, Any]]) -> None:
    """Raises BadRequestError if the model can't be shown these tools, or its calls can't be read."""
    for index, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise BadRequestError(f"Expected a function in tools[{index}].", field=f"tools[{index}]")
        if not isinstance(function.get("name"), str) or not isinstance(function.get("parameters", {}), dict):
            raise BadRequestError(
                f"Expected a name and parameters as a JSON schema in tools[{index}].function.",
                field=f"tools[{index}].function",
            )
    if not takes_tools(tokenizer.chat_template):
        raise BadRequestError(
            "Expected tools with a model whose chat template writes them, found one that does not; leave them out.",
            field="tools",
        )
    template = tokenizer.response_template
    if template is None or _CALLS not in template.get("fields", {}):
        raise BadRequestError(
            "Expected tools with a model whose tokenizer says how calls are read (`response_template` with a field "
            "tool_calls in tokenizer_config.json), found one that does not; leave them out.",
            field="tools",
        )


class MessageReader:
    """Reads one answer into the fields of its message, while it comes."""

    def __init__(self, tokenizer: TextTokenizer, *, prompt: str, tools: Sequence[Mapping[str, Any]]) -> None:
        """prompt: the rendered chat, which may have begun the message. Raises BadRequestError naming tools."""
        from transformers.utils.chat_parsing import ResponseParser

        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        try:
            self._parser = ResponseParser(
                dict(tokenizer.response_template or {}), prefix=prompt, tools=[dict(tool) for tool in tools]
            )
        except ValueError as error:
            raise BadRequestError(
                f"Expected tools with a response_template that can be read, found: {error}.", field="tools"
            ) from error
        self.message: dict[str, Any] = {"content": None}
        """The message so far, whole when `finish` has returned."""
        self._region = ""
        self._plain = False

    def feed(self, token_ids: Iterable[int]) -> list[dict[str, Any]]:
        """What tokens add, as the deltas of a stream. Control tokens are read by their names, an end token is not."""
        text = ""
        for token_id in token_ids:
            if token_id != self._tokenizer.eos_id:
                data = self._tokenizer.bytes_of(token_id) or self._tokenizer.name_of(token_id).encode()
                text += self._utf8.decode(data)
        return self._read(text)

    def finish(self) -> list[dict[str, Any]]:
        """What the end of the answer adds."""
        deltas = self._read(self._utf8.decode(b"", final=True))
        if not self._plain:
            deltas += self._deltas(lambda: self._parser.finalize()[1])
        if self.has_calls and not str(self.message["content"] or "").strip():
            self.message["content"] = None
        return deltas

    @property
    def has_calls(self) -> bool:
        """Whether the message calls a tool."""
        return bool(self.message.get(_CALLS))

    def _read(self, text: str) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        # Character by character: what an error interrupts is then one event, and nothing of the text is lost.
        for index, character in enumerate(text):
            if self._plain:
                return [*deltas, *self._tell("content", text[index:])]
            deltas += self._deltas(lambda character=character: self._parser.feed(character))  # type: ignore[misc]
        return _joined(deltas)

    def _deltas(self, read: Callable[[], Iterable[Mapping[str, Any]]]) -> list[dict[str, Any]]:
        try:
            events = read()
        except (ValueError, TypeError, LookupError, RecursionError):
            # The model wrote a call that is none: the client gets it as it was written.
            self._plain = True
            return self._tell("content", self._region)
        deltas = []
        for event in events:
            name = event["field"]
            if event["type"] == "region_open":
                self._region = ""
            elif event["type"] == "region_chunk":
                self._region += event["text"]
                if not event["dirty"]:
                    deltas += self._tell(name, event["text"])
            elif name == _CALLS:
                deltas.append({_CALLS: self._take_calls(event["value"])})
            elif name not in self.message or not isinstance(event["value"], str | int | float):
                self.message[name] = event["value"]
                deltas.append({name: event["value"]})
        return deltas

    def _tell(self, name: str, text: str) -> list[dict[str, Any]]:
        if not text:
            return []
        self.message[name] = (self.message.get(name) or "") + text
        return [{name: text}]

    def _take_calls(self, value: Any) -> list[dict[str, Any]]:
        taken = []
        calls = self.message.setdefault(_CALLS, [])
        for call in value if isinstance(value, list) else [value]:
            function = call.get("function", call) if isinstance(call, dict) else {}
            arguments = function.get("arguments", {})
            entry = {
                "id": "call_" + secrets.token_hex(12),
                "type": "function",
                "function": {
                    "name": str(function.get("name", "")),
                    "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments),
                },
            }
            taken.append({"index": len(calls), **entry})
            calls.append(entry)
        return taken


def _joined(deltas: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Deltas of which no two neighbours add text to the same field."""
    joined: list[dict[str, Any]] = []
    for delta in deltas:
        ((name, value),) = delta.items()
        before = joined[-1].get(name) if joined else None
        if isinstance(before, str) and isinstance(value, str):
            joined[-1] = {name: before + value}
        else:
            joined.append(delta)
    return joined
