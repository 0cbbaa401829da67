"""Laws of labels: they depend on a row alone, the figures equal a count by hand, and what is wrong is named."""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter

import pyarrow as pa
import pytest
from pydantic import TypeAdapter

from aifactory.config import Config, Ingest, Step
from aifactory.errors import ConfigError
from aifactory.ingest.labels import load_function, source_digest, summed
from aifactory.ingest.pipeline import Work
from aifactory.ingest.steps import Figures, apply_steps, step_recipes
from aifactory.records.storage import Storage

WORDS = ["def", "return", "the", "Fox", "größe", "日本", "x = 1", "\n", "{", "12"]
RULES = [
    {"label": "code", "pattern": r"\b(def|return)\b"},
    {"label": "number", "pattern": r"\d+"},
    {"label": "name", "pattern": r"(?i)fox|größe"},
]
FUNCTION = """
seen = []


def label(rows):
    seen.append(len(rows))
    assert all(set(row) == {"text", "prompt", "messages", "source", "origin", "label"} for row in rows)
    return [row["text"].split()[0] if len(row["text"]) % 3 else None for row in rows]


wrong_length = lambda rows: ["a"]
wrong_type = lambda rows: ["a", 3, *["b"] * (len(rows) - 2)]
one_text = lambda rows: "a" * len(rows)
an_iterator = lambda rows: iter(["a"] * len(rows))


def raises(rows):
    raise KeyError("no such thing")


CONSTANT = 3
"""


def steps_of(*sections):
    return tuple(TypeAdapter(Step).validate_python(section) for section in sections)


