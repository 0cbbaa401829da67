"""Laws of a corpus's page: its numbers are the figures, its bytes depend on them alone, data can't act on it, and it can be
read in a browser, wide or narrow, light or dark."""

from __future__ import annotations

import copy
import json
import random
import re
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest
from chromium import View, chromium, look  # noqa: F401

from aifactory.cli import _lines
from aifactory.ingest import duplicates, leaks
from aifactory.ingest.corpus_page import corpus_report
from aifactory.ingest.decisions import NEAR, NEAR_LEAK, NEAR_SEEN
from aifactory.ingest.page_text import binary_size, megabytes, share, shown
from aifactory.ingest.rule_words import DECISION_RULES, rule_words, step_of, step_words
from aifactory.ingest.stages import stages
from aifactory.records.artifacts import Corpus, Record

WORDS = "the river bends where old willows lean over stones and slow water carries light to quiet fields"
EMAIL, IP = "anna.meier@example.org", "81.2.69.142"
STEPS = [
    {"step": "unicode"},
    {"step": "length", "min_bytes": 20},
    {"step": "language", "keep": ["en"]},
    {"step": "length", "max_bytes": 3000},
    {"step": "personal"},
    {"step": "near_duplicates"},
    {"step": "decontaminate"},
]


def prose(number: int, words: int = 60) -> str:
    rng = random.Random(number)
    return " ".join(rng.choices(WORDS.split(), k=words)) + f" number {number}."


def rows_of_every_kind() -> list[dict[str, str]]:
    texts = [prose(i, 30 + 5 * i) for i in range(60)]
    texts += texts[:9] + [text.replace("river", "stream", 1) for text in texts[9:14]]
    texts += ["hi", f"write {EMAIL}", " ", prose(99, 900), "Der Hund läuft durch den Wald und die Katze sieht ihm zu."]
    texts += [f"{prose(200 + i)} Write to {EMAIL} or log in at {IP}." for i in range(4)]
    return [{"text": text, "topic": ("water", "stone")[i % 2]} for i, text in enumerate(texts)]


@pytest.fixture
def corpus(write_files, ingest):
    lines = [json.dumps(row) for row in rows_of_every_kind()]
    return ingest(
        write_files({"a.jsonl": "\n".join(lines), "b.jsonl": "no json"}),
        "jsonl",
        columns={"text": "text", "label": "topic"},
        recipe={"steps": STEPS},
    )


