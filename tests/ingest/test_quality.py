"""Laws of the quality rules: verdict, rule, score and text are those of the reference library, row by row."""

from __future__ import annotations

import inspect
import json
import random
import re
import string
import textwrap
import unicodedata
from dataclasses import replace
from functools import lru_cache

import datatrove.pipeline.filters.c4_filters as reference_c4
import datatrove.pipeline.filters.fineweb_quality_filter as reference_fineweb
import datatrove.pipeline.filters.gopher_quality_filter as reference_quality
import datatrove.pipeline.filters.gopher_repetition_filter as reference_repetition
import numpy as np
import pyarrow as pa
import pytest
from datatrove.data import Document
from datatrove.utils.text import PUNCTUATION_SET
from datatrove.utils.text import TERMINAL_PUNCTUATION as REFERENCE_TERMINAL

from aifactory.ingest.quality import (
    C4_QUALITY_RULES,
    FINEWEB_QUALITY_RULES,
    GOPHER_QUALITY_RULES,
    PUNCTUATION,
    TERMINAL_PUNCTUATION,
    C4Quality,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
    c4_quality,
    fineweb_quality,
    gopher_quality,
    gopher_repetition,
    gopher_repetition_rules,
)

# The reference takes the mean of no words where it is asked to.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

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
    modules = (string, textwrap, json, random, re, inspect, unicodedata)
    texts = [
        inspect.getdoc(value) or ""
        for module in modules
        for value in (module, *(getattr(module, name) for name in sorted(dir(module))))
        if not isinstance(value, (str, int, bytes, dict, list, tuple))
    ]
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


SENTENCES = [
    "The cat sat on the mat and looked at every bird with care.",
    "Rain fell over hills that nobody had ever wanted to climb.",
    "We have to be patient because good bread takes many hours.",
    "A letter came from Lisbon about ships and their captains.",
    "Nothing of what they planted grew until spring was over.",
    "Old maps show rivers where roads have been built since then.",
]
PROSE = " ".join(SENTENCES)
NUMBERS = " ".join(map(str, range(1000, 1400)))
OF_GOPHER_QUALITY = {
    "short_doc": SENTENCES[0],
    "long_doc": "word " * 100_001,
    "below_avg_threshold": "a of the to " * 20,
    "above_avg_threshold": "extraordinarily incomprehensible " * 30,
    "too_many_hashes": PROSE + " #" * 12,
    "too_many_ellipsis": PROSE + " ..." * 5 + " …" * 5,
    "too_many_bullets": "\n".join(["- " + line for line in SENTENCES] + ["• " + line for line in SENTENCES]),
    "too_many_end_ellipsis": "\n".join([line + "..." for line in SENTENCES[:2]] + SENTENCES[2:]).replace(
        "care.", "care…"
    ),
    "below_alpha_threshold": PROSE + " 1234" * 30,
    "enough_stop_words": "Quiet green gardens grow where gentle water runs. " * 10,
}
LONG_LINES = [
    f"{line} Line {i} ends here, and this is what it says of number {i * 7}." for i, line in enumerate(SENTENCES)
]
OF_GOPHER_REPETITION = {
    "empty": "",
    "dup_para_frac": "\n\n".join(["one two"] * 3 + LONG_LINES[:3]),
    "dup_para_char_frac": "\n\n".join([NUMBERS[:400], NUMBERS[:400], *LONG_LINES[:4]]),
    "dup_line_frac": "\n".join(["one two"] * 4 + LONG_LINES[:4]),
    "dup_line_char_frac": "\n".join([NUMBERS[:400], NUMBERS[:400], *LONG_LINES[:4]]),
    "top_2_gram": " ".join(f"alpha beta {n}" for n in NUMBERS.split()),
    "top_3_gram": " ".join(f"on a mat {n} {n}x {n}y" for n in NUMBERS.split()),
    "top_4_gram": " ".join(f"ab cd ef gh {n} {n}x {n}yz {n}w {n}v {n}u" for n in NUMBERS.split()),
}
OF_FINEWEB = {
    "empty": " \n\t\n",
    "line_punct_ratio": "\n".join(line.rstrip(".") for line in LONG_LINES),
    "short_line_ratio": "Yes.\nNo.\nGo.\n" + LONG_LINES[0],
    "char_dup_ratio": "\n".join([LONG_LINES[0], *LONG_LINES]),
    "list_ratio": "\n\n\n\n\n\n\n\n".join(SENTENCES),
}
OF_C4 = {
    "lorem_ipsum": PROSE + "\nWe say Lorem Ipsum dolor sit amet.",
    "curly_bracket": PROSE + "\nThis { is code of some kind.",
    "too_few_sentences": "\n".join(SENTENCES[:3]),
}


