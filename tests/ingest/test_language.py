"""Laws of languages: codes and probabilities are those of py3langid for each text alone, and rules go by them."""

from __future__ import annotations

import random
import unicodedata
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pytest
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from aifactory.config import LanguageStep
from aifactory.errors import ConfigError
from aifactory.ingest.language import UNDETERMINED, language_codes, language_verdicts, languages, ranks

# Article 1 of the Universal Declaration of Human Rights, or its first sentence.
SENTENCES = {
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de conscience.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos, dotados como están de razón y conciencia.",
    "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi.",
    "tr": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью.",
    "el": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "ar": "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق، وقد وهبوا عقلاً وضميراً.",
    "he": "כל בני אדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "th": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "zh": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "ka": "ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით.",
}
ODD = [
    *("", " ", "\n", "\x00", "a", "é", "😀", "\ufeff", "1234 5678", "\x80\x9f", "{}[]();", "Ω", "İI", "ß", "ǅ", "ⅷ"),
    *(
        "ALL CAPITALS ARE READ AS SMALL LETTERS",
        "GRÖSSE UND WÜRDE",
        "ВСЕ ЛЮДИ",
        "İSTANBUL'DA",
        "ΣΊΣΥΦΟΣ",
        "ABC 日本",
        "A",
        "Mc DONALD",
    ),
    *(
        "e\u0301te\u0301",
        "\u1100\u1161\u11a8",
        "a\u0300" * 700,
        "\u0344\u0301",
        "x" * 5000,
        "of the " * 900,
        "日" * 900,
    ),
    *("def f(x):\n    return x + 1\n", "<p>Hello</p>", "https://example.org/?q=1", "2024-01-01T00:00:00Z ERROR"),
]


@lru_cache(maxsize=1)
def identifier():
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def cut(text, sample_bytes):
    """The whole characters of the first bytes."""
    return text.encode()[: sample_bytes or None].decode(errors="ignore")


def texts_of(seed, count):
    rng = random.Random(seed)

    def text():
        parts = [rng.choice([*SENTENCES.values(), rng.choice(ODD)]) for _ in range(rng.choice([1, 1, 2, 5, 20]))]
        whole = rng.choice([" ", "\n", ""]).join(parts)
        start = rng.randrange(len(whole) + 1)
        whole = whole[start : start + rng.choice([1, 3, 10, 50, 300, 5000])]
        return rng.choice([str, str, str.upper, str.title, lambda t: unicodedata.normalize("NFD", t)])(whole)

    return [*SENTENCES.values(), *ODD, *(text() for _ in range(count))]


def knows_nothing(text):
    """Whether py3langid gives all languages the same probability."""
    return (
        len({probability for _, probability in identifier().rank(text)}) <= 2 and identifier().classify(text)[1] < 0.02
    )


@pytest.mark.parametrize("sample_bytes", [0, 1, 2, 3, 5, 64, 1024])
def test_codes_and_probabilities_are_those_of_py3langid(sample_bytes):
    texts = texts_of(sample_bytes, 400)
    found = languages(pa.array(texts), sample_bytes=sample_bytes)

    named = 0
    for text, code, probability in zip(texts, found.codes.to_pylist(), found.probability_N.tolist(), strict=True):
        read = cut(text, sample_bytes)
        expected, confidence = identifier().classify(read)
        if code == UNDETERMINED:
            assert probability == 0
            assert knows_nothing(read), text
            continue
        named += 1
        assert probability == pytest.approx(confidence, abs=2e-4), text
        # Where two are equally probable the rounding decides.
        if code != expected:
            assert dict(identifier().rank(read))[code] == pytest.approx(confidence, abs=2e-4), text
    assert named > 0.5 * len(texts) or sample_bytes < 5


def test_the_languages_of_sentences_are_known():
    found = languages(pa.array(list(SENTENCES.values())))
    assert found.codes.to_pylist() == list(SENTENCES)
    assert (found.probability_N > 0.8).all()
    assert languages(pa.array(["", "\x00"])).codes.to_pylist() == [UNDETERMINED] * 2


def test_ranks_are_those_of_py3langid():
    texts = texts_of(7, 60)
    for text, ranked in zip(texts, ranks(pa.array(texts)), strict=True):
        expected = dict(identifier().rank(cut(text, 1024)))
        assert len(ranked) == len(expected)
        probabilities = [probability for _, probability in ranked]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1)
        assert dict(ranked) == pytest.approx(expected, abs=2e-4)


