"""The section `runtime.gateway`: who may ask the endpoint, and what that costs them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

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

    def money_for(self, *, prompt_tokens: int, answer_tokens: int) -> float:
        """What so many tokens cost."""
        prompt = prompt_tokens * self.price_per_million_prompt_tokens
        return (prompt + answer_tokens * self.price_per_million_answer_tokens) / 1e6
