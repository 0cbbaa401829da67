"""Laws of the quality rules: verdict, rule, score and text are those of the reference library, row by row."""

from __future__ import annotations

import inspect
import json
import random
import re
import string
import textwrap
import unicodedata
from functools import lru_cache

import datatrove.pipeline.filters.c4_filters as reference_c4
import datatrove.pipeline.filters.fineweb_quality_filter as reference_fineweb
import datatrove.pipeline.filters.gopher_quality_filter as reference_quality
import datatrove.pipeline.filters.gopher_repetition_filter as reference_repetition
import pyarrow as pa
import pytest
from datatrove.data import Document

from aifactory.ingest.quality import (
    C4Quality,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
    c4_quality,
    fineweb_quality,
    gopher_quality,
    gopher_repetition,
)

SENTENCE_END = re.compile(r"""[.?!]["')\]}’”»›]*(?=\s|\Z)""")


def words_of(text, language=None):
    return text.split()


def sentences_of(text, language=None):
    """By the definition in the module's docstring."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    return pieces if pieces[-1].strip() else pieces[:-1]


@pytest.fixture(autouse=True)
def same_words_and_sentences(monkeypatch):
    """The reference with this module's definitions of a word and of a sentence."""
    for module in (reference_quality, reference_repetition, reference_fineweb):
        monkeypatch.setattr(module, "split_into_words", words_of)
    monkeypatch.setattr(reference_c4, "split_into_sentences", sentences_of)


def judged(reference_filter, text):
    """What the reference says: the rule that is broken, or None, and the text."""
    document = Document(text=text, id="0")
    result = reference_filter.filter(document)
    return (None if result is True else result[1].removeprefix("gopher_")), document.text


def array_of(texts, kind=None):
    return pa.array(texts, kind or pa.string())


def broken_rules(verdicts):
    return [verdicts.rules[b - 1] if b else None for b in verdicts.broken_N.tolist()]


def explain(texts, expected, found):
    wrong = [i for i in range(len(texts)) if expected[i] != found[i]]
    return "\n".join(f"{expected[i]!r} found {found[i]!r}: {texts[i]!r}"[:2000] for i in wrong[:3])


def check_quality(texts, params=None):
    params = params or GopherQuality()
    names = [name for name in GopherQuality.__slots__ if name != "stop_words"]
    reference = reference_quality.GopherQualityFilter(
        **{name: getattr(params, name) for name in names}, stop_words=list(params.stop_words)
    )
    expected = [judged(reference, text)[0] if text.split() else "short_doc" for text in texts]
    found = broken_rules(gopher_quality(array_of(texts), params))
    assert found == expected, explain(texts, expected, found)
    return expected


def check_repetition(texts, params=None):
    params = params or GopherRepetition()
    reference = reference_repetition.GopherRepetitionFilter(
        **{name: getattr(params, name) for name in GopherRepetition.__slots__}
    )
    expected = [judged(reference, text)[0] for text in texts]
    found = broken_rules(gopher_repetition(array_of(texts), params))
    assert found == expected, explain(texts, expected, found)
    return expected


def check_fineweb(texts, params=None):
    params = params or FineWebQuality()
    options = {name: getattr(params, name) for name in FineWebQuality.__slots__}
    reference = reference_fineweb.FineWebQualityFilter(**options | {"stop_chars": tuple(params.stop_chars)})
    expected = [judged(reference, text)[0] for text in texts]
    found = broken_rules(fineweb_quality(array_of(texts), params))
    assert found == expected, explain(texts, expected, found)
    return expected


def check_c4(texts, params=None):
    params = params or C4Quality()
    reference = reference_c4.C4QualityFilter(**{name: getattr(params, name) for name in C4Quality.__slots__})
    expected = [judged(reference, text) for text in texts]
    kept, verdicts = c4_quality(array_of(texts), params)
    kept.validate(full=True)
    found = list(zip(broken_rules(verdicts), kept.to_pylist(), strict=True))
    assert found == expected, explain(texts, expected, found)
    return [rule for rule, _ in expected]


CHECKS = {
    "gopher_quality": check_quality,
    "gopher_repetition": check_repetition,
    "fineweb_quality": check_fineweb,
    "c4_quality": check_c4,
}

# ── documents ─────────────────────────────────────────────────────────────────────────────────────────────────────────