def test_what_is_said_of_a_text_depends_on_it_alone():
    texts = texts_of(8, 300)
    random.Random(8).shuffle(texts)

    def said(array):
        found = languages(array)
        return list(zip(found.codes.to_pylist(), found.probability_N.tolist(), strict=True))

    alone = [said(pa.array([text]))[0] for text in texts]
    for kind in (pa.string(), pa.large_string()):
        for start, stop in [(0, len(texts)), (0, 1), (1, 95), (90, 200), (33, 34), (9, 9)]:
            assert said(pa.array(texts, kind)[start:stop]) == alone[start:stop]
    assert said(pa.array(texts[::-1])) == alone[::-1]
    # More rows than are held at once, and more of them than lie in the cache.
    assert said(pa.array(texts * 14)) == alone * 14


def test_what_comes_after_the_sample_is_not_read():
    start = SENTENCES["en"] * 11
    assert len(start.encode()) > 1024
    one, other = (languages(pa.array([start + SENTENCES[code] * 40])) for code in ("ru", "zh"))
    assert one.codes[0].as_py() == "en"
    assert one.probability_N.tolist() == other.probability_N.tolist()
    assert languages(pa.array([start + SENTENCES["ru"] * 40]), sample_bytes=0).codes[0].as_py() == "ru"


@pytest.mark.parametrize("unit", ["é", "語", "😀"])
def test_a_sample_ends_where_a_character_ends(unit):
    text = SENTENCES["fr"] + unit * 50
    size = len(SENTENCES["fr"].encode())
    for more in range(9):
        (found,) = languages(pa.array([text]), sample_bytes=size + more).probability_N.tolist()
        whole = cut(text, size + more)
        assert [found] == languages(pa.array([whole]), sample_bytes=0).probability_N.tolist()


def test_figures_count_what_was_found_and_add_up():
    texts = texts_of(9, 200)
    whole = languages(pa.array(texts))
    parts = [languages(pa.array(texts[i : i + 37])).figures for i in range(0, len(texts), 37)]

    codes = whole.codes.to_pylist()
    assert whole.figures == {"rows": len(texts), **{f"language:{code}": codes.count(code) for code in sorted({*codes})}}
    assert whole.figures == {name: sum(part.get(name, 0) for part in parts) for name in whole.figures}
    assert languages(pa.array([], pa.string())).figures == {"rows": 0}


# ── rules ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_in_other_languages_and_uncertain_ones_break_their_rules():
    texts = texts_of(10, 300)
    found, verdicts = language_verdicts(pa.array(texts), keep=("en", "ja"), min_probability=0.8)

    assert verdicts.rules == ("language", "language_uncertain")
    rows = list(zip(found.codes.to_pylist(), found.probability_N.tolist(), strict=True))
    expected = [1 if code not in ("en", "ja") else 2 if probability < 0.8 else 0 for code, probability in rows]
    assert verdicts.broken_N.tolist() == expected
    assert set(expected) == {0, 1, 2}
    scores = [probability if broken else 0 for (_, probability), broken in zip(rows, expected, strict=True)]
    assert verdicts.score_N.tolist() == scores


def test_without_codes_all_languages_are_kept_and_without_a_bound_all_probabilities():
    texts = pa.array(texts_of(11, 100))
    assert not language_verdicts(texts)[1].broken_N.any()
    _, verdicts = language_verdicts(texts, min_probability=0.5)
    assert set(verdicts.broken_N.tolist()) == {0, 2}
    _, verdicts = language_verdicts(texts, keep=(UNDETERMINED,))
    assert set(verdicts.broken_N.tolist()) == {0, 1}


def test_a_code_that_the_model_does_not_know_is_named_with_those_that_it_does():
    with pytest.raises(ConfigError, match=r"found \['english', 'xx'\]; choose from .*, en, .*, und, .*, zh") as raised:
        language_verdicts(pa.array(["text"]), keep=("en", "xx", "english"))
    assert all(code in str(raised.value) for code in language_codes())
    assert {*identifier().labels, UNDETERMINED} == {*language_codes()}


def test_the_defaults_are_those_of_the_step():
    texts = pa.array(texts_of(12, 50))
    found, verdicts = language_verdicts(texts, **LanguageStep(step="language").model_dump(exclude={"step"}))
    default, plain = language_verdicts(texts)
    assert found.codes.equals(default.codes)
    assert np.array_equal(verdicts.broken_N, plain.broken_N)
