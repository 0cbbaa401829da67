"""Moments: what a client saw of the tokens of its requests, and what it asks. Knows neither an engine nor HTTP."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class Seen:
    """The moments, in seconds, of one run."""

    first: list[float] = field(default_factory=list)
    """From sending a request, or from when it was to be sent, to its first token."""
    between: list[float] = field(default_factory=list)
    """From each token of an answer to its next."""
    num_tokens: int = 0
    seconds: float = 0.0
    """From the first request to the last token."""
    answers: dict[int, list[int]] = field(default_factory=dict)
    """Token ids, by the number of the prompt."""
    failed: list[str] = field(default_factory=list)
    """Of each request that had no whole answer, why."""
    client_cpu: float = 0.0
    """CPU seconds of the client itself for each second of the run; 0 where it shares a process with the engine."""

    def add(self, count: int, *, seconds: float, first: bool) -> None:
        """So many tokens have come together, so long after the request or the token before."""
        (self.first if first else self.between).append(seconds)
        # What was held back came with the last one: no time passed between them that a client could see.
        self.between.extend([0.0] * (count - 1))
        self.num_tokens += count

    @property
    def tokens_per_s(self) -> float:
        """Of answers, all requests together."""
        return self.num_tokens / self.seconds

    def figures(self, name: str) -> dict[str, float]:
        """Tokens/s, and percentiles of the moments in milliseconds, by their keys."""
        found = {f"tokens_per_s_{name}": self.tokens_per_s}
        for what, moments in (("ttft", self.first), ("between", self.between)):
            found |= {f"{what}_ms_p{int(100 * p)}_{name}": 1e3 * percentile(moments, p) for p in (0.5, 0.99)}
        return found

    def as_json(self) -> dict[str, Any]:
        """For another process."""
        return asdict(self)


FIRST_LETTER, FIRST_OF_MANY = 0x4E00, 0x20000
"""Token 1 of the benchmarks' tokenizers, of up to MOST_LETTERS tokens and of more: letters without a surrogate between them."""
MOST_LETTERS = 20_000


def token_of(letter: str) -> int:
    """The token whose text is this letter."""
    code = ord(letter)
    return code - (FIRST_OF_MANY if code >= FIRST_OF_MANY else FIRST_LETTER) + 1


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them don't exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 100) * len(ordered) // 100) - 1)]


def random_prompts(number: int, length: int, *, seed: int) -> list[list[int]]:
    """So many prompts, all different. Their ids, 1 to 255, are in every tokenizer, and none is a control token."""
    rng = random.Random(seed)
    return [[rng.randrange(1, 256) for _ in range(length)] for _ in range(number)]
