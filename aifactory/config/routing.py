"""Routes of the gateway: which model answers what was asked for, and who answers where it can't."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from aifactory.config.section import Section

OUTSIDE = "outside:"
"""Before the name of an endpoint elsewhere, where a model is named."""
OutsideName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
ModelName = Annotated[str, Field(min_length=1, max_length=200)]


class Outside(Section):
    """An endpoint of OpenAI's form elsewhere. What it answers is no release's: it is not kept, so nobody can say something of it."""

    url: str = Field(pattern=r"^https?://")
    """Base URL, such as https://api.example.org/v1. No default."""
    model: ModelName
    """What it is asked for. No default."""
    api_key: str = ""
    """What it is sent as Bearer; `${NAME}` is read from the environment of the replicas. Default: nothing."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Longest time to its first word, and from one to the next, seconds. Default: 60."""


class Target(Section):
    """One of those who answer."""

    model: ModelName
    """A name that is served here (the factory's, a release's, an adapter's), or `outside:` and a name in `outside`. No default."""
    weight: float = Field(default=1.0, gt=0)
    """Its share of the requests is this over the sum of all. Default: 1."""


class Route(Section):
    """Who answers requests for one name. The first route that fits a request is taken."""

    model: ModelName
    """What the request asks for; it need not be the name of anything. No default."""
    to: tuple[Target, ...] = Field(min_length=1, max_length=16)
    """Who answers, by chance and weight; the same request always the same. No default."""
    fallback: tuple[ModelName, ...] = Field(default=(), max_length=16)
    """Who answers where that one is not served, has no room, fails before its first word, or has too short a context; in this order.
    Default: nobody."""
    min_prompt_bytes: int = Field(default=0, ge=0)
    """Of prompts at least so long: UTF-8, all of them or all messages; a token id counts 4. Default: 0."""
    max_prompt_bytes: int | None = Field(default=None, ge=0)
    """Of prompts at most so long. Default: any."""

    @model_validator(mode="after")
    def _least_before_most(self) -> Route:
        if self.max_prompt_bytes is not None and self.max_prompt_bytes < self.min_prompt_bytes:
            raise ValueError(
                f"expected min_prompt_bytes up to max_prompt_bytes, found {self.min_prompt_bytes} and {self.max_prompt_bytes}; "
                "turn them round"
            )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """All who may answer."""
        return (*(target.model for target in self.to), *self.fallback)