def duplicated(n, frac):
    """A text whose repeated runs of n words are too many, and those of fewer are not looked at."""
    params = GopherRepetition(top_n_grams=(), dup_n_grams=((n, frac),))
    words = NUMBERS.split()
    return params, " ".join(words[:300] + words[100 : 100 + int(300 * frac * 3)])


# ── laws ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_character_sets_are_those_of_the_reference():
    assert set(TERMINAL_PUNCTUATION) == REFERENCE_TERMINAL
    assert set(PUNCTUATION) == PUNCTUATION_SET
    assert len(set(PUNCTUATION)) == len(PUNCTUATION)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("kind", [odd_text, prose_text])
def test_verdicts_are_those_of_the_reference_row_by_row(check, kind):
    check(texts_of(kind, 400, 1))


@pytest.mark.parametrize(
    ("check", "rules", "texts"),
    [
        (check_quality, GOPHER_QUALITY_RULES, OF_GOPHER_QUALITY),
        (check_repetition, gopher_repetition_rules(GopherRepetition(dup_n_grams=())), OF_GOPHER_REPETITION),
        (check_fineweb, FINEWEB_QUALITY_RULES, OF_FINEWEB),
        (check_c4, C4_QUALITY_RULES, OF_C4),
    ],
    ids=CHECKS,
)
def test_every_rule_is_broken_by_a_text_that_is_made_to_break_it(check, rules, texts):
    assert tuple(texts) == rules
    assert tuple(check(list(texts.values()))) == rules
    assert check([PROSE]) == [None]


@pytest.mark.parametrize(("n", "frac"), GopherRepetition().dup_n_grams)
def test_the_rule_for_runs_of_each_length_is_broken(n, frac):
    params, text = duplicated(n, frac)
    assert check_repetition([text, PROSE], params) == [f"duplicated_{n}_n_grams", None]


def changed(params, names):
    """The same parameters with one of them other than it is."""
    for name in names:
        value = getattr(params, name)
        if isinstance(value, bool):
            yield replace(params, **{name: not value})
        elif isinstance(value, int | float):
            # 0 is off for some, -1 is any for those of C4; equality counts where a ratio hits the threshold.
            for other in (0, 1, value / 3, value * 2, 0.5, 7, *([-1] if isinstance(params, C4Quality) else [])):
                yield replace(params, **{name: type(value)(other)})


CHANGED = {
    "gopher_quality": [
        *changed(GopherQuality(), [n for n in GopherQuality.__slots__ if n != "stop_words"]),
        GopherQuality(stop_words=()),
        GopherQuality(stop_words=("in", "日本語", "two words", "", "İ", "the", "the")),
    ],
    "gopher_repetition": [
        *changed(GopherRepetition(), [n for n in GopherRepetition.__slots__ if n.endswith("frac")]),
        GopherRepetition(top_n_grams=(), dup_n_grams=()),
        GopherRepetition(top_n_grams=((1, 0.1), (7, 0.0)), dup_n_grams=()),
        GopherRepetition(top_n_grams=(), dup_n_grams=((3, 0.0), (1, 0.9))),
        GopherRepetition(0, 0, 0, 0),
    ],
    "fineweb_quality": [
        *changed(FineWebQuality(), [n for n in FineWebQuality.__slots__ if n != "stop_chars"]),
        FineWebQuality(stop_chars=""),
        FineWebQuality(stop_chars=".語😀"),
    ],
    "c4_quality": list(changed(C4Quality(), C4Quality.__slots__)),
}


