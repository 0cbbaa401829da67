"""The drift of prompts: what is not another population raises no alarm, what is does, and it is said how large it is."""

from __future__ import annotations

import math
import random

import pytest

from aifactory.improve.prompts import PromptSequence, stability_index

WORDS = [
    f"{stem}{end}" for stem in ("mor", "tel", "kas", "fin", "bul", "ran") for end in ("a", "ing", "ed", "ous", "en")
]


def prompts(generator: random.Random, number: int, words: list[str] = WORDS, *, most: int = 20) -> list[str]:
    return [" ".join(generator.choices(words, k=generator.randint(3, most))) for _ in range(number)]


def alarm_after(asked: list[str], seed: int, *, confidence: float = 0.9) -> int | None:
    sequence = PromptSequence(reference=100, confidence=confidence)
    for number, prompt in enumerate(asked):
        sequence.add(f"cmpl-{seed}-{number}", prompt)
    return None if sequence.drift is None else sequence.drift.at


def test_prompts_of_one_population_raise_an_alarm_no_more_often_than_is_said() -> None:
    runs = 50
    alarms = [alarm_after(prompts(random.Random(seed), 300), seed) is not None for seed in range(runs)]

    # By two standard errors of so many runs at most.
    print(f"{sum(alarms) / runs:.3f} false alarms, 0.1 allowed")
    assert sum(alarms) / runs <= 0.1 + 2 * math.sqrt(0.09 / runs)


@pytest.mark.parametrize(("words", "most"), [([w[::-1] for w in WORDS], 20), (WORDS, 60), (WORDS[:6], 20)])
def test_other_words_other_lengths_and_fewer_words_are_found(words: list[str], most: int) -> None:
    found = []
    for seed in range(6):
        generator = random.Random(seed)
        asked = [*prompts(generator, 300), *prompts(generator, 300, words, most=most)]
        found.append(alarm_after(asked, seed))

    print(f"found after {sorted(each - 200 for each in found if each is not None)} prompts of 300")
    assert sum(each is not None and each > 200 for each in found) >= 5


def test_the_index_says_how_far_apart_two_populations_are() -> None:
    generator = random.Random(0)
    base = [generator.gauss(0, 1) for _ in range(2000)]

    def index(shift: float) -> float:
        return stability_index(base, [generator.gauss(shift, 1) for _ in range(2000)])

    assert index(0) < 0.02 < index(0.25) < 0.1 < index(0.7)


def test_prompts_of_any_kind_are_looked_at() -> None:
    strange = ["", "a", "\ud800", "\U0001f600" * 5000, "x" * 100_000, "\0\0\0", "مرحبا بالعالم", " \n\t "]
    sequence = PromptSequence(reference=50, confidence=0.9)
    for number in range(200):
        sequence.add(f"cmpl-{number}", strange[number % len(strange)])

    assert sequence.number == 150
    assert sequence.won < 10
