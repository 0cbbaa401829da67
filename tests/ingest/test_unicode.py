"""Laws of the repair of texts: each becomes what ftfy and unicodedata make of it alone, and what is well stays as it is."""

from __future__ import annotations

import itertools
import random
import re
import unicodedata

import ftfy
import ftfy.badness
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from ftfy import TextFixerConfig

from aifactory.config import UnicodeStep
from aifactory.ingest.unicode import _NOT_SURELY_NFC, Fixes, repair, repair_text, widened

WELL = [
    *("Plain ASCII text, with <tags> & ampersands.", "", " ", "\n", "a\n\nb\tc\n", "one\x0ctwo"),
    *("Café au lait — “naïve” façade…", "Größe, Übermut, ß", "Ελληνικά κείμενα", "Привет, мир!", "日本語のテキスト。"),
    *(
        "中文字符",
        "한국어",
        "हिन्दी में",
        "العربية",
        "שלום",
        "ไทย",
        "👩‍👩‍👧 😀",
        "x² + y³ = z⁴",
        "5 €",
        "‘quotes’ and «guillemets»",
    ),
]
BROKEN = [
    *(
        "CafÃ© au lait",
        "schÃ¶n",
        "itâ€™s â€œquotedâ€\x9d",
        "ÃƒÂ©tÃƒÂ©",
        "Ð¿Ñ€Ð¸Ð²ÐµÑ‚",
        "æ—¥æœ¬èªž",
        "ðŸ˜€",
        "voilÃ  le travail",
        "a\x85b\x92c",
    ),
    *("one\r\ntwo\rthree\r\r\nfour", "a\u2028b\u2029c\x85d", "\r", "\r\n", "ends with\r", "\n\r"),
    *(
        "bell\x07 and null\x00 and delete\x7f",
        "\ufeffmark",
        "a\u200e\u202ab",
        "\x1b[31mred\x1b[0m",
        "\x1b[1;2",
        "\x0b\x1c\x1f",
        "\ufff9note\ufffb",
    ),
    *(
        "&eacute;t&eacute; &amp; &lt;b&gt;",
        "&amp;amp;",
        "&#233;&#xe9;",
        "&nosuch; &EACUTE;",
        "a < b &amp; c",
        "&eacute;\n<p>\n&eacute;",
    ),
    *(
        "cafe\u0301",
        "e\u0301\u0323",
        "\u1100\u1161",
        "ﬁne ﬂour",
        "ＬＯＵＤ　ＮＯＩＳＥＳ",
        "①②③ ℌ",
        "Å ångström",
        "\u0344",
        "\u2126 ohm",
        "ｶﾞ",
    ),
]


def bits(rng):
    """Anything: parts that are well, parts that are broken, and characters that one or the other looks at."""
    odd = "".join(
        map(chr, [*range(0x20), *range(0x7F, 0x180), *range(0x2000, 0x2070), 0xFEFF, 0xFFFD, 0xFFF9, 0x300, 0x301])
    )
    part = {
        0: lambda: rng.choice(WELL),
        1: lambda: rng.choice(BROKEN),
        2: lambda: rng.choice(odd),
        3: lambda: chr(
            rng.choice([*range(0xD800), *range(0xE000, 0x3000)] if rng.random() < 0.5 else range(0xE000, 0x20000))
        ),
        4: lambda: rng.choice([" ", "\n", "\r\n", "&", "<", ";", "\x1b["]),
        5: lambda: rng.choice(WELL).encode().decode(rng.choice(["latin-1", "cp1252", "mac_roman", "cp437"]), "replace"),
    }
    return "".join(part[rng.choice([0, 0, 1, 2, 2, 3, 4, 5])]() for _ in range(rng.choice([1, 2, 3, 6, 15])))


def texts_of(seed, count):
    rng = random.Random(seed)
    return WELL + BROKEN + [bits(rng) for _ in range(count)]