@pytest.mark.parametrize("name", CHECKS)
def test_verdicts_are_those_of_the_reference_by_other_thresholds_one_by_one(name):
    texts = texts_of(odd_text, 40, 2) + texts_of(prose_text, 40, 2) + [PROSE, *OF_C4.values(), *OF_FINEWEB.values()]
    default = CHECKS[name](texts)
    different = 0
    for params in CHANGED[name]:
        different += CHECKS[name](texts, params) != default
    assert different > len(CHANGED[name]) / 3, "most thresholds can be seen in these texts"


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def measured_quality(text, rule):
    """What the rule compares with its threshold, by the reference's definitions."""
    words, lines = text.split(), text.splitlines()
    proper = [word for word in words if any(c not in PUNCTUATION_SET for c in word)]
    return {
        "short_doc": lambda: len(proper),
        "long_doc": lambda: len(proper),
        "below_avg_threshold": lambda: mean(map(len, proper)),
        "above_avg_threshold": lambda: mean(map(len, proper)),
        "too_many_hashes": lambda: text.count("#") / len(words),
        "too_many_ellipsis": lambda: (text.count("...") + text.count("…")) / len(words),
        "too_many_bullets": lambda: mean(line.lstrip().startswith(("•", "-")) for line in lines),
        "too_many_end_ellipsis": lambda: mean(line.rstrip().endswith(("...", "…")) for line in lines),
        "below_alpha_threshold": lambda: mean(any(map(str.isalpha, word)) for word in words),
        "enough_stop_words": lambda: len(set(GopherQuality().stop_words) & set(words)),
    }[rule]()


def measured_repetition(text, rule):
    find, words = reference_repetition.find_duplicates, text.split()
    paragraphs, lines = re.split(r"\n{2,}", text.strip()), re.split(r"\n+", text)
    n = int(next(iter(re.findall(r"\d+", rule)), 0))
    return {
        "empty": lambda: 0,
        "dup_para_frac": lambda: find(paragraphs)[0] / len(paragraphs),
        "dup_para_char_frac": lambda: find(paragraphs)[1] / len(text),
        "dup_line_frac": lambda: find(lines)[0] / len(lines),
        "dup_line_char_frac": lambda: find(lines)[1] / len(text),
        f"top_{n}_gram": lambda: (
            reference_repetition.find_top_duplicate(reference_repetition.get_n_grams(words, n)) / len(text)
        ),
        f"duplicated_{n}_n_grams": lambda: reference_repetition.find_all_duplicate(words, n) / len(text),
    }[rule]()


def measured_fineweb(text, rule):
    lines = [line for line in text.split("\n") if line.strip()]
    return {
        "empty": lambda: 0,
        "line_punct_ratio": lambda: mean(line.endswith(tuple(REFERENCE_TERMINAL)) for line in lines),
        "short_line_ratio": lambda: mean(len(line) <= 30 for line in lines),
        "char_dup_ratio": lambda: reference_repetition.find_duplicates(lines)[1] / len(text.replace("\n", "")),
        "list_ratio": lambda: text.count("\n") / len(text.split()),
    }[rule]()


@pytest.mark.parametrize(
    ("judge", "measured", "made"),
    [
        (lambda texts: gopher_quality(texts, GopherQuality()), measured_quality, OF_GOPHER_QUALITY),
        (lambda texts: gopher_repetition(texts, GopherRepetition()), measured_repetition, OF_GOPHER_REPETITION),
        (lambda texts: fineweb_quality(texts, FineWebQuality()), measured_fineweb, OF_FINEWEB),
    ],
    ids=["gopher_quality", "gopher_repetition", "fineweb_quality"],
)
def test_the_score_is_what_the_rule_compares_with_its_threshold(judge, measured, made):
    texts = [*made.values(), *texts_of(odd_text, 150, 3), *texts_of(prose_text, 150, 3)]
    verdicts = judge(array_of(texts))
    rules = broken_rules(verdicts)
    assert set(made) <= set(rules)
    expected = [0 if rule is None else measured(text, rule) for text, rule in zip(texts, rules, strict=True)]
    assert verdicts.score_N.tolist() == pytest.approx(expected, rel=1e-12)


def test_the_score_of_c4_is_its_sentences_or_the_line_that_was_found():
    _, verdicts = c4_quality(array_of([*OF_C4.values(), PROSE]), C4Quality())
    assert verdicts.score_N.tolist() == [1, 1, 3, 0]


