"""The section `runtime.gateway`: who may ask the endpoint, and what that costs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from aifactory.config.functions import FunctionName
from aifactory.config.routing import OUTSIDE, Outside, OutsideName, Route
from aifactory.config.section import Section


class Gateway(Section):
    """Who is let in. Keys and their limits are made by `aifactory keys`; they stand in the database."""

    keys: Literal["optional", "required"] = "optional"
    """required: whoever has no good key is answered 401. optional: whoever sends none asks as `anonymous`, a key that is no good is
    401 all the same; only where the endpoint binds an address that no other machine reaches. Default: optional."""
    keys_refresh_s: float = Field(default=1.0, gt=0, le=60)
    """So long what a replica has read of a key is believed, seconds: one that was revoked, or limited, is so everywhere after
    that. Default: 1."""
    price_per_million_prompt_tokens: float = Field(default=0.0, ge=0)
    """What a million tokens of prompts cost whoever asks, in the currency of `runtime.site`; for budgets of money. Default: 0."""
    price_per_million_answer_tokens: float = Field(default=0.0, ge=0)
    """The same of answers. Default: 0."""

    cache_bytes: int = Field(default=0, ge=0)
    """Memory in which a replica keeps whole answers to requests that are always answered alike (temperature 0, or a seed), for the
    same key or team and the same release. Default: 0, none is kept."""
    cache_max_age_s: float = Field(default=3600.0, gt=0)
    """How long it keeps one at most, seconds. Default: 3600."""
    prompt_guards: tuple[FunctionName, ...] = Field(default=(), max_length=16)
    """Functions of yours (`package.module:name`) that see each prompt before it is answered: `guard(text, asked)` returns None, or
    why it is refused (400, `content_filter`). Of a chat they see the rendered prompt. Importable on the replicas. Default: none."""
    answer_guards: tuple[FunctionName, ...] = Field(default=(), max_length=16)
    """The same for answers: one that is refused is sent and kept without its text, with the finish reason `content_filter`. Streams
    then wait for the whole answer. Default: none."""
    mask_answers: bool = False
    """Whether personal data and secrets in answers are masked before they are sent, as `<EMAIL>` and the like (but names). Streams
    then wait for the whole answer, and calls of tools in which there are any are refused. Default: false."""
    mask_log: bool = False
    """Whether they are masked in prompts and answers before those are kept, and with them in what retrains learn from.
    Default: false."""

    outside: Mapping[OutsideName, Outside] = Field(default={}, max_length=16)
    """Endpoints of OpenAI's form elsewhere, by the names that routes give them. Default: none."""
    routes: tuple[Route, ...] = Field(default=(), max_length=64)
    """Who answers texts and chats that ask for a name, other than who has that name. Default: none."""

    @model_validator(mode="after")
    def _routes_lead_somewhere(self) -> Gateway:
        named = {name for route in self.routes for name in route.names if name.startswith(OUTSIDE)}
        unknown = sorted(named - {OUTSIDE + name for name in self.outside})
        if unknown:
            known = ", ".join(sorted(self.outside)) or "none"
            raise ValueError(f"expected a name in outside ({known}), found {unknown[0]!r} in routes; add it there")
        unused = sorted({OUTSIDE + name for name in self.outside} - named)
        if unused:
            raise ValueError(f"expected a route to each endpoint in outside, found none to {unused[0]!r}; delete it")
        if named and (self.answer_guards or self.mask_answers):
            raise ValueError(
                "expected answer_guards and mask_answers without routes to outside, whose answers are passed on as they come; "
                "found both"
            )
        return self

    def money_for(self, *, prompt_tokens: int, answer_tokens: int) -> float:
        """What so many tokens cost."""
        prompt = prompt_tokens * self.price_per_million_prompt_tokens
        return (prompt + answer_tokens * self.price_per_million_answer_tokens) / 1e6