class Parsed(HTMLParser):
    """The elements of a page with their attributes, and its text by section."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._section = "head"
        self.feed(page.decode())
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("header", "section", "footer") and (tag != "header" or self._section == "head"):
            self._section = dict(attrs).get("id") or tag

    def handle_data(self, data):
        self.texts[self._section] = self.texts.get(self._section, "") + data

    @property
    def text(self) -> str:
        return "".join(self.texts.values())

    @property
    def shape(self) -> list[tuple[str, list[str]]]:
        """What the page is made of, whatever it says."""
        return [(tag, sorted(attributes)) for tag, attributes in self.elements]


def small_figures(**values):
    """The figures of a corpus of one row."""
    figures = {
        "rows_in": 1,
        "rows_kept": 1,
        "rows_rejected": 0,
        "rows_holdout": 0,
        "rows_erased": 0,
        "bytes_kept": 5,
        "rejected_by_rule": {},
        "languages": {},
        "labels": {},
        "lengths": {"4": 1},
        "sources": {"docs": {"kept": 1, "rejected": 0}},
        "examples": {},
        "steps": [],
        "corpus_steps": [],
        "source_files": 1,
    }
    return figures | values


# ── numbers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_the_stages_take_is_what_was_rejected_and_the_last_leaves_what_was_kept(corpus):
    found = stages(corpus.figures)

    assert sum(stage.taken for stage in found) == corpus.figures["rows_rejected"] == len(corpus.ledger)
    left = corpus.figures["rows_in"]
    for stage in found:
        assert stage.rows_in == left
        left -= stage.taken
    assert left == corpus.figures["rows_kept"]
    counted = {}
    for stage in found:
        counted |= dict(stage.rules)
    assert counted == corpus.figures["rejected_by_rule"]


def test_the_stages_stand_in_the_order_of_what_happened(corpus):
    names = [stage.name for stage in stages(corpus.figures)]

    first = ["reading", "unicode", "length", "language", "length", "personal"]
    assert names == [*first, "exact duplicates", "near_duplicates", "decontaminate"]
    rows_in = [stage.rows_in for stage in stages(corpus.figures) if stage.step]
    assert rows_in == [step["rows_in"] for step in corpus.figures["steps"]]


def test_every_number_of_the_figures_is_on_the_page(corpus):
    figures = corpus.figures
    page = Parsed(corpus.bytes["report.html"])

    for name in ("rows_in", "rows_kept", "rows_rejected", "rows_holdout"):
        assert f"{figures[name]:,}" in page.texts["header"]
    assert megabytes(figures["bytes_kept"]) in page.texts["header"]
    for rule, rows in figures["rejected_by_rule"].items():
        assert re.search(rf"{re.escape(rule)}.*?{rows:,}", page.texts["rules"], re.DOTALL)
    personal = next(step for step in figures["steps"] if step["step"] == "personal")
    assert personal["email"] and personal["ip"]
    assert f"{personal['email'] + personal['ip']}\u00a0finds" in page.texts["personal"]
    for label, rows in figures["labels"].items():
        assert f"{label}: {rows:,}\u00a0rows" in corpus.bytes["report.html"].decode()


def test_the_bars_of_the_rules_are_as_long_as_what_they_took(corpus):
    page = corpus.bytes["report.html"].decode().split('<section id="rules">')[1].split("</section>")[0]
    rows = re.findall(r'width:([\d.]+)%"></span></span><span class="number">([\d,]+)</span>', page)
    counts = corpus.figures["rejected_by_rule"]

    assert sum(int(number.replace(",", "")) for _, number in rows) == sum(counts.values())
    for width, number in rows:
        assert float(width) == pytest.approx(100 * int(number) / max(counts.values()), abs=0.01)


def test_bars_of_a_chart_are_as_long_as_their_values():
    sources = {"a": {"kept": 300, "rejected": 100}, "b": {"kept": 50, "rejected": 150}}
    figures = small_figures(rows_in=600, rows_kept=350, rows_rejected=250, sources=sources)
    figures["rejected_by_rule"] = {"empty": 250}
    page = corpus_report("x", figures).decode()
    (chart,) = re.findall(r'<svg[^>]*aria-label="Rows of each source[^>]*>.*?</svg>', page)
    bars = re.findall(r'width="([\d.]+)"[^>]*/><title>([^<]*)</title>', chart)

    lengths = {said: float(width) for width, said in bars}
    unit = lengths["a: 300\u00a0rows kept"] / 300
    assert lengths["a: 100\u00a0rows rejected"] == pytest.approx(100 * unit, abs=0.2)
    assert lengths["b: 50\u00a0rows kept"] == pytest.approx(50 * unit, abs=0.2)
    assert lengths["b: 150\u00a0rows rejected"] == pytest.approx(150 * unit, abs=0.2)


@pytest.mark.parametrize(
    ("part", "whole", "written"),
    [(0, 0, "0 %"), (0, 9, "0.0 %"), (1, 9999, "<0.1 %"), (9998, 9999, ">99.9 %"), (9, 9, "100 %"), (1, 8, "12.5 %")],
)
def test_a_share_never_reads_as_nothing_or_all_when_it_is_not(part, whole, written):
    assert share(part, whole).replace("\u00a0", " ") == written


def test_sizes_are_written_with_their_unit():
    assert [megabytes(n).replace("\u00a0", " ") for n in (0, 999, 1000, 1_234_567, 5 * 10**12)] == [
        "0 bytes",
        "999 bytes",
        "1 kB",
        "1.23 MB",
        "5,000 GB",
    ]
    assert [binary_size(1 << n).replace("\u00a0", " ") for n in (0, 9, 10, 29)] == ["1 B", "512 B", "1 KiB", "512 MiB"]


# ── bytes ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_bytes_depend_on_the_figures_alone(corpus):
    page = corpus.bytes["report.html"]
    program = (
        "import json, sys; from aifactory.ingest.corpus_page import corpus_report; "
        "sys.stdout.buffer.write(corpus_report('tests', json.load(sys.stdin)))"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(corpus.figures).encode(),
        capture_output=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"},
    )

    assert elsewhere.stdout == page
    assert corpus_report("tests", corpus.figures) == page
    assert b"<!--" not in page and b"pygal" not in page


def test_no_chart_is_drawn_before_there_is_a_corpus():
    code = "import aifactory.factory, aifactory.ingest.pipeline, sys; print('pygal' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ── what data says ────────────────────────────────────────────────────────────────────────────────────────────────────

HOSTILE = "\"><script>ran=1</script><img src=x onerror=ran=1>'&lt;</svg></pre>\u202eevil\u2066\x00\x1b[2J\u0085\ufffe\U000e0041"


def figures_that_say(text: str):
    """Figures with the text wherever data can say something."""
    row = {"id": text, "source": text, "origin": text, "position": 3, "score": 0.5, "detail": text, "text": text}
    return small_figures(
        rows_in=9,
        rows_kept=4,
        rows_rejected=5,
        rejected_by_rule={text: 2, "duplicate": 3},
        examples={text: [row], "duplicate": [row, row]},
        languages={text: 2, "en": 2},
        labels={text: 1, "b": 3},
        sources={text: {"kept": 1, "rejected": 5}, "z": {"kept": 3, "rejected": 0}},
        steps=[
            {"step": "personal", "rows_in": 7, "changed": 1, text: 4},
            {
                "step": text,
                "rows_in": 7,
                text: 5,
                "labels": {text: 3},
                "agreement": {"rows": 3, "same": 2, "kappa": None},
            },
        ],
    )


def test_what_data_says_can_not_change_what_the_page_is_made_of():
    page = corpus_report(HOSTILE, figures_that_say(HOSTILE))

    assert Parsed(page).shape == Parsed(corpus_report("plain", figures_that_say("plain"))).shape
    assert "<script>ran=1</script><img src=x onerror=ran=1>'&lt;</svg></pre>" in Parsed(page).text


def test_no_control_character_and_no_override_of_the_direction_comes_through():
    page = corpus_report(HOSTILE, figures_that_say(HOSTILE)).decode()

    assert {char for char in page if unicodedata.category(char) in ("Cc", "Cf", "Cn", "Co", "Cs")} == {"\n"}
    assert "⟨U+202E⟩evil⟨U+2066⟩⟨U+0000⟩⟨U+001B⟩[2J⟨U+0085⟩⟨U+FFFE⟩⟨U+E0041⟩" in page


@pytest.mark.parametrize("text", ["plain", "größe 日本 שלום", "a\u00a0b\u3000c", "👩\u200d💻", "क्\u200dष", "e\u0301"])
def test_what_can_be_seen_stays_as_it_is(text):
    assert shown(text) == text


def test_lines_and_tabs_stay_in_examples_alone():
    figures = figures_that_say("a\n\tb")
    page = corpus_report("x", figures).decode()

    assert "\n\ta" not in page
    assert '<pre dir="auto">\na\n\tb</pre>' in page
    assert "a⟨U+000A⟩⟨U+0009⟩b: 1" in page


def test_the_page_asks_for_nothing_and_forbids_it(corpus):
    for page in (corpus.bytes["report.html"], corpus_report(HOSTILE, figures_that_say(HOSTILE))):
        parsed = Parsed(page)
        tags = {tag for tag, _ in parsed.elements}
        assert not tags & {"script", "img", "iframe", "object", "embed", "image", "use", "foreignobject", "a", "form"}
        for tag, attributes in parsed.elements:
            assert not [name for name in attributes if name.startswith("on") or name in ("src", "xlink:href", "srcset")]
            assert attributes.get("href", "data:,") == "data:,", tag
        styles = re.findall(r"<style>(.*?)</style>", page.decode(), re.DOTALL)
        assert len(styles) == 1 and "url(" not in styles[0] and "@import" not in styles[0]
        policy = next(a["content"] for tag, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy")
        assert policy.startswith("default-src 'none'")


def test_where_personal_data_is_masked_no_example_shows_it(corpus, write_files, ingest):
    assert [line["text"] for line in corpus.ledger if line["rule"] == "length"].count(f"write {EMAIL}") == 0
    lines = [json.dumps(row) for row in rows_of_every_kind()]
    strict = [{"step": "length", "min_bytes": 60}, {"step": "personal"}]
    made = ingest(
        write_files({"a.jsonl": "\n".join(lines)}, "again"), "jsonl", recipe={"steps": strict}, storage="again"
    )

    assert f"write {EMAIL}" in {line["text"] for line in made.ledger if line["rule"] == "length"}
    assert "write <EMAIL>" in {row["text"] for row in made.figures["examples"]["length"]}
    for each in (made, corpus):
        assert EMAIL not in json.dumps(each.figures)
        assert EMAIL.encode() not in each.bytes["report.html"]


# ── sections ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_corpus_of_one_row_has_no_section_without_something_to_show():
    page = Parsed(corpus_report("x", small_figures()))

    assert set(page.texts) == {"head", "header", "kept", "footer"}
    assert "1 of 1\u00a0row was kept, none was rejected." in page.texts["header"]
    assert "Source" not in page.texts["kept"] and "Language" not in page.texts["kept"]


def test_a_corpus_without_a_row_makes_a_page():
    empty = small_figures(rows_in=0, rows_kept=0, bytes_kept=0, lengths={}, sources={}, source_files=0)

    assert set(Parsed(corpus_report("x", empty)).texts) == {"head", "header", "footer"}


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("rules", {"rows_in": 3, "rows_rejected": 2, "rejected_by_rule": {"empty": 2}}),
        ("duplicates", {"rows_in": 3, "rows_rejected": 2, "rejected_by_rule": {"near_holdout_leak": 2}}),
        ("personal", {"steps": [{"step": "personal", "email": 2, "changed": 1}]}),
        ("agreement", {"steps": [{"step": "label_by_rule", "agreement": {"rows": 4, "same": 3, "kappa": -0.25}}]}),
    ],
)
def test_a_section_is_there_when_it_has_something_to_show(section, values):
    assert section not in Parsed(corpus_report("x", small_figures())).texts
    assert section in Parsed(corpus_report("x", small_figures(**values))).texts


@pytest.mark.parametrize("heading", ["languages", "labels"])
def test_a_picture_is_there_when_it_has_something_to_show(heading):
    values = {heading: {f"v{i:02d}": 40 - i for i in range(30)}}
    page = Parsed(corpus_report("x", small_figures(**values))).texts["kept"]

    assert heading.removesuffix("s").capitalize() in page
    assert "v00" in page and "v11" in page and "v12" not in page
    assert "18 more" in page


def test_a_step_that_looked_for_personal_data_and_found_none_says_so():
    page = Parsed(corpus_report("x", small_figures(steps=[{"step": "personal", "email": 0}])))

    assert "personal data masked" in page.texts["header"]
    assert "personal" not in page.texts


def test_agreement_is_written_in_full():
    steps = [
        {"step": "label_by_rule", "agreement": {"rows": 1200, "same": 900, "accuracy": 0.75, "kappa": -0.25}},
        {"step": "label_by_model", "agreement": {"rows": 5, "same": 5, "kappa": None}},
        {"step": "label_by_function", "agreement": {"rows": 0, "same": 0, "kappa": None, "unlabeled": 3}},
    ]
    page = Parsed(corpus_report("x", small_figures(steps=steps))).texts["agreement"].replace("\u00a0", " ")

    assert "label by rule1,20075.0 %−0.250" in page
    assert "label by model5100 %–" in page
    assert "function" not in page


# ── words ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_rule_that_can_reject_is_explained():
    from aifactory.ingest import language, quality

    named = {
        "gopher_quality": quality.GOPHER_QUALITY_RULES,
        "gopher_repetition": quality.gopher_repetition_rules(quality.GopherRepetition()),
        "fineweb": quality.FINEWEB_QUALITY_RULES,
        "c4": quality.C4_QUALITY_RULES,
        "keep_labels": ("label",),
        "model_quality": ("too_surprising", "too_predictable"),
    }
    whole = [(step, f"{step}.{rule}") for step, rules in named.items() for rule in rules]
    whole += [("language", rule) for rule in language.RULES]
    whole += [(step, step) for step in ("length", "alphabetic", "line_length")]
    for step, rule in whole:
        assert step_of(rule, ["unicode", step, "personal"]) == step
        assert rule_words(rule, step), rule
        assert step_words(step), step
    decided = {duplicates.SAME, duplicates.SEEN, duplicates.LEAK, NEAR, NEAR_SEEN, NEAR_LEAK, leaks.LEAK}
    assert set(DECISION_RULES) == decided


def test_a_rule_that_nobody_has_described_stands_under_its_own_name():
    figures = small_figures(rows_in=4, rows_rejected=3, rejected_by_rule={"novel.odd": 3}, steps=[{"step": "novel"}])
    figures["steps"][0] |= {"rows_in": 4, "rows_rejected": 3}

    assert stages(figures)[1].rules == {"novel.odd": 3}
    assert "novel.odd" in Parsed(corpus_report("x", figures)).texts["rules"]


# ── where it is ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_ingest_prints_names_the_page_and_spares_the_examples():
    figures = small_figures(examples={"empty": [{"text": "secret"}]})
    record = Record(
        kind="corpus", fingerprint="f" * 64, digest="d", code_version=1, recipe={}, inputs=[], files=[], figures=figures
    )
    lines = _lines(Corpus(record=record, uri="/root/corpus/ffff"))

    assert [line.split(None, 1)[1] for line in lines if line.startswith("report ")] == ["/root/corpus/ffff/report.html"]
    assert "secret" not in "\n".join(lines)


# ── a browser ─────────────────────────────────────────────────────────────────────────────────────────────────────────

MEASURE = """(() => {
  document.querySelectorAll("details").forEach(each => { each.open = true });
  const light = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255).map(
      v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = node => {
    for (let each = node; each; each = each.parentElement) {
      const color = getComputedStyle(each).backgroundColor;
      if (!/rgba\\(.*, 0\\)/.test(color)) return color;
    }
  };
  const texts = [...document.body.querySelectorAll("*")].filter(node => node.tagName !== "title" && node.checkVisibility()
    && [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim()));
  const contrasts = texts.map(node => {
    const style = getComputedStyle(node);
    const [a, b] = [light(node.closest("svg") ? style.fill : style.color), light(behind(node))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), node.outerHTML.slice(0, 80)];
  });
  const box = node => { const b = node.getBoundingClientRect(); return [b.left, b.right, b.width, b.height] };
  return {
    wide: document.documentElement.scrollWidth,
    paper: getComputedStyle(document.body).backgroundColor,
    contrast: contrasts.reduce((least, each) => each[0] < least[0] ? each : least),
    charts: [...document.querySelectorAll("svg.chart")].map(svg => ({
      box: box(svg), bars: [...svg.querySelectorAll("rect")].map(box),
      texts: [...svg.querySelectorAll("text")].map(text => [...box(text), text.textContent]),
    })),
    ran: typeof ran !== "undefined",
  };
})()"""


def test_the_page_can_be_read_in_a_browser_wide_and_narrow_light_and_dark(corpus, chromium, tmp_path):  # noqa: F811
    figures = copy.deepcopy(corpus.figures)
    hostile = figures_that_say(HOSTILE)
    figures["examples"] = dict.fromkeys(figures["examples"], hostile["examples"]["duplicate"])
    figures["sources"] = hostile["sources"] | {
        "a" * 200: {"kept": 5, "rejected": 5},
        "שלום": {"kept": 1, "rejected": 0},
    }
    figures["languages"] = {"en": 1_234_567, "de": 3}
    figures["steps"][2]["agreement"] = {"rows": 9, "same": 8, "kappa": 0.7}
    page = Path(tmp_path, "report.html")
    page.write_bytes(corpus_report("a" * 60, figures))
    views = [View(width=width, scheme=scheme) for width in (390, 1280) for scheme in ("light", "dark")]

    seen = look(chromium, page.as_uri(), views, MEASURE)

    assert seen.complaints == []
    assert set(seen.requests) == {page.as_uri()}
    papers = [value["paper"] for value in seen.values]
    assert papers[0] == papers[2] != papers[1] == papers[3]
    for view, value in zip(views, seen.values, strict=True):
        assert not value["ran"]
        assert value["wide"] <= view.width, (view, value["wide"])
        assert value["contrast"][0] >= 4.5, (view, value["contrast"])
        assert len(value["charts"]) == page.read_text().count("<svg")
        for chart in value["charts"]:
            left, right, width, height = chart["box"]
            assert width > 200 and height > 10
            assert max(bar[2] for bar in chart["bars"]) > 10, "no bar can be seen"
            for start, end, _, tall, said in chart["texts"]:
                assert left - 1 <= start and end <= right + 1, (view, said)
                assert tall >= 11, (view, said)