def reference(text, fixes):
    """ftfy's fixes of the same names, and the normal form."""
    form = {"none": None, "nfc": "NFC", "nfkc": "NFKC"}[fixes.form]
    if not (fixes.mojibake or fixes.line_ends or fixes.controls or fixes.entities):
        return text if form is None else unicodedata.normalize(form, text)
    return ftfy.fix_text(
        text,
        TextFixerConfig(
            unescape_html="auto" if fixes.entities else False,
            fix_encoding=fixes.mojibake,
            fix_c1_controls=fixes.mojibake,
            fix_line_breaks=fixes.line_ends,
            remove_control_chars=fixes.controls,
            remove_terminal_escapes=fixes.controls,
            normalization=form,
            uncurl_quotes=False,
            fix_latin_ligatures=False,
            fix_character_width=False,
            fix_surrogates=False,
        ),
    )


ALL_FIXES = [
    Fixes(form=form, mojibake=mojibake, line_ends=line_ends, controls=controls, entities=entities)
    for form, mojibake, line_ends, controls, entities in itertools.product(
        ("none", "nfc", "nfkc"), *[(False, True)] * 4
    )
]


def short(fixes):
    on = [name for name in ("mojibake", "line_ends", "controls", "entities") if getattr(fixes, name)]
    return "-".join([fixes.form, *on])


@pytest.mark.parametrize("fixes", ALL_FIXES, ids=short)
def test_each_text_becomes_what_ftfy_and_unicodedata_make_of_it(fixes):
    texts = texts_of(short(fixes), 100)
    expected = [reference(text, fixes) for text in texts]

    found = repair(pa.array(texts), fixes)

    found.texts.validate(full=True)
    wrong = [(t, e, f) for t, e, f in zip(texts, expected, found.texts.to_pylist(), strict=True) if e != f]
    assert not wrong, wrong[:3]
    assert [repair_text(text, fixes) for text in texts] == expected
    assert found.changed_N.tolist() == [text != after for text, after in zip(texts, expected, strict=True)]


def test_the_defaults_are_those_of_the_step():
    step = UnicodeStep(step="unicode")
    assert Fixes(**step.model_dump(exclude={"step"})) == Fixes()


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_texts_that_need_nothing_are_returned_as_they_are(kind):
    texts = pa.array(WELL * 3, kind)
    found = repair(texts, Fixes(entities=False))
    assert found.texts.type == kind
    assert found.texts.equals(texts)
    assert not found.changed_N.any()
    assert found.figures["rows_changed"] == found.figures["rows_mended"] == 0
    # Nobody has to look at most of them.
    assert found.figures["rows_looked_at"] < len(texts) / 4


@pytest.mark.parametrize("fixes", [Fixes(), Fixes(form="nfkc", entities=True), Fixes(form="none")], ids=short)
def test_a_text_that_was_repaired_is_well(fixes):
    texts = WELL + BROKEN
    once = repair(pa.array(texts), fixes).texts
    again = repair(once, fixes)
    assert again.texts.equals(once)
    assert not again.changed_N.any()


# ── each option alone ─────────────────────────────────────────────────────────────────────────────────────────────────

NONE = {"form": "none", "mojibake": False, "line_ends": False, "controls": False, "entities": False}
ALONE = {
    ("form", "nfc"): {"cafe\u0301": "café", "\u2126": "Ω", "ﬁ Ｌ": "ﬁ Ｌ"},
    ("form", "nfkc"): {"cafe\u0301": "café", "ﬁ Ｌ ①": "fi L 1"},
    ("mojibake", True): {"CafÃ©": "Café", "itâ€™s": "it’s", "a\x92s": "a’s"},
    ("line_ends", True): {"a\r\nb\rc": "a\nb\nc", "a\u2028b\u2029c": "a\nb\nc"},
    ("controls", True): {
        "a\x07b\x00c\ufeffd": "abcd",
        "\x1b[31mred\x1b[0m": "red",
        "tab\tline\nfeed\x0c": "tab\tline\nfeed\x0c",
    },
    ("entities", True): {"&eacute; &amp; &lt;": "é & <", "<p>&eacute;": "<p>&eacute;"},
}


