"""Texts of words that nobody else says, and copies of them in which some are others."""

from __future__ import annotations

import random


def words(rng: random.Random, count: int) -> list[str]:
    return [f"w{rng.randrange(10**6)}" for _ in range(count)]


def replaced(rng: random.Random, text: str, number: int) -> str:
    """A text with other words in a few places."""
    said = text.split()
    for at in rng.sample(range(len(said)), number):
        said[at] = f"v{rng.randrange(10**6)}"
    return " ".join(said)
