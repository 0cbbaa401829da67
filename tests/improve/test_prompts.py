"""The drift of prompts: what is not another population raises no alarm, what is does, and it is said how large it is."""

from __future__ import annotations

import math
import random

import pytest

from aifactory.improve.prompts import WATCHED, PromptSequence, share_index, stability_index
from aifactory.workshop.prompt_languages import identify_languages

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


def asked_in(generator: random.Random, number: int, german: float) -> list[tuple[str, str]]:
    """Prompts of one population of words, a share of them in another language."""
    said = []
    for prompt in prompts(generator, number):
        is_german = generator.random() < german
        said.append((prompt, "de" if is_german else "en"))
    return said


def in_languages(
    asked: list[tuple[str, str]], seed: int, *, of: tuple[str, ...], confidence: float = 0.9
) -> PromptSequence:
    sequence = PromptSequence(reference=100, confidence=confidence, of=of)
    for number, (prompt, language) in enumerate(asked):
        sequence.add(f"cmpl-{seed}-{number}", prompt, language)
    return sequence


@pytest.mark.parametrize("of", [("language",), ("distance",), WATCHED])
def test_each_way_of_looking_keeps_its_error_rate_at_every_look(of: tuple[str, ...]) -> None:
    runs = 40
    alarms = [
        in_languages(asked_in(random.Random(seed), 300, 0.1), seed, of=of).drift is not None for seed in range(runs)
    ]

    print(f"{', '.join(of)}: {sum(alarms) / runs:.3f} false alarms, looked at after each of 200 prompts, 0.1 allowed")
    assert sum(alarms) / runs <= 0.1 + 2 * math.sqrt(0.09 / runs)


def test_another_share_of_a_language_is_found_by_that_alone_and_named() -> None:
    found = []
    for seed in range(6):
        generator = random.Random(seed)
        asked = [*asked_in(generator, 200, 0.05), *asked_in(generator, 300, 0.4)]
        sequence = in_languages(asked, seed, of=WATCHED)
        blind = in_languages(asked, seed, of=("length", "trigrams", "distance"))
        found.append(sequence.drift)
        assert blind.drift is None or blind.drift.at > 150

    told = [drift for drift in found if drift is not None and drift.at > 100]
    print(f"found after {sorted(drift.at - 100 for drift in told)} prompts of 300")
    assert len(told) >= 5
    for drift in told:
        assert max(drift.evidence, key=drift.evidence.__getitem__) == "language"
        then, now = drift.languages["de"]
        assert then < 0.15 < now
        assert "most of the evidence is by language" in str(drift) and "de " in str(drift)
        assert drift.stability["language"] > 0.1


def test_a_language_that_was_never_used_is_found_soon() -> None:
    generator = random.Random(0)
    asked = [*asked_in(generator, 150, 0.0), *[(prompt, "sw") for prompt, _ in asked_in(generator, 100, 0.0)]]

    drift = in_languages(asked, 0, of=("language",), confidence=0.99).drift

    assert drift is not None and 50 < drift.at < 80
    assert drift.languages["sw"][0] == 0


TOPICS = [WORDS[i : i + 5] for i in range(0, 30, 5)]


def test_a_new_topic_is_farther_from_all_that_was_asked_before() -> None:
    """Each prompt keeps to one of several topics; then one comes up that is a mixture of their words."""
    found = []
    for seed in range(6):
        generator = random.Random(seed)
        asked = [" ".join(generator.choices(generator.choice(TOPICS), k=6)) for _ in range(300)]
        asked += [" ".join(generator.choices(WORDS, k=6)) for _ in range(200)]
        sequence = in_languages([(prompt, "en") for prompt in asked], seed, of=("distance",))
        found.append(None if sequence.drift is None else sequence.drift.at)

    print(f"found after {sorted(each - 200 for each in found if each is not None)} prompts of 200")
    assert sum(each is not None and 200 < each < 300 for each in found) >= 5


def test_prompts_without_a_language_are_watched_in_the_other_ways() -> None:
    sequence = PromptSequence(reference=50, confidence=0.999)
    for number, prompt in enumerate(prompts(random.Random(0), 80)):
        sequence.add(f"cmpl-{number}", prompt)

    assert sequence.number == 30 and set(sequence._watches) == {"length", "trigrams", "distance"}


def test_the_shares_of_names_are_compared_by_their_index() -> None:
    before = ["en"] * 95 + ["de"] * 5

    assert share_index(before, before) == 0
    assert share_index(before, ["en"] * 90 + ["de"] * 10) < 0.1 < share_index(before, ["en"] * 60 + ["de"] * 40)
    assert math.isfinite(share_index(before, ["sw"] * 100))


def test_the_languages_of_prompts_are_those_of_the_model_that_filters_rows() -> None:
    texts = ["Where is the nearest railway station, please?", "Wo ist hier bitte der nächste Bahnhof?", "", "\ud800"]

    assert identify_languages(texts)[:3] == ["en", "de", "und"]
    assert len(identify_languages(texts)) == 4 and identify_languages([]) == []


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
