"""Routing: who answers a request, by the name that it asks for, by weight and by the size of its prompt; and who where that one can't."""

from __future__ import annotations

from collections.abc import Sequence

from aifactory.config.routing import OUTSIDE, Route
from aifactory.errors import CapacityError
from aifactory.records.identity import share_of
from aifactory.serve.bodies import ChatBody, CompletionBody
from aifactory.serve.wire import StatusError

_BYTES_PER_ID = 4
_ELSEWHERE = (404, 500, 502, 503, 504)
"""Statuses with which another one may do better."""
_OF_THE_GATEWAY = ("keys_unavailable", "limits_unavailable", "shutting_down")
_TOO_LONG = "context_length_exceeded"


def targets(routes: Sequence[Route], body: CompletionBody | ChatBody, identity: str) -> list[str]:
    """Who is asked, in this order; what the body names where no route fits."""
    size = prompt_bytes(body)
    for route in routes:
        fits = route.min_prompt_bytes <= size and (route.max_prompt_bytes is None or size <= route.max_prompt_bytes)
        if route.model == body.model and fits:
            return list(dict.fromkeys([_drawn(route, identity), *route.fallback]))
    return [body.model]


def prompt_bytes(body: CompletionBody | ChatBody) -> int:
    """The size of a prompt without a tokenizer: bytes of text, and 4 for each token id."""
    if isinstance(body, ChatBody):
        return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts_of(body))
    return sum(
        len(prompt.encode("utf-8", "surrogatepass")) if isinstance(prompt, str) else _BYTES_PER_ID * len(prompt)
        for prompt in body.prompts
    )


def texts_of(body: CompletionBody | ChatBody) -> list[str]:
    """The texts that a request holds: prompts, or what messages say."""
    if not isinstance(body, ChatBody):
        return [prompt for prompt in body.prompts if isinstance(prompt, str)]
    found: list[str] = []
    for message in body.messages:
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"text": content}]
        found += [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return found


def may_do_better(error: Exception) -> bool:
    """Whether somebody else may answer what ended with this."""
    if isinstance(error, CapacityError):
        return True
    if not isinstance(error, StatusError) or error.code in _OF_THE_GATEWAY:
        return False
    return error.status in _ELSEWHERE or error.code == _TOO_LONG


def is_outside(name: str) -> bool:
    """Whether it is an endpoint elsewhere."""
    return name.startswith(OUTSIDE)


def _drawn(route: Route, identity: str) -> str:
    at = share_of(identity, salt=f"route {route.model}") * sum(target.weight for target in route.to)
    for target in route.to:
        at -= target.weight
        if at < 0:
            return target.model
    return route.to[-1].model
