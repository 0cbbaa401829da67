"""Corpora that tests make: seeded text in which it is plain what a model knows.

A topic is a set of words. A document keeps to one topic, so its beginning tells what follows; a model that was taught
some topics knows nothing of the words of the others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

_SYLLABLES = ("ka", "lo", "mi", "ne", "pu", "ra", "sho", "ti", "vu", "we", "xa", "yo", "ze", "dri", "fla", "gno")


def topic_words(topic: int, *, count: int = 24) -> list[str]:
    """The words of a topic; two topics share none, since each marks its own."""
    generator = random.Random(topic)
    mark = _SYLLABLES[topic % len(_SYLLABLES)] + _SYLLABLES[topic * 7 % len(_SYLLABLES)]
    return [mark + "".join(generator.choices(_SYLLABLES, k=2)) + str(i % 10) for i in range(count)]


def document(topic: int, number: int, *, lines: int = 30) -> str:
    """A text of one topic: runs of six of its words, each in a fixed order that begins anywhere, with no line between."""
    generator = random.Random(topic * 100_003 + number)
    words = topic_words(topic)
    text = []
    for _ in range(lines):
        start = generator.randrange(len(words))
        text.append(" ".join(words[(start + i) % len(words)] for i in range(6)) + ".")
    return " ".join(text)


def write_topics(folder: Path, topics: Sequence[int], *, documents: int, lines: int = 30) -> Path:
    """Write `documents` texts of each topic below `folder`."""
    for topic in topics:
        for number in range(documents):
            file = folder / f"topic{topic:03d}" / f"{number:03d}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(document(topic, number, lines=lines), encoding="utf-8")
    return folder
