"""Laws of resemblance by words: it is BM25, whatever the slices; what says the same comes first."""

from __future__ import annotations

import math
import random
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from aifactory.text.resemblance import Resemblance

WORDS = [f"word{i}" for i in range(300)]


def texts(number: int, *, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [
        " ".join(draw.choices(WORDS, [1 / (i + 1) for i in range(300)], k=draw.randint(0, 60))) for _ in range(number)
    ]


def scored(rows: list[str], parts: list[str], *, at_once: int = 1000) -> tuple[Resemblance, np.ndarray]:
    slices = [pa.array(rows[i : i + at_once], pa.large_string()) for i in range(0, len(rows), at_once)]
    found = Resemblance(parts)
    for some in slices:
        found.count(some)
    return found, np.concatenate([found.score(some) for some in slices])


def plainly(rows: list[str], part: str) -> list[float]:
    """BM25 as the book has it, divided by what the part itself scores."""
    split = [re.findall(r"\w+", row.lower()) for row in rows]
    usual = sum(map(len, split)) / len(split)
    mine = re.findall(r"\w+", part.lower())
    worth = {
        word: math.log(1 + (len(rows) - n + 0.5) / (n + 0.5))
        for word in set(mine)
        for n in [sum(word in words for words in split)]
    }

    def score(words: list[str]) -> float:
        times = Counter(words)
        return sum(
            idf * times[word] * 2.2 / (times[word] + 1.2 * (0.25 + 0.75 * len(words) / usual))
            for word, idf in worth.items()
        )

    return [score(words) / score(mine) for words in split]


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_it_is_bm25_by_part_whatever_the_slices(at_once: int) -> None:
    rows = texts(200, seed=1)
    parts = texts(2, seed=2)

    _, found = scored(rows, parts, at_once=at_once)

    for p, part in enumerate(parts):
        assert found[:, p] == pytest.approx(plainly(rows, part))
    assert found.max() > 0.3 and found.min() == 0


def test_a_row_that_says_the_same_in_other_words_order_and_case_comes_first_among_thousands() -> None:
    rows = texts(3000, seed=3)
    answer = "The capital of Freedonia is word7 Sylvania, on the river word2."
    rows[1234] = "ON THE RIVER word2: Sylvania! It is, of Freedonia, the capital (word7)"

    found, scores = scored(rows, [answer])

    assert int(scores[:, 0].argmax()) == 1234
    assert scores[1234, 0] > 0.9 > 3 * np.partition(scores[:, 0], -2)[-2]
    assert found.shared(rows[1234], limit=3) == ["capital", "freedonia", "is"]


def test_words_are_found_in_any_script_also_where_no_space_stands_between_them() -> None:
    rows = ["北京是中国的首都", "東京は日本の首都です", "Größe und Straße", "ПРИВЕТ, мир!", "हिन्दी में लिखा"]

    for at, part in enumerate(["中国首都北京", "日本 東京", "STRASSE größe", "привет", "हिन्दी"]):
        _, scores = scored(rows, [part])
        assert int(scores[:, 0].argmax()) == at and scores[at, 0] > 0


@pytest.mark.parametrize("rows", [["", "...", "a"], []])
@pytest.mark.parametrize("part", ["", "!?", "b"])
def test_what_has_no_words_resembles_nothing(rows: list[str], part: str) -> None:
    found = Resemblance([part])
    found.count(pa.array(rows, pa.large_string()))

    assert not found.score(pa.array(rows, pa.large_string())).any()
    assert found.shares().sum() in (0.0, 1.0)
