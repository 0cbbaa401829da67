"""The engine as others see it: values in, deltas out. Imports no torch, so that a gateway can hold these types."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from aifactory.errors import BadRequestError

FinishReason = Literal["stop", "length", "cancelled", "error"]

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1_024


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the tokens of an answer are chosen."""

    max_tokens: int = 16
    """Longest answer, tokens; the token that ends it counts."""
    temperature: float = 1.0
    """0 is greedy: the most probable token always."""
    top_p: float = 1.0
    """Draw from the smallest set of most probable tokens that holds this share of the probability, in (0, 1]."""
    top_k: int = 0
    """Draw from this many most probable tokens; 0 is no limit. Applied before top_p."""
    seed: int | None = None
    """The i-th draw depends on the seed and on i only. None: one is taken at random."""
    stop: tuple[str, ...] = ()
    """Strings at which the answer ends; they are not part of it."""

    def __post_init__(self) -> None:
        """Raises BadRequestError naming the field."""
        _require_int(self.max_tokens, "max_tokens", low=1)
        _require_number(self.temperature, "temperature", low=0.0, high=100.0)
        _require_number(self.top_p, "top_p", low=0.0, high=1.0)
        if self.top_p == 0.0:
            raise BadRequestError(
                "Expected top_p above 0, found 0. For greedy answers set temperature to 0.", field="top_p"
            )
        _require_int(self.top_k, "top_k", low=0)
        if self.seed is not None:
            _require_int(self.seed, "seed", low=-(2**63), high=2**64 - 1)
        if not isinstance(self.stop, tuple) or not all(isinstance(string, str) for string in self.stop):
            raise BadRequestError(f"Expected a tuple of strings in stop, found {self.stop!r}.", field="stop")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise BadRequestError(
                f"Expected at most {MAX_STOP_STRINGS} stop strings, found {len(self.stop)}.", field="stop"
            )
        for index, string in enumerate(self.stop):
            if not 1 <= len(string) <= MAX_STOP_CHARACTERS:
                raise BadRequestError(
                    f"Expected 1 to {MAX_STOP_CHARACTERS} characters in stop[{index}], found {len(string)}.",
                    field=f"stop[{index}]",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A prompt, as token ids with its bos, and how to go on from it."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What was added to an answer since the delta before. The texts of all of them add up to the answer."""

    text: str
    """Whole characters, and no part of a stop string."""
    token_ids: tuple[int, ...]
    """Every token sampled since, also those without text: the end token, a stop string's, a half character's."""
    finish_reason: FinishReason | None = None
    """None while the answer goes on; the one delta with a reason is the last."""
    error: str | None = None
    """What went wrong, with finish_reason "error" only."""


OnDelta = Callable[[Delta], None]
"""Called in the engine's thread: it must return at once. If it raises, its request is dropped and nothing else."""


class Engine(Protocol):
    """Many requests at once on one model. Every method may be called from any thread."""

    @property
    def context_length(self) -> int:
        """Most tokens of a prompt and its answer together."""
        ...

    @property
    def num_unfinished(self) -> int:
        """Requests that were accepted and whose last delta is still to come."""
        ...

    def submit(self, request: GenerationRequest, on_delta: OnDelta) -> None:
        """Accept a request and return; its deltas follow.

        Raises  BadRequestError if it can never be served (prompt_ids, max_tokens, id in use),
                CapacityError if the queue is full or the engine is closing.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End a request soon with a "cancelled" delta; nothing happens if it is unknown or has ended."""
        ...

    def close(self, drain_timeout_s: float) -> None:
        """Accept no more, wait for what is in flight at most so long, cancel the rest, free the memory."""
        ...


def _require_int(value: object, name: str, *, low: int, high: int | None = None) -> None:
    limits = f"of at least {low}" if high is None else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise BadRequestError(f"Expected an integer {limits} in {name}, found {value!r}.", field=name)


def _require_number(value: object, name: str, *, low: float, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:  # type: ignore[operator]
        raise BadRequestError(f"Expected a number from {low:g} to {high:g} in {name}, found {value!r}.", field=name)