SPACES = [c for c in map(chr, range(0x110000)) if c.isspace()]
BREAKS = ["\n", "\r\n", "\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
ODD_WORDS = [
    *(
        "...",
        "....",
        ".....",
        "......",
        "…",
        "……",
        "..",
        ". . .",
        "etc...",
        "so…",
        "#",
        "##",
        "#tag",
        "-",
        "--",
        "•",
        "-x",
        "•x",
    ),
    *(
        "—",
        "–",
        "«",
        "»",
        "“quoted”",
        "‘it’s’",
        '"said."',
        "'so!'",
        "(yes.)",
        "(no?)",
        "[end.]",
        "{x}",
        "}",
        "{",
        ".)",
        "!?",
        "?!",
    ),
    *(
        "[1]",
        "[23]",
        "[]",
        "[٣]",
        "[1",
        "1]",
        "[a]",
        "[edit]",
        "[citation needed]",
        "[Edit]",
        "[[2]]",
        "java[1]script",
        "word[4].",
    ),
    *(
        "terms",
        "of",
        "use",
        "Terms of Use",
        "privacy policy",
        "PRIVACY POLICY.",
        "coo\u212aie policy",
        "uses cookies",
        "use of cookies",
    ),
    *(
        "use coo\u212aies",
        "JavaScript",
        "javascrİpt",
        "javascript.",
        "lorem ipsum",
        "LOREM İPSUM",
        "Lorem",
        "ipsum",
        "cookie",
        "{",
    ),
    *(
        "日本語",
        "中文字符。",
        "一",
        "한국어",
        "ไทย",
        "हिन्दी।",
        "العربية؟",
        "кириллица",
        "ελληνικά",
        "ñandú",
        "e\u0301te\u0301",
        "Straße",
        "İ",
        "ß",
    ),
    *(
        "😀",
        "👩‍👩‍👧",
        "🇩🇪",
        "\u200b",
        "\ufeff",
        "\u00ad",
        "\x00",
        "\x07",
        "\x7f",
        "\x80",
        "\x9f",
        "\x1b[0m",
        "\U0010ffff",
        "\U0001d400",
    ),
    *(
        "x" * 15,
        "y" * 16,
        "z" * 17,
        "w" * 63,
        "v" * 64,
        "u" * 65,
        "long" * 40,
        "é" * 33,
        "漢" * 22,
        "１２３",
        "٣",
        "12",
        "3.14",
        "a",
        "I",
        "_",
    ),
    *(
        "the",
        "be",
        "to",
        "of",
        "and",
        "that",
        "have",
        "with",
        "The",
        "the,",
        "then",
        "theory",
        "in",
        "into",
        "inthe",
        "for",
        "ever",
        "forever",
    ),
]


@lru_cache(maxsize=1)
def prose():
    """Sentences of English from the docstrings of the standard library."""
    modules = (argparse_like := (string, textwrap, json, random, re, inspect, unicodedata))
    texts = [
        inspect.getdoc(value) or ""
        for module in argparse_like
        for value in (module, *(getattr(module, name) for name in sorted(dir(module))))
        if not isinstance(value, (str, int, bytes, dict, list, tuple))
    ]
    assert modules
    pieces = re.split(r"(?<=[.!?])\s+|\n\n", "\n\n".join(dict.fromkeys(texts)))
    return tuple(" ".join(piece.split()) for piece in dict.fromkeys(pieces) if len(piece.split()) > 3)


def odd_text(rng):
    """Anything: odd words, spaces and breaks, in parts repeated."""
    vocabulary = rng.sample(ODD_WORDS, rng.choice([1, 2, 3, 5, 20, 80]))
    breaks = rng.choice([["\n"], ["\n", "\n\n"], ["\n\n"], BREAKS])
    spaces = rng.choice([[" "], [" ", "  "], SPACES])
    parts = []
    for _ in range(rng.choice([0, 1, 2, 3, 5, 10, 30])):
        line = rng.choice(spaces).join(rng.choice(vocabulary) for _ in range(rng.choice([0, 1, 2, 3, 4, 8, 20])))
        line += rng.choice(["", "", ".", "!", " ", "...", "…", "…  ", '."', ". [1]"])
        parts += [line + rng.choice(breaks)] * rng.choice([1, 1, 1, 1, 2, 3])
    return rng.choice(["", "", " ", "\n", "\r"]) + "".join(parts) + rng.choice(["", "", "  ", "\n\n", "end"])


def prose_text(rng):
    """Paragraphs of English, with a few odd words, and phrases repeated so that some rows are near each threshold."""
    lines = []
    for _ in range(rng.choice([1, 2, 4, 8, 16])):
        words = " ".join(rng.choice(prose()) for _ in range(rng.choice([1, 1, 2, 4]))).split()
        for _ in range(rng.choice([0, 0, 0, 1, 3])):
            words.insert(rng.randrange(len(words)), rng.choice(ODD_WORDS))
        if rng.random() < 0.3:
            start, length = rng.randrange(len(words)), rng.choice([2, 3, 4, 5, 7, 10, 15])
            for _ in range(rng.choice([1, 2, 4, 8])):
                at = rng.randrange(len(words))
                words[at:at] = words[start : start + length]
        line = " ".join(words)
        lines += [line] * (1 if rng.random() < 0.9 else 2)
        if rng.random() < 0.15:
            lines += [rng.choice(["- ", "• ", ""]) + " ".join(words[: rng.choice([1, 3, 6])])] * rng.choice([1, 2, 6])
    return rng.choice(["\n", "\n", "\n\n", "\r\n", "\u2028"]).join(lines)


def texts_of(kind, count, seed):
    rng = random.Random(f"{kind} {seed}")
    return [kind(rng) for _ in range(count)]


# ── laws ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("kind", [odd_text, prose_text])
def test_verdicts_are_those_of_the_reference_row_by_row(check, kind):
    check(texts_of(kind, 500, 1))