def random_rows(seed, count=300):
    rng = random.Random(seed)
    texts = [" ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 6))) + "." for _ in range(count)]
    columns = {
        "key": [f"{i}" for i in range(count)],
        "origin": [f"{rng.choice('ab')}/{i}.txt" for i in range(count)],
        "source": ["docs"] * count,
        "prompt": [rng.choice(["", "def", "12"]) for _ in range(count)],
        "text": texts,
        "messages": [""] * count,
        "label": [rng.choice(["", "", "code", "number", "poem"]) for _ in range(count)],
    }
    return pa.table(columns, schema=pa.schema([(name, pa.string()) for name in columns]))


def labelled(table, *sections, **options):
    figures = Figures()
    kept, broken = apply_steps(table, steps_of(*sections), figures, **options)
    return kept, broken, [summed(step) for step in figures.steps]


@pytest.fixture
def labeller(tmp_path, monkeypatch):
    """A module `labeller` with FUNCTION in it, that is forgotten afterwards."""
    (tmp_path / "labeller.py").write_text(FUNCTION)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "labeller.py"
    for name in [name for name in sys.modules if name.startswith("labeller")]:
        del sys.modules[name]
    source_digest.cache_clear()


# ── by rule ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("on", ["text", "prompt", "source", "origin"])
@pytest.mark.parametrize("default", [None, "other"])
def test_the_first_rule_that_matches_labels_a_row(on, default):
    rules = [{"label": "b", "pattern": "^b/|^docs$"}, *RULES]
    table = random_rows(1)

    kept, _, _ = labelled(
        table, {"step": "label_by_rule", "rules": rules, "default": default, "on": on, "keep_existing": False}
    )

    def first(value):
        return next((rule["label"] for rule in rules if re.search(rule["pattern"], value)), default or "")

    expected = [first(value) for value in table[on].to_pylist()]
    assert kept["label"].to_pylist() == expected
    assert len(set(expected)) > 1 or on == "source"


def test_a_pattern_that_re2_cannot_compile_is_named_with_its_line():
    text = """\
name: demo
ingest:
  sources: [{name: docs, kind: text, path: /x}]
  steps:
    - step: label_by_rule
      rules:
        - {label: a, pattern: "(?<=x)y"}
"""

    with pytest.raises(ConfigError, match=r"a.yaml:7: 'ingest.steps.0.rules.0.pattern': expected a regular .*'\(\?<=x"):
        Config.from_text(text, origin="a.yaml")


# ── all of them ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [1, 7, 299, 300])
def test_labels_and_figures_do_not_depend_on_how_blocks_are_cut(labeller, size):
    sections = [
        {"step": "label_by_rule", "rules": RULES, "keep_existing": False},
        {"step": "keep_labels", "drop": ["name"]},
        {"step": "label_by_function", "function": "labeller:label"},
        {"step": "keep_labels", "keep": ["", "code", "the", "number"]},
    ]
    table = random_rows(2)
    whole, broken, counted = labelled(table, *sections)

    figures = Figures()
    blocks = [apply_steps(table.slice(at, size), steps_of(*sections), figures) for at in range(0, table.num_rows, size)]

    assert pa.concat_tables([kept for kept, _ in blocks]).to_pylist() == whole.to_pylist()
    gone = {key for some in broken for key in some.rows["key"].to_pylist()}
    assert {key for _, some in blocks for each in some for key in each.rows["key"].to_pylist()} == gone
    assert [summed(step) for step in figures.steps] == counted


@pytest.mark.parametrize("keep_existing", [True, False])
def test_a_label_that_is_there_stays_or_goes_as_it_is_asked(keep_existing):
    table = random_rows(3)
    kept, _, _ = labelled(table, {"step": "label_by_rule", "rules": RULES, "keep_existing": keep_existing})
    found, _, _ = labelled(table, {"step": "label_by_rule", "rules": RULES, "keep_existing": False})

    expected = [
        before if before and keep_existing else after
        for before, after in zip(table["label"].to_pylist(), found["label"].to_pylist(), strict=True)
    ]
    assert kept["label"].to_pylist() == expected


@pytest.mark.parametrize("keep_existing", [True, False])
@pytest.mark.parametrize("default", [None, "code"])
def test_agreement_equals_a_count_by_hand(keep_existing, default):
    table = random_rows(4)
    section = {"step": "label_by_rule", "rules": RULES, "default": default, "keep_existing": keep_existing}
    _, _, (counted,) = labelled(table, section)
    found, _, _ = labelled(table, section | {"keep_existing": False})

    pairs = list(zip(table["label"].to_pylist(), found["label"].to_pylist(), strict=True))
    both = [(before, after) for before, after in pairs if before and after]
    n = len(both)
    before_of, after_of = (Counter(pair[side] for pair in both) for side in (0, 1))
    observed = sum(before == after for before, after in both) / n
    chance = sum(before_of[name] / n * after_of[name] / n for name in {*before_of, *after_of})
    assert counted["agreement"] == {
        "rows": n,
        "same": sum(before == after for before, after in both),
        "accuracy": pytest.approx(observed),
        "kappa": pytest.approx((observed - chance) / (1 - chance)),
        "unlabelled": len([pair for pair in pairs if pair[0] and not pair[1]]),
    }
    assert counted["labels"] == {name: count for name, count in Counter(found["label"].to_pylist()).items() if name}
    assert "poem" in before_of  # a label that no rule gives counts as one that never agrees


def test_agreement_is_none_where_chance_alone_explains_all():
    table = random_rows(5, 10).set_column(6, "label", pa.array(["a"] * 10))
    _, _, (counted,) = labelled(
        table, {"step": "label_by_rule", "rules": [{"label": "a", "pattern": ""}], "keep_existing": False}
    )

    assert counted["agreement"] == {"rows": 10, "same": 10, "accuracy": 1.0, "kappa": None, "unlabelled": 0}


def test_rows_without_a_label_before_give_no_agreement():
    table = random_rows(6, 10).set_column(6, "label", pa.array([""] * 10))

    assert "agreement" not in labelled(table, {"step": "label_by_rule", "rules": RULES})[2][0]


def test_figures_of_a_corpus_add_up_over_its_parts(write_files, ingest):
    table = random_rows(7)
    rows = [
        {"text": f"{t} {i}", "label": n} for i, (t, n) in enumerate(zip(*table.select(["text", "label"]), strict=True))
    ]
    lines = [json.dumps({name: str(value) for name, value in row.items()}) + "\n" for row in rows]
    root = write_files({f"{i}.jsonl": "".join(lines[i::5]) for i in range(5)})
    recipe = {"steps": [{"step": "label_by_rule", "rules": RULES}, {"step": "keep_labels", "drop": ["poem"]}]}

    made = ingest(root, "jsonl", columns={"text": "text", "label": "label"}, recipe=recipe)
    whole = table.set_column(4, "text", pa.array([str(row["text"]) for row in rows]))
    _, _, counted = labelled(whole, *recipe["steps"])

    assert [step["step"] for step in made.figures["steps"]] == ["label_by_rule", "keep_labels"]
    assert made.figures["steps"][0]["agreement"] == counted[0]["agreement"]
    assert made.figures["steps"][0]["labels"] == counted[0]["labels"]
    assert made.figures["labels"].get("poem") is None
    assert made.figures["rejected_by_rule"]["keep_labels.label"] == counted[1]["rows_rejected"]
    assert {line["score"] for line in made.ledger if line["rule"] == "keep_labels.label"} == {1.0}
    assert all("'poem'" in line["detail"] for line in made.ledger if line["rule"] == "keep_labels.label")


# ── by a function ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_function_labels_rows_in_batches(labeller):
    table = random_rows(8, 2500)
    kept, _, _ = labelled(table, {"step": "label_by_function", "function": "labeller:label", "keep_existing": False})

    texts = table["text"].to_pylist()
    assert kept["label"].to_pylist() == [text.split()[0] if len(text) % 3 else "" for text in texts]
    assert sys.modules["labeller"].seen == [1000, 1000, 500]


def test_a_function_is_found_in_the_working_directory(tmp_path, monkeypatch):
    folder = tmp_path / "job"
    (folder / "labels_of_job").mkdir(parents=True)
    (folder / "labels_of_job" / "__init__.py").write_text("")
    (folder / "labels_of_job" / "by_length.py").write_text("def label(rows): return [None for _ in rows]\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each not in ("", str(folder))])

    assert load_function("labels_of_job.by_length:label")([{}]) == [None]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "labeler:label",
            "expected the labelling function labeler:label, found no module 'labeler'; put it into the job's",
        ),
        ("labeller:lable", "found nothing of this name in labeller"),
        ("labeller:CONSTANT", "found a int in labeller"),
        ("labeller_broken:label", "importing labeller_broken fails: NameError"),
        ("labeller_needs:label", "found no module 'not_there_at_all'; labeller_needs imports it"),
    ],
)
def test_a_function_that_is_not_there_is_named_before_any_row_is_read(labeller, tmp_path, function, message):
    (tmp_path / "labeller_broken.py").write_text("boo\n")
    (tmp_path / "labeller_needs.py").write_text("import not_there_at_all\n")
    recipe = Ingest.model_validate(
        {
            "sources": [{"name": "docs", "kind": "text", "path": "nowhere"}],
            "steps": [{"step": "label_by_function", "function": function}],
        }
    )

    with pytest.raises(ConfigError) as error:
        Work.of(recipe, Storage(str(tmp_path)))

    assert message in str(error.value)
    assert function in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong_length", "expected 30 labels from labeller:wrong_length, one for each row, found 1"),
        ("wrong_type", "expected a str or None for each row from labeller:wrong_type, found 3 (int) for row 1 of 30"),
        ("one_text", "expected a list of 30 labels from labeller:one_text, found a str"),
        ("an_iterator", "expected a list of 30 labels from labeller:an_iterator, found a list_iterator"),
        ("raises", "expected a list of labels from labeller:raises, found KeyError: 'no such thing', for 30 rows"),
    ],
)
def test_what_is_no_list_of_labels_is_named_with_what_was_expected(labeller, name, message):
    with pytest.raises(ConfigError) as error:
        labelled(random_rows(9, 30), {"step": "label_by_function", "function": f"labeller:{name}"})

    assert message in str(error.value)