@pytest.mark.parametrize("text", ["", " ", "\n\n", "\u2003\u2028", "\x1c"])
def test_a_text_without_words_breaks_the_first_rule_or_is_kept_as_the_reference_has_it(text):
    verdicts = gopher_quality(array_of([text]), GopherQuality(min_doc_words=0, min_stop_words=0))
    assert broken_rules(verdicts) == ["short_doc"]
    assert verdicts.score_N.tolist() == [0]
    check_repetition([text])
    check_fineweb([text])
    check_c4([text], C4Quality(min_num_sentences=-1))


JUDGES = {
    "gopher_quality": lambda texts: (None, gopher_quality(texts, GopherQuality())),
    "gopher_repetition": lambda texts: (None, gopher_repetition(texts, GopherRepetition())),
    "fineweb_quality": lambda texts: (None, fineweb_quality(texts, FineWebQuality())),
    "c4_quality": lambda texts: c4_quality(texts, C4Quality()),
}


def said(judge, texts):
    """Rule, score and, of C4, the text, row by row."""
    kept, verdicts = judge(texts)
    assert len(verdicts.broken_N) == len(verdicts.score_N) == len(texts)
    rows = zip(broken_rules(verdicts), verdicts.score_N.tolist(), strict=True)
    return list(zip(rows, [None] * len(texts) if kept is None else kept.to_pylist(), strict=True))


@pytest.mark.parametrize("judge", JUDGES.values(), ids=JUDGES)
def test_a_verdict_depends_on_its_text_alone(judge):
    texts = texts_of(odd_text, 120, 4) + texts_of(prose_text, 120, 4) + [*OF_GOPHER_QUALITY.values(), ""]
    random.Random(4).shuffle(texts)
    alone = [said(judge, array_of([text]))[0] for text in texts]
    assert len({rule for (rule, _), _ in alone}) > 2

    assert said(judge, array_of(texts)) == alone
    assert said(judge, array_of(texts[::-1])) == alone[::-1]
    for start, stop in [(0, 1), (1, 100), (77, 200), (len(texts) - 1, len(texts)), (5, 5)]:
        assert said(judge, array_of(texts)[start:stop]) == alone[start:stop]
        assert said(judge, array_of(texts, pa.large_string())[start:stop]) == alone[start:stop]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_c4_of_some_texts_alone_says_of_them_what_it_says_and_leaves_the_others_and_what_is_broken_empty(kind):
    texts = texts_of(odd_text, 90, 6) + texts_of(prose_text, 90, 6)
    random.Random(6).shuffle(texts)
    every = said(JUDGES["c4_quality"], array_of(texts, kind))
    wanted = np.random.default_rng(6).random(len(texts)) < 0.7

    found = said(lambda some: c4_quality(some, C4Quality(), only_N=wanted), array_of(texts, kind))

    expected = [
        ((rule, score), "" if rule else text) if is_wanted else ((None, 0.0), "")
        for ((rule, score), text), is_wanted in zip(every, wanted.tolist(), strict=True)
    ]
    assert found == expected
    assert len({rule for (rule, _), _ in found}) > 2


@pytest.mark.parametrize("judge", JUDGES.values(), ids=JUDGES)
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_no_texts_give_no_verdicts(judge, kind):
    assert said(judge, array_of([], kind)) == []
    assert said(judge, array_of(["a", "b"], kind)[1:1]) == []


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize(
    "unit", ["x", "é", "語", "😀", "ab ", "é ", "a\n", "a.\n\n", "\n", " ", "a. ", "- b...\n", "[1] "]
)
def test_very_long_words_lines_and_texts_are_judged_as_short_ones_are(check, unit):
    for count in (1024, 66_000):
        check([unit * count, PROSE + unit * count])


def test_a_text_of_many_different_words_and_lines_is_compared_as_a_whole():
    rng = random.Random(5)
    lines = [" ".join(f"w{rng.randrange(10**7)}" for _ in range(8)) + f" and, of the {i} x." for i in range(9_000)]
    text = "\n".join(lines)
    assert check_repetition([text, text + "\n" + "\n".join(lines[:4_000])]) == [None, "dup_line_frac"]
    assert check_quality([text])[0] == "long_doc"
    assert check_fineweb([text, text + "\n" + "\n".join(lines[:300])]) == [None, "char_dup_ratio"]
    assert check_c4([text]) == [None]