@pytest.mark.parametrize(("name", "value"), ALONE)
def test_an_option_alone_does_what_it_says_and_nothing_else(name, value):
    fixes = Fixes(**{**NONE, name: value})
    every = {before for each in ALONE.values() for before in each}
    mine = ALONE[name, value]

    found = dict(zip(mine, repair(pa.array(list(mine)), fixes).texts.to_pylist(), strict=True))

    assert found == mine
    others = [text for text in every - {*mine} if not (name == "form" and not text.isascii())]
    assert repair(pa.array(others), fixes).texts.to_pylist() == others
    assert repair(pa.array(sorted(every)), Fixes(**NONE)).texts.to_pylist() == sorted(every)


def test_quotes_ligatures_and_full_width_stay():
    kept = ["“curly” and ‘single’", "ﬁne ﬂour", "ＬＯＵＤ　ＮＯＩＳＥＳ"]
    assert repair(pa.array(kept), Fixes()).texts.to_pylist() == kept


# ── blocks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fixes", [Fixes(), Fixes(form="nfkc", entities=True), Fixes(**NONE)], ids=short)
def test_what_becomes_of_a_text_depends_on_it_alone(fixes):
    texts = [*texts_of(1, 150), "x" * 300_000, "y\r" * 50_000, "é\r" * 40_000]
    random.Random(1).shuffle(texts)
    alone = [repair(pa.array([text]), fixes).texts[0].as_py() for text in texts]

    for kind in (pa.string(), pa.large_string()):
        whole = pa.array(texts, kind)
        for start, stop in [(0, len(texts)), (0, 1), (1, 77), (50, len(texts)), (9, 9)]:
            found = repair(whole[start:stop], fixes)
            assert found.texts.to_pylist() == alone[start:stop]
            assert found.texts.type == kind
            assert len(found.changed_N) == stop - start
    assert repair(pa.array(texts[::-1]), fixes).texts.to_pylist() == alone[::-1]


def test_figures_add_up_over_blocks():
    texts = texts_of(2, 200)
    whole = repair(pa.array(texts), Fixes()).figures
    parts = [repair(pa.array(texts[i : i + 50]), Fixes()).figures for i in range(0, len(texts), 50)]

    assert whole == {name: sum(part[name] for part in parts) for name in whole}
    assert whole["rows"] == len(texts)
    assert whole["bytes_in"] == sum(len(text.encode()) for text in texts)
    assert whole["bytes_out"] == sum(len(reference(text, Fixes()).encode()) for text in texts)
    assert whole["rows_mended"] <= whole["rows_changed"] == sum(reference(text, Fixes()) != text for text in texts)


@pytest.mark.parametrize("unit", ["é", "e\u0301", "\x07é"])
def test_lines_that_are_longer_than_what_ftfy_looks_at_become_what_it_makes_of_them(unit):
    text = "x" + unit * (1_001_000 // len(unit))
    (found,) = repair(pa.array([text]), Fixes()).texts.to_pylist()
    assert found == reference(text, Fixes())


# ── which rows are looked at ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_widened_pattern_matches_wherever_the_other_does():
    lines = [line for text in texts_of(3, 500) for line in text.split("\n")]
    bad = [bool(ftfy.badness.BADNESS_RE.search(line)) for line in lines]
    assert 50 < sum(bad) < len(bad)
    pattern = "(?s)" + widened(ftfy.badness.BADNESS_RE)
    wide = pc.match_substring_regex(pa.array(lines), pattern).to_pylist()
    assert all(found for found, expected in zip(wide, bad, strict=True) if expected)


@pytest.mark.parametrize("pattern", [re.compile("a", re.I), re.compile("(?=a)b"), re.compile(r"a\b"), re.compile("a$")])
def test_a_pattern_that_cannot_be_widened_matches_all_but_ascii(pattern):
    assert re.search(widened(pattern), "é")
    assert not re.search(widened(pattern), "e")


def test_texts_that_are_surely_in_normal_form_are():
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    may_change = pc.match_substring_regex(pa.array(map(chr, codes), pa.string()), _NOT_SURELY_NFC).to_pylist()
    sure = [code for code, is_doubtful in zip(codes, may_change, strict=True) if not is_doubtful]
    assert 0x300 <= len(sure) < 0x400
    assert all(unicodedata.normalize("NFC", chr(code)) == chr(code) for code in sure)
    marked = [chr(one) + chr(other) for one in sure[::5] for other in sure[::5]]
    assert all(unicodedata.normalize("NFC", text) == text for text in marked)