def test_the_source_of_a_function_and_its_version_bear_identity(labeller):
    def identity(**options):
        source_digest.cache_clear()
        return step_recipes(steps_of({"step": "label_by_function", "function": "labeller:label", **options}), {})

    before = identity()
    assert identity() == before
    assert identity(version="2") != before
    labeller.write_text(FUNCTION + "\n# changed\n")
    assert identity() != before


# ── keep_labels ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("section", "stays"),
    [
        ({"keep": ["code", "poem"]}, {"code", "poem"}),
        ({"keep": ["code", ""]}, {"code", ""}),
        ({"drop": ["code"]}, {"", "number", "poem"}),
        ({"drop": [""]}, {"code", "number", "poem"}),
        ({"keep": ["code"], "drop": ["poem"]}, {"code"}),
    ],
)
def test_rows_are_kept_by_their_label(section, stays):
    table = random_rows(10)

    kept, (broken,), _ = labelled(table, {"step": "keep_labels", **section})

    assert kept.to_pylist() == [row for row in table.to_pylist() if row["label"] in stays]
    assert broken.rows.to_pylist() == [row for row in table.to_pylist() if row["label"] not in stays]
    assert set(broken.rules) == {"keep_labels.label"}
    for row, detail in zip(broken.rows.to_pylist(), broken.details, strict=True):
        assert repr(row["label"]) in detail if row["label"] else detail == "no label"


def test_rows_that_were_brought_back_stay():
    table = random_rows(11)
    gone = labelled(table, {"step": "keep_labels", "keep": ["code"]})[1][0].rows["key"].to_pylist()
    restored = {"keep_labels.label": frozenset(gone[::2])}

    kept, (broken,), _ = labelled(table, {"step": "keep_labels", "keep": ["code"]}, restored=restored)

    assert broken.rows["key"].to_pylist() == gone[1::2]
    assert len(kept) == len(table) - len(gone[1::2])


def test_feedback_is_labelled_and_never_filtered_by_label_or_model():
    model = {"model": "registry:production"}
    steps = steps_of(
        {"step": "label_by_rule", "rules": RULES},
        {"step": "label_by_function", "function": "a:b"},
        {"step": "label_by_model", "prompt": "{text}", "labels": ["a", "b"], **model},
        {"step": "keep_labels", "keep": ["a"]},
        {"step": "model_quality", **model},
    )

    assert [step.FOR_FEEDBACK for step in steps] == [True, True, True, False, False]
