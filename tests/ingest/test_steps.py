"""Laws of steps: each in its turn, no row vanishes at any of them, and the ledger says what was expected and found."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace

import pyarrow as pa
import pytest
from pydantic import TypeAdapter, ValidationError

from aifactory.config import RowStep
from aifactory.ingest.columns import RAW_SCHEMA
from aifactory.ingest.quality import C4Quality, FineWebQuality, GopherQuality, GopherRepetition
from aifactory.ingest.steps import Figures, apply_steps, reject_empty
from aifactory.records.rows import assign_keys

WORDS = [
    "the",
    "be",
    "to",
    "of",
    "and",
    "that",
    "have",
    "with",
    "cat",
    "dog",
    "house",
    "tree",
    "river",
    "stone",
    "bread",
    "letter",
    "winter",
    "summer",
]
STEP = TypeAdapter(RowStep)


def steps_of(*sections):
    return tuple(
        STEP.validate_python({"step": section} if isinstance(section, str) else section) for section in sections
    )


def table_of(texts, **columns):
    values = {"text": texts, "position": range(len(texts)), "weight": [1.0] * len(texts), **columns}
    arrays = [pa.array(values.get(field.name, [""] * len(texts)), field.type) for field in RAW_SCHEMA]
    return assign_keys(pa.table(arrays, schema=RAW_SCHEMA), source="docs", keyed_by_file=False, holdout_share=0.25)


def applied(texts, *sections, restored=None, figures=None):
    """The texts that stay; the ledger by text (the rule and the detail); the figures."""
    figures = Figures() if figures is None else figures
    table, broken = apply_steps(table_of(texts), steps_of(*sections), figures, restored=restored)
    ledger = {
        text: (rule, detail)
        for each in broken
        for text, rule, detail in zip(each.rows["text"].to_pylist(), each.rules, each.details, strict=True)
    }
    return table["text"].to_pylist(), ledger, figures.steps


def prose(rng, words=80):
    """A text that no rule rejects."""
    said = [rng.choice(WORDS) + (str(rng.randrange(10)) if rng.random() < 0.3 else "") for _ in range(words)]
    lines = [" ".join(said[i : i + 10]) + "." for i in range(0, words, 10)]
    return "\n".join(lines) + f" Number {rng.randrange(10**6)}."


def mixed(seed, count=120):
    rng = random.Random(seed)
    kinds = [
        lambda: prose(rng),
        lambda: prose(rng),
        lambda: f"short {rng.randrange(10**6)}",
        lambda: f"{rng.randrange(10**9)} " * 30,
        lambda: "wide " * 90 + str(rng.randrange(10**6)),
        lambda: prose(rng) + "\nThis { is code.",
        lambda: prose(rng).replace("the", "cafe\u0301\r\n"),
        lambda: f"mail{rng.randrange(10**6)}@example.org " + prose(rng),
        lambda: (
            "Все люди рождаются свободными и равными в своем достоинстве. " * rng.randrange(2, 5) + str(rng.random())
        ),
        lambda: "\x07" * rng.randrange(1, 500),
    ]
    return list(dict.fromkeys(rng.choice(kinds)() for _ in range(count)))


EVERY = (
    "unicode",
    {"step": "length", "min_bytes": 20},
    {"step": "alphabetic", "min_share": 0.5},
    {"step": "line_length", "max_mean_chars": 300},
    {"step": "language", "keep": ["en"], "min_probability": 0.1},
    {"step": "gopher_quality", "min_doc_words": 30, "min_avg_word_length": 2},
    "gopher_repetition",
    {"step": "fineweb", "short_line_thr": 0.99},
    "c4",
    "personal",
)


# ── the sum ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_row_vanishes_at_any_step():
    texts = mixed(0)
    kept, ledger, figures = applied(texts, *EVERY)

    assert len(figures) == len(EVERY)
    rows = len(texts)
    for step in figures:
        assert step["rows_in"] == rows == step["rows_kept"] + step["rows_rejected"]
        rows = step["rows_kept"]
    assert rows == len(kept)
    assert len(ledger) == len(texts) - len(kept)
    by_step = Counter(rule.partition(".")[0].removesuffix("_uncertain") for rule, _ in ledger.values())
    names = [section if isinstance(section, str) else section["step"] for section in EVERY]
    assert {name: step["rows_rejected"] for name, step in zip(names, figures, strict=True)} == {
        name: by_step[name] for name in names
    }
    assert len(by_step) >= 6
    assert kept


def test_rows_that_go_and_rows_that_stay_keep_their_order_and_all_that_they_say():
    texts = mixed(1)
    table = table_of(texts, label=[f"label-{i}" for i in range(len(texts))])
    kept, broken = apply_steps(table, steps_of(*EVERY[1:5]), Figures())

    assert kept["position"].to_pylist() == sorted(kept["position"].to_pylist())
    for each in broken:
        assert each.rows["position"].to_pylist() == sorted(each.rows["position"].to_pylist())
    original = {row["key"]: row for row in table.to_pylist()}
    everything = [*kept.to_pylist(), *(row for each in broken for row in each.rows.to_pylist())]
    assert len(everything) == len(texts)
    assert all({**row, "language": ""} == original[row["key"]] for row in everything)


def test_figures_and_rows_are_the_same_however_blocks_are_cut():
    texts = mixed(2)
    kept, ledger, whole = applied(texts, *EVERY)
    figures = Figures()
    parts = [applied(texts[i : i + 17], *EVERY, figures=figures) for i in range(0, len(texts), 17)]

    assert [dict(step) for step in figures.steps] == [dict(step) for step in whole]
    assert [text for some, _, _ in parts for text in some] == kept
    assert {text: said for _, some, _ in parts for text, said in some.items()} == ledger


def test_no_rows_and_no_steps_leave_all_as_it_is():
    assert applied([], *EVERY)[:2] == ([], {})
    assert applied(["a", "b"]) == (["a", "b"], {}, [])


# ── order ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_step_sees_what_the_steps_before_it_have_made():
    text = "cafe\u0301"  # 6 bytes; composed 5
    short = {"step": "length", "max_bytes": 5}
    assert applied([text], "unicode", short)[0] == ["café"]
    assert applied([text], short, "unicode")[1] == {text: ("length", "6 bytes, not within 1 to 5")}


def test_the_first_rule_that_a_row_breaks_is_the_one_in_the_ledger():
    length, letters = {"step": "length", "min_bytes": 20}, {"step": "alphabetic", "min_share": 0.5}
    assert applied(["1234"], length, letters)[1]["1234"][0] == "length"
    _, ledger, figures = applied(["1234"], letters, length)
    assert ledger["1234"][0] == "alphabetic"
    assert figures[1] == {"rows_in": 0, "rows_kept": 0, "rows_rejected": 0}


def test_a_step_that_comes_twice_is_counted_twice():
    texts = ["a" * n for n in (5, 15, 25)]
    kept, ledger, figures = applied(texts, {"step": "length", "min_bytes": 10}, {"step": "length", "min_bytes": 20})
    assert kept == texts[2:]
    assert [step["rows_rejected"] for step in figures] == [1, 1]
    assert {rule for rule, _ in ledger.values()} == {"length"}


# ── what the ledger says ──────────────────────────────────────────────────────────────────────────────────────────────

PROSE = prose(random.Random(3))
RUSSIAN = "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью."
SAID = {
    "length": ({"min_bytes": 20}, "short", "length", "5 bytes, not within 20 to 1000000"),
    "alphabetic": ({}, "12345 67890", "alphabetic", "0.000 of the visible characters are letters, less than 0.4"),
    "line_length": ({}, "x" * 300, "line_length", "300 characters a line, more than 200"),
    "language": ({"keep": ["en", "de"]}, RUSSIAN, "language", r"ru with probability 0\.9.*, expected one of en, de"),
    "language_uncertain": (
        {"step": "language", "min_probability": 1},
        "a cat",
        "language_uncertain",
        r".. with probability 0\..*, expected a probability of at least 1",
    ),
    "gopher_quality": (
        {},
        "only a few words",
        "gopher_quality.short_doc",
        r"4, expected at least 50 \(min_doc_words\)",
    ),
    "gopher_repetition": (
        {},
        "\n".join(["again"] * 5),
        "gopher_repetition.dup_line_frac",
        r"0\.8, expected at most 0\.3 \(dup_line_frac\)",
    ),
    "top": (
        {"step": "gopher_repetition"},
        " ".join(f"alpha beta {n}" for n in range(1000, 1200)),
        "gopher_repetition.top_2_gram",
        r"0\.6.*, expected at most 0\.2 \(top_n_grams, 2 words\)",
    ),
    "dup": (
        {"step": "gopher_repetition", "top_n_grams": []},
        " ".join(f"{n}" for n in [*range(1000, 1100), *range(1000, 1050)]),
        "gopher_repetition.duplicated_5_n_grams",
        r"0\.2.*, expected at most 0\.15 \(dup_n_grams, 5 words\)",
    ),
    "fineweb": (
        {},
        "a line without an end",
        "fineweb.line_punct_ratio",
        r"0, expected at least 0\.12 \(line_punct_thr\)",
    ),
    "c4": (
        {},
        "One sentence is here.",
        "c4.too_few_sentences",
        r"1, expected at least 5 \(min_num_sentences\)",
    ),
    "c4 bracket": ({"step": "c4"}, "This { is code.", "c4.curly_bracket", "a line with a curly bracket, expected none"),
    "c4 lorem": ({"step": "c4"}, "Say lorem ipsum now.", "c4.lorem_ipsum", 'a line with "lorem ipsum", expected none'),
    "unicode": ({}, "\x07\x08", "unicode.empty", "no text but white space is left"),
}


@pytest.mark.parametrize("name", SAID)
def test_the_ledger_names_the_rule_in_full_and_says_what_was_expected_and_found(name):
    section, text, rule, said = SAID[name]
    kept, ledger, _ = applied([PROSE, text], {"step": name} | section)

    assert ledger[text][0] == rule
    assert re.fullmatch(said, ledger[text][1])
    assert PROSE in kept or name in ("language_uncertain",)


def test_what_a_step_leaves_nothing_of_is_in_the_ledger_as_it_was():
    # Of these lines none is a sentence, and no number of sentences is asked for.
    lines = "one\ntwo\nthree"
    texts = ["\x07\x1b[0m", PROSE, lines]
    kept, ledger, figures = applied(texts, "unicode", {"step": "c4", "min_num_sentences": -1})

    assert {text: rule for text, (rule, _) in ledger.items()} == {"\x07\x1b[0m": "unicode.empty", lines: "c4.empty"}
    assert len(kept) == 1
    assert [step["rows_rejected"] for step in figures] == [1, 1]


def test_rows_without_text_are_rejected_before_any_step():
    table = table_of(["", " ", "\n\t\u2003\u3000", "a", "\u200b"])
    kept, broken = reject_empty(table)
    assert kept["text"].to_pylist() == ["a", "\u200b"]
    assert broken.rules == ["empty"] * 3
    assert broken.details == ["no text but white space"] * 3


# ── brought back ──────────────────────────────────────────────────────────────────────────────────────────────────────


def keys_of(texts):
    return frozenset(table_of(texts)["key"].to_pylist())


def test_a_row_that_was_brought_back_is_not_rejected_by_that_rule_and_still_by_another():
    letters, digits, other = "ab cd", "12 34", "xy zw"
    sections = ({"step": "length", "min_bytes": 20}, {"step": "alphabetic", "min_share": 0.5})
    restored = {"length": keys_of([letters, digits])}

    kept, ledger, figures = applied([letters, digits, other, PROSE], *sections, restored=restored)

    assert kept == [letters, PROSE]
    assert {text: rule for text, (rule, _) in ledger.items()} == {digits: "alphabetic", other: "length"}
    assert [step["rows_rejected"] for step in figures] == [1, 1]


def test_a_rule_that_was_lifted_for_some_rows_holds_for_the_others_and_another_rule_for_these():
    texts = mixed(4)
    _, before, _ = applied(texts, *EVERY)
    for rule in sorted({rule for rule, _ in before.values()}):
        lifted = [text for text, (each, _) in before.items() if each == rule]
        # Texts that steps have changed are known by the row that they were.
        table = table_of(texts)
        _, broken = apply_steps(table, steps_of(*EVERY), Figures())
        keys = frozenset(
            key
            for each in broken
            for key, name in zip(each.rows["key"].to_pylist(), each.rules, strict=True)
            if name == rule
        )
        assert len(keys) == len(lifted)
        kept, after = apply_steps(table, steps_of(*EVERY), Figures(), restored={rule: keys})

        found = {
            key: name for each in after for key, name in zip(each.rows["key"].to_pylist(), each.rules, strict=True)
        }
        expected = {
            key: name for each in broken for key, name in zip(each.rows["key"].to_pylist(), each.rules, strict=True)
        }
        assert rule not in found.values()
        assert {key: name for key, name in found.items() if key not in keys} == {
            key: name for key, name in expected.items() if key not in keys
        }
        assert {*kept["key"].to_pylist(), *found} == {*table["key"].to_pylist()}


@pytest.mark.parametrize("restored", [{"length": frozenset()}, {"alphabetic": frozenset(["0" * 32])}, {}])
def test_what_was_brought_back_of_other_rules_or_rows_changes_nothing(restored):
    texts = mixed(5)
    assert applied(texts, *EVERY, restored=restored) == applied(texts, *EVERY)


def test_a_row_that_was_brought_back_has_the_text_that_the_rule_rejected():
    text = "One line of this is a sentence.\nand one is not"
    restored = {"c4.too_few_sentences": keys_of([text])}
    assert applied([text], "c4", restored=restored)[0] == [text]
    emptied = "\x07"
    assert applied([emptied], "unicode", restored={"unicode.empty": keys_of([emptied])})[0] == [emptied]


# ── the configuration ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("gopher_quality", GopherQuality()),
        ("gopher_repetition", GopherRepetition()),
        ("fineweb", FineWebQuality()),
        ("c4", C4Quality()),
    ],
)
def test_the_defaults_of_a_step_are_those_of_its_rules(name, params):
    (step,) = steps_of(name)
    assert replace(params, **step.model_dump(exclude={"step"})) == params


@pytest.mark.parametrize(
    ("name", "option"),
    [
        *(
            ("gopher_repetition", each)
            for each in ("dup_line_frac", "dup_para_frac", "dup_line_char_frac", "dup_para_char_frac")
        ),
        *(
            ("fineweb", each)
            for each in ("line_punct_thr", "short_line_thr", "char_duplicates_ratio", "new_line_ratio")
        ),
    ],
)
def test_a_share_below_0_is_refused(name, option):
    assert steps_of({"step": name, option: 0})
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        steps_of({"step": name, option: -1})
